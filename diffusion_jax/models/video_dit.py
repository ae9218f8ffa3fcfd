"""Diffusion transformers on clips `[B, F, H, W, C]`, every frame at its own time.

One network whose fields cover factorised space-time attention (Latte, Ma et al. 2024; FVDM, Liu et al. 2024) and joint
attention over all tokens (Wan), bidirectional or causal over frames or blocks of frames (Sun et al. 2025; Live Avatar).
A time `[B]` is every frame's, so a network of scalar times is this one: neither parameters nor arithmetic differ.
Decoding block by block with kept keys and values is in `incremental`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.anatomy import transformer_anatomy
from diffusion_jax.models.conditions import Reference
from diffusion_jax.models.dit import parse_preset, patch_times, patchify, unpatchify
from diffusion_jax.models.layers.branches import CrossAttentionBranch, MlpBranch, NamedBranch, Stack, modulated_output
from diffusion_jax.models.layers.conditioning import ConditionEncoder, ConditionStream, find_stream
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import grid_positions, image_positions, rotary_angles, sincos_positions
from diffusion_jax.models.layers.temporal import (
    AudioAttentionBranch,
    Frames,
    JointAttentionBranch,
    SpatialAttentionBranch,
    TemporalAttentionBranch,
    frame_mask,
)
from diffusion_jax.models.network import check_transformer, make_module, network
from diffusion_jax.typing import Causal, Network

ATTENTIONS = ("factorised", "joint")
POSITIONS = ("sincos", "rotary")
TEMPORAL_POSITIONS = ("sincos", "rotary", "none")


class VideoDiT(nn.Module):
    """Predicts a clip-shaped output from `x [B, F, H, W, C]`, `t` and `cond`.

    t: `[B]`, `[B, F]` per frame, or `[B, F, H]` or `[B, F, H, W]`, of which patches take the mean.
    patch, width, depth, heads, mlp_ratio: the size; see `dit.SIZES`. depth counts transformer blocks: of the factorised
        network half are spatial and half temporal, alternating, so it is even.
    attention: "factorised": within each frame (`attention`, `mlp`), then over the frames at each place
        (`temporal_attention`, `temporal_mlp`); or "joint": over all tokens of the clip (`attention`, `mlp`).
    temporal_mlp: False leaves `temporal_mlp` out, so that two blocks share one feed-forward layer.
    block, window: which frames see which; see `layers.temporal.frame_mask`. block 0 is bidirectional.
    positions: of patches, "sincos" or "rotary". temporal_positions: of frames, "sincos" (added once), "rotary" (of the
        queries and keys that meet over time), or "none": then frames are a set. Factorised attention turns spatial and
        temporal queries apart; joint attention shares the pairs of channels out among (frame, row, column).
    conditions: see `layers.conditioning`; a sequence among them means a `cross_attention` branch, `audio` an
        `audio_attention` branch from each frame to its own features and to a learned token, which is all that
        references hear, and `reference` frames before the clip, marked by a learned vector.
    learn_sigma: a second set of output channels, reported as `extras["log_variance"]`.
    qk_norm, swiglu, remat, scan, dtype: as in `DiT`.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    attention: str = "factorised"
    temporal_mlp: bool = True
    block: int = 0
    window: int = 0
    positions: str = "sincos"
    temporal_positions: str = "sincos"
    conditions: tuple[ConditionStream, ...] = ()
    learn_sigma: bool = False
    qk_norm: bool = False
    swiglu: bool = False
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    takes = ("vector", "context", "channels", "layers", "audio", "reference")

    @property
    def stack_depth(self) -> int:
        """Blocks of the stack; a factorised one is a spatial and a temporal half."""
        return self.depth // 2 if self.attention == "factorised" else self.depth

    @nn.compact
    def __call__(self, x, t, cond, train):
        dtype = jnp.dtype(self.dtype)
        batch, frames, height, width, channels = _checked(x, self.patch)
        stream = find_stream(self.conditions, Reference)
        before = stream and stream.frames(cond, x.shape)
        references = 0 if before is None else before.shape[1]

        def times(t):
            t = self._times(t, x.shape)
            return jnp.concatenate([jnp.zeros((batch, references, *t.shape[2:]), t.dtype), t], axis=1)

        encoder = ConditionEncoder(self.width, self.conditions, self.stack_depth, dtype, name="condition")
        conditioned = encoder(t, cond, x.shape, times)
        vector, x = conditioned.vector, conditioned.join_channels(x)
        if before is not None:
            before = jnp.pad(before, [(0, 0)] * 4 + [(0, x.shape[-1] - channels)])
            x = jnp.concatenate([before.astype(x.dtype), x], axis=1)

        h, rotary, temporal_rotary = self._tokens(x, references, dtype)
        sound, sound_mask = self._audio(conditioned.own.get("audio"), references, dtype)
        mask = frame_mask(frames, self.block, self.window, references)
        side = conditioned.side(h, rotary=rotary, frames=Frames(mask, temporal_rotary, sound, sound_mask))
        branches = conditioned.block_branches(self._branches(conditioned.context is not None, sound is not None, dtype))
        h = Stack(branches, self.stack_depth, self.remat, self.scan, name="blocks")(h, vector, side)

        features = self.patch**2 * channels * (2 if self.learn_sigma else 1)
        h, vector = h[:, references:], vector[:, references:]
        h = modulated_output(h, vector, features, dtype).astype(jnp.float32)
        y = unpatchify(h.reshape(batch * frames, *h.shape[2:]), self.patch, height, width)
        y = y.reshape(batch, frames, *y.shape[1:])
        if not self.learn_sigma:
            return y, {}
        return y[..., :channels], {"log_variance": y[..., channels:]}

    def _branches(self, crossed, hearing, dtype):
        attend = {"heads": self.heads, "qk_norm": self.qk_norm, "dtype": dtype}
        mlp = partial(MlpBranch, self.mlp_ratio, self.swiglu, dtype)
        factorised = self.attention == "factorised"
        branches: list[NamedBranch] = [
            ("attention", partial(SpatialAttentionBranch if factorised else JointAttentionBranch, **attend))
        ]
        if crossed:
            branches.append(("cross_attention", partial(CrossAttentionBranch, **attend)))
        if hearing:
            branches.append(("audio_attention", partial(AudioAttentionBranch, **attend)))
        branches.append(("mlp", mlp))
        if factorised:
            branches.append(("temporal_attention", partial(TemporalAttentionBranch, **attend)))
            if self.temporal_mlp:
                branches.append(("temporal_mlp", mlp))
        return tuple(branches)

    def _times(self, t, shape):
        """A time for every frame `[B, F]`, or for every patch `[B, F, N]`."""
        batch, frames, height, width, _ = shape
        if t.ndim == 1:
            t = jnp.broadcast_to(t[:, None], (t.shape[0], frames))
        if t.ndim > 4 or t.shape != shape[: t.ndim]:
            raise invalid("t.shape", t.shape, f"a clip of shape {shape} takes a prefix of it, of one to four axes")
        if t.ndim == 2:
            return t
        return patch_times(t.reshape(batch * frames, *t.shape[2:]), self.patch, height, width).reshape(
            batch, frames, -1
        )

    def _tokens(self, x, references, dtype):
        """`(h [B, F, N, width], rotary, temporal rotary)`: patches with what is added, and the angles of the rest."""
        batch, frames, height, width, channels = x.shape
        rows, columns = height // self.patch, width // self.patch
        h = patchify(x.astype(dtype).reshape(batch * frames, height, width, channels), self.patch)
        h = projection(self.width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name="patch_embed")(h)
        h = h.reshape(batch, frames, rows * columns, self.width)
        stream = find_stream(self.conditions, Reference)
        if stream is not None:
            mark = self.param("reference_mark", nn.initializers.normal(0.02), (self.width,)).astype(dtype)
            h = h.at[:, :references].add(mark)

        first = stream.at if stream is not None else 0.0
        where = np.concatenate([first + np.arange(references), np.arange(frames - references)])
        where = where.astype(np.float32)[:, None]
        if self.temporal_positions == "sincos":
            h = h + jnp.asarray(sincos_positions(where, self.width), dtype)[:, None]
        if self.positions == "sincos":
            h = h + jnp.asarray(sincos_positions(image_positions(rows, columns), self.width), dtype)

        head = self.width // self.heads
        space = grid_positions(rows, columns) if self.positions == "rotary" else None
        time = where if self.temporal_positions == "rotary" else None
        if self.attention == "factorised":
            return h, _angles(space, head), _angles(time, head)
        parts = []
        if time is not None:
            parts.append(np.repeat(time, rows * columns, axis=0))
        if space is not None:
            parts.append(np.tile(space, (frames, 1)))
        return h, _angles(np.concatenate(parts, axis=-1) if parts else None, head), None

    def _audio(self, audio, references, dtype):
        """`(audio [B, F, 1 + M, width], mask [F, 1 + M] or None)`, the references' frames included."""
        if audio is None:
            return None, None
        batch, frames, count, _ = audio.shape
        sound = projection(self.width, dtype=dtype, name="audio_up")(audio)
        sound = projection(self.width, dtype=dtype, name="audio_down")(jax.nn.gelu(sound))
        sound = sound + jnp.asarray(sincos_positions(grid_positions(count), self.width), dtype)
        sound = jnp.pad(sound, [(0, 0), (references, 0), (0, 0), (0, 0)])
        null = self.param("audio_null", nn.initializers.normal(0.02), (self.width,)).astype(dtype)
        null = jnp.broadcast_to(null, (batch, references + frames, 1, self.width))
        mask = None
        if references:
            mask = np.ones((references + frames, 1 + count), bool)
            mask[:references, 1:] = False
        return jnp.concatenate([null, sound], axis=2), mask


