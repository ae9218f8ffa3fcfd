"""One transformer over all parts of joint data, each part with its own time: `{"image": ..., "text": ...}` in and out.

A part ("modality") is cut into patches; the tokens of all parts form one sequence and see each other. How the times
enter is a choice: each token modulated by its own (adaLN), tokens that tell the times (UniDiffuser, Bao et al. 2023),
or one vector of all times that modulates all tokens (UWM, Zhu et al. 2025; SDP). Networks of one array of images or of
discrete text are in `dit` and `text_transformer`; the roles that parts play in a run are grids, see `timesteps.roles`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.anatomy import transformer_anatomy
from diffusion_jax.models.dit import SIZES
from diffusion_jax.models.layers.branches import (
    CrossAttentionBranch,
    SkipBranch,
    Stack,
    transformer_branches,
)
from diffusion_jax.models.layers.conditioning import ConditionEncoder, ConditionStream
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import LookupTable, grid_positions, sincos_positions
from diffusion_jax.models.layers.modulation import Modulation, modulate
from diffusion_jax.models.layers.norms import layer_norm
from diffusion_jax.models.layers.patches import from_patches, times_of_patches, to_patches
from diffusion_jax.models.layers.prenorm import PreNormAttention, PreNormMlp, affine_norm
from diffusion_jax.models.network import check_transformer, chosen, make_module, network
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Network

TIMES = ("adaln", "joined", "global", "tokens")
"""How times enter. "adaln": each token is modulated by its own part's time, which may differ from token to token.
"joined": all tokens by one vector, made of the times of all of them in their order, so that a time for each costs what
one for all does (Høeg et al. 2024, SDP). "global": all tokens by one vector of all parts' times. "tokens": one token in
the sequence tells each part's time, and blocks are plain. The last two take one time per part and sample."""

POSITIONS = ("learned", "sincos")

PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"width": width, "depth": depth, "heads": heads} for name, (width, depth, heads) in SIZES.items()},
    "unidiffuser": {"width": 1536, "depth": 31, "heads": 24, "times": "tokens", "skips": True},
    "uwm": {"width": 768, "depth": 12, "heads": 12, "times": "global", "registers": 8},
}
"""Sizes of `dit`, and those of Bao et al. 2023 (U-ViT with 30 blocks around a middle one) and Zhu et al. 2025."""

Patch = tuple[int, ...] | int


