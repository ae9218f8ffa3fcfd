"""The conditions that this library has; each is a value in the `conditions` of a network (`layers.conditioning`).

    label      cond["label"]: int [B], in 0 .. num_classes; num_classes itself is the null class
    pooled     cond["pooled"]: float [B, P], one vector per sample; with id_features also
               cond["time_ids"]: float [B, n], numbers that are embedded as times are: sizes and crops of the image
    sizes      cond["size"]: float [B, 2], height and width in pixels of the picture that a sample was made from or is
               to have; cond["aspect"]: float [B], its height over its width
    guidance_scale  cond["guidance_scale"]: float [B], the scale of the guidance that a distilled network answers with
    target_time  cond["target_time"]: float, of the shape of t: where the step ends that the answer is to make, as the
               network is fed times; `denoisers.denoiser(network, process, target_time=True)` says it
    context    cond["context"]: float [B, M, C], a sequence to attend to; cond["context_mask"]: [B, M], true where it
               counts, may be left out
    text       cond["tokens"]: int [B, M], for an encoder trained with the model; cond["tokens_mask"] as above
    concat     cond["concat"]: float [B, H, W, C], channels that join those of x: a mask and the image behind it, say
    audio      cond["audio"]: float [B, F, M, C], the M audio features of each frame of a clip; [B, F, C] where M is 1
    reference  cond["reference"]: float [B, H, W, C] or [B, R, H, W, C], clean frames before a clip; may be left out

A ControlNet and the U-Net that it steers have "control" and "residuals" besides (`models.controlnet`, `models.unet`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.layers.branches import AttentionBranch, MlpBranch, Side, Stack
from diffusion_jax.models.layers.conditioning import Attended, ConditionStream, CondKey, full_mask, nonempty
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import (
    LookupTable,
    TimeEmbedding,
    VectorEmbedding,
    check_numbers,
    grid_positions,
    rotary_angles,
    timestep_embedding,
)
from diffusion_jax.models.layers.norms import layer_norm

PROJECTIONS = ("linear", "mlp", "none")


@dataclass(frozen=True)
class Label(ConditionStream):
    """See `label`."""

    num_classes: int

    keys = (CondKey("label", ("B",), jnp.integer),)

    def check(self, cond, sizes):
        super().check(cond, sizes)
        self._check(cond, self.num_classes + 1)

    def check_data(self, cond):
        super().check(cond, {})
        self._check(cond, self.num_classes)

    def _check(self, cond, count):
        if not isinstance(cond["label"], Tracer):
            values = np.asarray(cond["label"])
            if (wrong := values[(values < 0) | (values >= count)]).size:
                classes = f"the network knows the classes 0 to {self.num_classes - 1}"
                classes += f", and {self.num_classes} for none" * (count > self.num_classes)
                raise invalid("cond['label']", int(wrong[0]), classes)

    def embed(self, cond, place):
        init = nn.initializers.normal(place.table_std)
        table = LookupTable(self.num_classes + 1, place.width, embedding_init=init, name="label")
        return {"vector": table(cond["label"])}

    def null(self, cond):
        return {"label": jnp.full(jnp.shape(cond["label"]), self.num_classes, jnp.int32)}


def label(num_classes: int) -> Label:
    """A class, by a learned vector; label `num_classes` is the null class."""
    return Label(_positive("num_classes", num_classes))


@dataclass(frozen=True)
class Pooled(ConditionStream):
    """See `pooled`."""

    layers: int = 1
    channels: int = 0
    id_features: int = 0

    @property
    def keys(self):
        ids = (CondKey("time_ids", ("B", "n"), jnp.number),) * bool(self.id_features)
        return (CondKey("pooled", ("B", "P")), *ids)

    def check(self, cond, sizes):
        super().check(cond, sizes)
        vector, ids = cond["pooled"].shape[-1], cond["time_ids"].shape[-1] if self.id_features else 0
        if self.channels and vector + ids * self.id_features != self.channels:
            sum_of = f" and {ids} time ids of {self.id_features} sinusoids" if ids else ""
            made = f"but the network was made for channels={self.channels} in total."
            raise InvalidInput(f"cond['pooled'] has {vector} channels{sum_of}, {made}")

    def embed(self, cond, place):
        vector = cond["pooled"]
        if self.id_features:
            ids = timestep_embedding(cond["time_ids"], self.id_features).reshape(vector.shape[0], -1)
            vector = jnp.concatenate([vector.astype(jnp.float32), ids], axis=-1)
        layer = projection if self.layers == 1 else VectorEmbedding
        return {"vector": layer(place.width, name="pooled")(vector)}


def pooled(layers: int = 1, channels: int = 0, id_features: int = 0) -> Pooled:
    """One vector per sample, by 1 or 2 layers.

    id_features: sinusoids of each time id, which follow the vector (Podell et al. 2023, section 2.2); 0 for no ids.
    channels: of the vector and the sinusoids, where that is known; 0 takes what comes.
    """
    if layers not in (1, 2):
        raise invalid("layers", layers, "1 or 2 is needed")
    return Pooled(layers, _natural("channels", channels), _natural("id_features", id_features))


@dataclass(frozen=True)
class Sizes(ConditionStream):
    """See `sizes`."""

    keys = (CondKey("size", ("B", 2), jnp.number), CondKey("aspect", ("B",), jnp.number))

    def embed(self, cond, place):
        if place.width % 3:
            raise invalid("width", place.width, "with the condition sizes it must divide by 3")
        share = place.width // 3
        size = TimeEmbedding(share, name="size")(cond["size"].astype(jnp.float32))
        aspect = TimeEmbedding(share, name="aspect")(cond["aspect"].astype(jnp.float32))
        return {"vector": jnp.concatenate([size.reshape(-1, 2 * share), aspect], axis=-1)}

    def null(self, cond):
        return {name: jnp.asarray(value) for name, value in cond.items()}


def sizes() -> Sizes:
    """Size and aspect of the picture, a third of the width for each of the three numbers (PixArt-alpha)."""
    return Sizes()


@dataclass(frozen=True)
class GuidanceScale(ConditionStream):
    """See `guidance_scale`."""

    features: int

    keys = (CondKey("guidance_scale", ("B",), jnp.number),)
    enters = ("time",)

    def embed(self, cond, place):
        excess = 1000.0 * (cond["guidance_scale"].astype(jnp.float32) - 1.0)
        cosines, sines = jnp.split(timestep_embedding(excess, self.features, frequency_shift=1.0), 2, axis=-1)
        waves = jnp.concatenate([sines, cosines], axis=-1)
        return {"time": nn.Dense(place.time_features, use_bias=False, name="guidance")(waves)}

    def null(self, cond):
        return {name: jnp.asarray(value) for name, value in cond.items()}


def guidance_scale(features: int) -> GuidanceScale:
    """The scale of guidance, for a network that was distilled from guided answers (Meng et al. 2023, section 3).

    It is 1 for none, as everywhere here. features: sinusoids of 1000 times what it exceeds 1 by, which a linear layer
    takes to those of the time (Luo et al. 2023, latent consistency models).
    """
    if _positive("features", features) % 2 or features < 4:
        raise invalid("features", features, "an even number from 4 up is needed")
    return GuidanceScale(features)


@dataclass(frozen=True)
class TargetTime(ConditionStream):
    """See `target_time`."""

    step: bool = False

    keys = (CondKey("target_time"),)

    def check(self, cond, sizes):
        target = cond["target_time"]
        if np.ndim(target) < 1 or np.shape(target)[0] != sizes.get("B", np.shape(target)[0]):
            shape = f"{np.shape(target)} for a batch of {sizes.get('B', '?')}"
            raise invalid("the shape of cond['target_time']", shape, "a time [B, ...] of the shape of t is needed")

    def embed(self, cond, place):
        target = place.times(cond["target_time"].astype(jnp.float32))
        told = place.t - target if self.step else target
        return {"vector": TimeEmbedding(place.width, place.time_features, name="target_time")(told)}

    def null(self, cond):
        return {name: jnp.asarray(value) for name, value in cond.items()}


def target_time(step: bool = False) -> TargetTime:
    """The time to which the answer jumps, for networks of two times: flow maps, consistency trajectories, shortcuts.

    step: whether the length t - target of the jump is embedded in the place of the target (Geng et al. 2025 compare
        both for mean flows; Frans et al. 2024 embed the length).
    """
    return TargetTime(step)


@dataclass(frozen=True)
class Context(ConditionStream):
    """See `context`."""

    projection: str = "linear"
    channels: int = 0

    enters = ("context",)

    @property
    def keys(self):
        mask = CondKey("context_mask", ("B", "M"), jnp.generic, optional=True)
        return CondKey("context", ("B", "M", self.channels or "C")), mask

    def embed(self, cond, place):
        values, layer = cond["context"], partial(projection, place.width, dtype=place.dtype)
        if self.projection == "linear":
            values = layer_norm(layer(name="context")(values))
        elif self.projection == "mlp":
            values = layer(name="context_down")(jax.nn.gelu(layer(name="context_up")(values.astype(place.dtype))))
        return {"context": Attended(values, cond.get("context_mask"), self.projection == "linear")}


def context(projection: str = "linear", channels: int = 0) -> Context:
    """A sequence to attend to.

    projection: "linear" and a norm, behind a learned token; "mlp", linear, GELU and linear (PixArt-alpha); "none", it
        is attended to as it is (Stable Diffusion; the caller then says what "no condition" is).
    channels: of the sequence, where that is known; 0 takes what comes.
    """
    if projection not in PROJECTIONS:
        raise unknown("projection", projection, PROJECTIONS)
    return Context(projection, _natural("channels", channels))


class TextEncoder(nn.Module):
    """A small bidirectional transformer over tokens, trained with the model: `[B, M]` int to `[B, M, width]`."""

    vocab_size: int
    width: int
    depth: int = 2
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, mask):
        h = LookupTable(self.vocab_size, self.width, name="embed")(tokens).astype(self.dtype)
        # The blocks want a conditioning vector; text has no time, so it is one learned vector for all.
        style = self.param("style", nn.initializers.normal(0.02), (self.width,))
        c = jnp.broadcast_to(style, (tokens.shape[0], self.width)).astype(self.dtype)
        angles = rotary_angles(grid_positions(tokens.shape[1]), self.width // self.heads)
        branches = (
            ("attention", partial(AttentionBranch, self.heads, dtype=self.dtype)),
            ("mlp", partial(MlpBranch, dtype=self.dtype)),
        )
        h = Stack(branches, self.depth, name="blocks")(h, c, Side(mask=mask, rotary=jnp.asarray(angles)))
        return layer_norm(h)


@dataclass(frozen=True)
class Text(ConditionStream):
    """See `text`."""

    vocab_size: int
    depth: int = 2
    heads: int = 4

    keys = (
        CondKey("tokens", ("B", "M"), jnp.integer),
        CondKey("tokens_mask", ("B", "M"), jnp.generic, optional=True),
    )
    enters = ("context", "vector")

    def check(self, cond, sizes):
        super().check(cond, sizes)
        check_numbers("cond['tokens']", cond["tokens"], self.vocab_size)

    def embed(self, cond, place):
        mask = full_mask(Attended(cond["tokens"], cond.get("tokens_mask")))
        encoder = TextEncoder(self.vocab_size, place.width, self.depth, self.heads, place.dtype, name="text")
        encoded = encoder(cond["tokens"], nonempty(mask))
        weights = mask.astype(jnp.float32)[..., None]
        mean = (encoded * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)
        return {"vector": projection(place.width, name="text_pooled")(mean), "context": Attended(encoded, mask)}


def text(vocab_size: int, depth: int = 2, heads: int = 4) -> Text:
    """Tokens through an encoder that is trained along, attended to behind a learned token; their mean modulates."""
    return Text(*map(_positive, ("vocab_size", "depth", "heads"), (vocab_size, depth, heads)))


@dataclass(frozen=True)
class Concat(ConditionStream):
    """See `concat`."""

    channels: int = 0

    enters = ("channels",)

    @property
    def keys(self):
        return (CondKey("concat", ("*x", self.channels or "C")),)

    def embed(self, cond, place):
        return {"channels": cond["concat"]}


def concat(channels: int = 0) -> Concat:
    """Channels that join those of x. channels: how many, where that is known; 0 takes what comes."""
    return Concat(_natural("channels", channels))


@dataclass(frozen=True)
class Audio(ConditionStream):
    """See `audio`."""

    keys = (CondKey("audio"),)
    enters = ("audio",)

    def embed(self, cond, place):
        audio, frames = cond["audio"], place.shape[:2]
        audio = audio[:, :, None] if audio.ndim == 3 else audio
        if audio.ndim != 4 or audio.shape[:2] != frames:
            expected = f"features of each frame, [{frames[0]}, {frames[1]}, M, C], fit"
            raise invalid("cond['audio'].shape", audio.shape, expected)
        return {"audio": audio}


def audio() -> Audio:
    """What each frame of a clip hears: an `audio_attention` branch from the frame to its own features (`video_dit`)."""
    return Audio()


@dataclass(frozen=True)
class Reference(ConditionStream):
    """See `reference`."""

    at: float = -1.0

    keys = (CondKey("reference", optional=True),)
    enters = ("reference",)

    def frames(self, cond, shape):
        """The frames `[B, R, H, W, C]` that `cond` has, or None. shape: of the clip."""
        if cond is None or cond.get("reference") is None:
            return None
        value = jnp.asarray(cond["reference"])
        value = value[:, None] if value.ndim == 4 else value
        one = (shape[0], *shape[2:])
        if value.ndim != 5 or (value.shape[0], *value.shape[2:]) != one:
            expected = f"{one} is needed, or several such frames along a second axis"
            raise invalid("cond['reference'].shape", value.shape, expected)
        return value

    def embed(self, cond, place):
        return {}


def reference(at: float = -1.0) -> Reference:
    """Clean frames at time 0 before a clip, which all frames see and which see only themselves (`video_dit`).

    at: the temporal position of the first.
    """
    return Reference(at)


def _positive(name, value):
    if not isinstance(value, int) or value < 1:
        raise invalid(name, value, "it must be a positive integer")
    return value


def _natural(name, value):
    if not isinstance(value, int) or value < 0:
        raise invalid(name, value, "it must not be negative")
    return value