def _angles(positions, features):
    return None if positions is None else jnp.asarray(rotary_angles(positions, features))


def _checked(x, patch):
    if x.ndim != 5:
        raise invalid("x.shape", x.shape, "clips [B, F, H, W, C] are needed")
    if x.shape[2] % patch or x.shape[3] % patch:
        raise invalid("x.shape", x.shape, f"height and width must divide by the patch, {patch}")
    return x.shape


def video_dit(preset: str = "S/2", **fields) -> Network:
    """A diffusion transformer on clips: a preset ("S/2" .. "XL/8"), and any fields of `VideoDiT` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    module = make_module(VideoDiT, "video_dit", parse_preset(preset), fields)
    check_transformer(module)
    _check_fields(module)
    joint = module.attention == "joint"
    fields = {"axes": 5, "entrance": "patch_embed", "patch": module.patch, "depth": module.stack_depth}
    reference = find_stream(module.conditions, Reference)
    causal = Causal(
        f"blocks/block/{'attention' if joint else 'temporal_attention'}/attention/attend",
        module.block,
        module.window,
        module.temporal_positions,
        3 if joint and module.positions == "rotary" else 1,
        reference.at if reference else 0.0,
        module.patch * joint,
    )
    return network(module, transformer_anatomy(module, **fields, causal=causal if module.block else None))


def _check_fields(module):
    if module.patch < 1:
        raise invalid("patch", module.patch, "it must be positive")
    choices = {"attention": ATTENTIONS, "positions": POSITIONS, "temporal_positions": TEMPORAL_POSITIONS}
    for name, valid in choices.items():
        if getattr(module, name) not in valid:
            raise unknown(name, getattr(module, name), valid)
    if module.attention == "factorised" and module.depth % 2:
        raise invalid("depth", module.depth, "half of the blocks are temporal, so it must be even")
    frame_mask(max(module.block, 1), module.block, module.window)