class Part(NamedTuple):
    """A modality within the sequence. sizes: of its axes between batch and channels. features: of the output.

    vocab_size: of what consists of tokens, whose patch is `(1,)`; else 0.
    """

    name: str
    patch: tuple[int, ...]
    sizes: tuple[int, ...]
    features: int
    vocab_size: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return math.prod(self.grid)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many patches there are along each axis."""
        return tuple(size // p for size, p in zip(self.sizes, self.patch, strict=True))

    @property
    def entry(self) -> str:
        """What its parameters are called by."""
        return self.name or "data"


class JointTransformer(nn.Module):
    """Predicts for each part of `x` what has its shape (logits for discrete parts), from x, times and `cond`.

    modalities: `(name, patch)` pairs, or one pair with the name "" for data that is one array. The patch of a part has
        one size for each axis between batch and channels: `(2, 2)` for images `[B, H, W, C]`, `(1, 4, 4)` for clips,
        `(1,)` for actions or embeddings `[B, N, C]`, `()` for vectors `[B, C]`. A number is the vocabulary V of tokens
        `[B, N]`, with id V as the absorbing mask and logits `[B, N, V]`.
    times: a key of `TIMES`. Times are a dict like x, each `[B]` or with "adaln" and "joined" a prefix of the part's
        shape (a time per frame, per action, per pixel; patches take the mean); one array serves all parts. "joined" is
        bound to the number of tokens.
    registers: learned tokens without an output (Darcet et al. 2024), whose time is 0.
    skips: long skip connections from block i to block depth - 1 - i (Bao et al. 2022, U-ViT).
    positions: of each part's tokens: "learned" (bound to its sizes) or "sincos" (fixed).
    conditions: see `layers.conditioning`. Vectors join the times.
    width, depth, heads, mlp_ratio, qk_norm, swiglu, remat, scan, dtype: see `DiT`.
    """

    modalities: tuple[tuple[str, Patch], ...]
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    times: str = "adaln"
    registers: int = 0
    skips: bool = False
    positions: str = "learned"
    qk_norm: bool = False
    swiglu: bool = False
    conditions: tuple[ConditionStream, ...] = ()
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    takes = ("vector", "context", "tokens", "layers")

    @nn.compact
    def __call__(self, x, t, cond, train):
        dtype = jnp.dtype(self.dtype)
        x, t = self._named(x, t)
        parts = [_part(name, patch, x[name]) for name, patch in self.modalities]
        sequence = [self._embedded(part, x[part.name], dtype) for part in parts]
        times, lengths = self._times(parts, t)
        total = sum(part.tokens for part in parts)
        encoder = ConditionEncoder(self.width, self.conditions, self.depth, dtype, name="condition")
        conditioned = encoder(times, cond, (times.shape[0], total, self.width))
        c = conditioned.vector
        if self.registers:
            sequence.append(self._learned("registers", self.registers, c.shape[0], dtype))
        if self.times == "tokens":
            sequence.append(c + self._learned("time_positions", len(parts), c.shape[0], dtype))
        elif self.times in ("joined", "global"):
            c = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=dtype, name="all_times")(c)

        h, vectors, _, joined = conditioned.prepend_tokens(jnp.concatenate(sequence, axis=1), c)
        h = self._blocks(h, vectors, (1,) * joined + lengths, conditioned, dtype)
        h = self._normed(h[:, joined : joined + total], c, lengths, dtype)
        output, first = {}, 0
        for part in parts:
            zero = nn.initializers.zeros
            head = projection(part.features, dtype=dtype, kernel_init=zero, name=f"head_{part.entry}")
            y = head(h[:, first : first + part.tokens]).astype(jnp.float32)
            output[part.name] = y if part.vocab_size else from_patches(y, part.patch, part.sizes)
            first += part.tokens
        return (output[""] if self._single else output), {}

    @property
    def _single(self):
        return [name for name, _ in self.modalities] == [""]

    def _named(self, x, t):
        """Data and full times by part."""
        if self._single:
            if isinstance(x, Mapping):
                raise InvalidInput(f"x has the parts {sorted(x)}, but modalities={self.modalities[0][1]} is one array.")
            return {"": x}, {"": fill(t, x)}
        names = {name for name, _ in self.modalities}
        for field, value in (("x", x), ("t", t)):
            if isinstance(value, Mapping) and set(value) != names:
                raise InvalidInput(f"{field} has the parts {sorted(value)}, but the network has {sorted(names)}.")
        if not isinstance(x, Mapping):
            raise InvalidInput(f"x is one array, but the network needs a dict of {sorted(names)}.")
        return dict(x), fill(t, dict(x))

    def _embedded(self, part, x, dtype):
        """The tokens of a part, `[B, N, width]`, with their positions."""
        if part.vocab_size:
            init = nn.initializers.normal(0.02)
            embed = LookupTable(part.vocab_size + 1, self.width, embedding_init=init, name=f"embed_{part.entry}")
            h = embed(x).astype(dtype)
        else:
            init = nn.initializers.xavier_uniform()
            embed = projection(self.width, dtype=dtype, kernel_init=init, name=f"embed_{part.entry}")
            h = embed(to_patches(x.astype(dtype), part.patch))
        if self.positions == "learned":
            return h + self._learned(f"positions_{part.entry}", part.tokens, x.shape[0], dtype)
        if not part.grid:
            return h
        return h + jnp.asarray(sincos_positions(grid_positions(*part.grid), self.width), dtype)

    def _learned(self, name, count, batch, dtype):
        """Learned vectors `[B, count, width]`, one for each place."""
        if self.has_variable("params", name) and (there := self.get_variable("params", name).shape[0]) != count:
            raise InvalidInput(
                f"{name} are learned for {there} tokens, but there are {count}; positions='sincos' takes any number."
            )
        vectors = self.param(name, nn.initializers.normal(0.02), (count, self.width))
        return jnp.broadcast_to(vectors.astype(dtype), (batch, count, self.width))

    def _times(self, parts, t):
        """`(times [B, S], lengths)`: the different times of the sequence, and how many tokens each of them has."""
        times, lengths = [], []
        for part in parts:
            own = t[part.name]
            if self.times not in ("adaln", "joined") and own.ndim > 1:
                field = f"t[{part.name!r}].shape" if part.name else "t.shape"
                raise invalid(field, own.shape, f"times={self.times!r} takes one time per sample, [B]; use 'adaln'")
            own = times_of_patches(own, part.patch, part.sizes)
            if self.times == "joined" and own.ndim == 1:
                own = jnp.broadcast_to(own[:, None], (own.shape[0], part.tokens))
            times.append(own.reshape(own.shape[0], -1))
            lengths += [part.tokens] if own.ndim == 1 else [1] * part.tokens
        if self.times == "adaln" and self.registers:
            times.append(jnp.zeros_like(times[0][:, :1]))
            lengths.append(self.registers)
        return jnp.concatenate(times, axis=1), tuple(lengths)

    def _blocks(self, h, c, lengths, conditioned, dtype):
        branches = self._branches(lengths, conditioned.context is not None, dtype)
        branches, side = conditioned.block_branches(branches), conditioned.side(h)
        if not self.skips:
            return Stack(branches, self.depth, self.remat, self.scan, name="blocks")(h, c, side)
        half = self.depth // 2
        layers = (None, None) if side.layers is None else jnp.split(side.layers, [self.depth - half])
        first = Stack(branches, self.depth - half, self.remat, self.scan, keep=True, name="blocks")
        h, every = first(h, c, side._replace(layers=layers[0]))
        branches = (("skip", partial(SkipBranch, dtype)), *branches)
        second = Stack(branches, half, self.remat, self.scan, name="skip_blocks")
        return second(h, c, side._replace(skip=every[:half][::-1], layers=layers[1]))

    def _branches(self, lengths, crossed, dtype):
        if self.times != "tokens":
            modulation = self._modulation(lengths)
            return transformer_branches(
                self.heads, self.qk_norm, self.mlp_ratio, self.swiglu, dtype, crossed, modulation=modulation
            )
        hidden = int(self.width * self.mlp_ratio)
        attention = partial(PreNormAttention, heads=self.heads, qk_norm=self.qk_norm, dtype=dtype)
        cross = partial(CrossAttentionBranch, self.heads, self.qk_norm, dtype, plain=True)
        mlp = partial(PreNormMlp, hidden=hidden, activation="gelu_tanh", dtype=dtype)
        return (("attention", attention), *((("cross_attention", cross),) if crossed else ()), ("mlp", mlp))

    def _modulation(self, lengths):
        return partial(Modulation, lengths=lengths) if self.times == "adaln" else Modulation

    def _normed(self, h, c, lengths, dtype):
        """What the heads read: the stream behind a norm that is modulated as those of the blocks are."""
        if self.times == "tokens":
            return affine_norm("layer", 1e-6, dtype, name="final_norm")(h)
        if self.times == "adaln" and self.registers:
            c, lengths = c[:, :-1], lengths[:-1]
        shift, scale = self._modulation(lengths)(self.width, 2, dtype, name="final_modulation")(c)
        return modulate(layer_norm(h), shift, scale)


def _part(name, patch, x):
    field = f"x[{name!r}]" if name else "x"
    if isinstance(patch, int):
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise invalid(field, f"{x.dtype}{list(x.shape)}", "integer tokens [B, N] are needed")
        return Part(name, (1,), tuple(x.shape[1:]), patch, patch)
    if x.ndim != len(patch) + 2:
        raise invalid(
            f"{field}.shape", x.shape, f"its patch {patch} means {len(patch) + 2} axes, batch and channels too"
        )
    sizes = tuple(x.shape[1:-1])
    if any(size % p for size, p in zip(sizes, patch, strict=True)):
        raise invalid(f"{field}.shape", x.shape, f"its axes must divide by the patch {patch}")
    return Part(name, patch, sizes, math.prod(patch) * x.shape[-1])


def joint_transformer(
    modalities: Mapping[str, Sequence[int] | int] | Sequence[int], preset: str = "S", **fields
) -> Network:
    """A transformer over joint data: each modality's patch, a preset of `PRESETS`, and fields of `JointTransformer`.

        joint_transformer({"image": (2, 2), "text": (1,)}, "unidiffuser", width=128, depth=9, heads=4)
        joint_transformer({"action": (1,), "future": (2, 4, 4)}, "uwm", conditions=(pooled(),))
        joint_transformer((1,), "S", conditions=(pooled(),))   # one array [B, T, A]: actions with a time each (SDP)

    The order of modalities does not matter. Raises InvalidInput for a preset, field or value that does not exist.
    """
    module = make_module(
        JointTransformer, "joint_transformer", chosen(preset, PRESETS), fields, _modalities(modalities)
    )
    check_transformer(module)
    for name, valid in (("times", TIMES), ("positions", POSITIONS)):
        if getattr(module, name) not in valid:
            raise unknown(name, getattr(module, name), valid)
    if module.registers < 0:
        raise invalid("registers", module.registers, "it must not be negative")
    if module.skips and module.depth < 2:
        raise invalid("depth", module.depth, "long skip connections need at least 2 blocks")
    if module.swiglu and module.times == "tokens":
        raise invalid("swiglu", True, "with times='tokens' blocks are plain; it must be False")
    # Long skip connections leave no place for a cut, and each part has an entrance and a last layer of its own.
    stack = {"stack": "", "depth": 0} if module.skips else {}
    return network(module, transformer_anatomy(module, last=(), **stack))


def _modalities(given):
    parts = given if isinstance(given, Mapping) else {"": given}
    if not parts:
        raise invalid("modalities", given, "at least one modality is needed")
    result = []
    for name, patch in sorted(parts.items()):
        field = f"modalities[{name!r}]" if name else "modalities"
        if isinstance(patch, int):
            if patch < 2:
                raise invalid(field, patch, "a vocabulary of at least 2 tokens, or a patch, is needed")
            result.append((name, patch))
            continue
        if any(not isinstance(size, int) or size < 1 for size in patch):
            raise invalid(field, patch, "a patch has one positive size for each axis between batch and channels")
        result.append((name, tuple(patch)))
    return tuple(result)
