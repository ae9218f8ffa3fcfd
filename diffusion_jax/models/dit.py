"""Diffusion transformers: patches, blocks of named branches, patches back.

One network whose fields cover DiT (Peebles & Xie 2023), SiT (Ma et al. 2024: the same network on a flow process) and
PixArt-alpha and -Sigma (Chen et al. 2023, 2024).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.anatomy import transformer_anatomy
from diffusion_jax.models.conditions import context
from diffusion_jax.models.layers.branches import Stack, modulated_output, transformer_branches
from diffusion_jax.models.layers.conditioning import ConditionEncoder, ConditionStream, check_streams
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import grid_positions, image_positions, rotary_angles, sincos_positions
from diffusion_jax.models.layers.modulation import TableModulation
from diffusion_jax.models.layers.patches import from_patches, times_of_patches, to_patches
from diffusion_jax.models.network import check_transformer, make_module, network
from diffusion_jax.typing import Network

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of Peebles & Xie 2023, table 1."""

PATCHES = (1, 2, 4, 8)
POSITIONS = ("sincos", "learned", "rotary")
MODULATIONS = ("block", "single")
EMBEDDINGS = ("shared", "per_block")

PIXART = {"modulation": "single", "conditions": (context("mlp"),), "learn_sigma": True}
"""What a PixArt is among the diffusion transformers."""


def patchify(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N K"]:
    """Non-overlapping patches in row-major order, `K = patch^2 C`."""
    return to_patches(x, (patch, patch))


def unpatchify(x: Float[Array, "B N K"], patch: int, height: int, width: int) -> Float[Array, "B H W C"]:
    """The inverse of `patchify` for an image of `height` by `width`."""
    return from_patches(x, (patch, patch), (height, width))


def patch_times(t: Float[Array, "*prefix"], patch: int, height: int, width: int) -> Float[Array, "B *tokens"]:
    """A time per sample `[B]` as it is; per row or per pixel as the mean in each patch, `[B, N]`."""
    return times_of_patches(t, (patch, patch), (height, width))


class DiT(nn.Module):
    """Predicts an image-shaped output from `x [B, H, W, C]`, `t` (see `patch_times`) and `cond`.

    patch, width, depth, heads, mlp_ratio: the size; see `SIZES`.
    positions: "sincos" (fixed), "learned" (bound to one resolution), or "rotary" (of queries and keys, Su et al. 2021).
    qk_norm, swiglu: RMS-normalised queries and keys; SwiGLU instead of GELU.
    conditions: see `layers.conditioning`; a sequence among them means a cross-attention branch.
    frequency_shift: see `ConditionEncoder`.
    modulation: "block", each block's own matrix (adaLN-Zero), or "single", one matrix for all blocks and a table in
        each, and plain cross-attention (adaLN-single, Chen et al. 2023).
    embeddings: "shared", or "per_block": each block embeds time and conditions by weights of its own, and
        the output by those of the first (what the diffusers layout of DiT allows); conditions then enter by the vector.
    base_size, interpolation_scale: of the sinusoidal positions; see `image_positions`.
    qkv_bias: whether queries, keys and values have biases. norm_eps, mlp_norm_eps: of the norms before self-attention
        and before the feed-forward layer.
    learn_sigma: a second set of output channels, reported as `extras["log_variance"]`.
    in_channels: of x; 0 takes what comes. A checkpoint's are known.
    remat, scan: see `Stack`. dtype: compute dtype; parameters and the output are float32.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    positions: str = "sincos"
    qk_norm: bool = False
    swiglu: bool = False
    conditions: tuple[ConditionStream, ...] = ()
    learn_sigma: bool = False
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"
    frequency_shift: float = 0.0
    modulation: str = "block"
    embeddings: str = "shared"
    base_size: int = 0
    interpolation_scale: float = 1.0
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-6
    in_channels: int = 0

    takes = ("vector", "context", "tokens", "channels", "layers", "time")

    @nn.compact
    def __call__(self, x, t, cond, train):
        dtype = jnp.dtype(self.dtype)
        _, height, width, channels = _checked(x, self.patch, self.in_channels)
        rows, columns = height // self.patch, width // self.patch

        conditioned = self._conditioned(t, cond, x.shape, dtype)
        h = patchify(conditioned.join_channels(x.astype(dtype)), self.patch)
        h = projection(self.width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name="patch_embed")(h)
        rotary = None
        if self.positions == "rotary":
            rotary = jnp.asarray(rotary_angles(grid_positions(rows, columns), self.width // self.heads))
        elif self.positions == "learned":
            h = h + self._learned(rows * columns).astype(dtype)
        else:
            positions = image_positions(rows, columns, self.base_size, self.interpolation_scale)
            h = h + jnp.asarray(sincos_positions(positions, self.width), dtype)

        h, c, rotary, joined = conditioned.prepend_tokens(h, conditioned.vector, rotary)
        single = self.modulation == "single"
        branches = transformer_branches(
            self.heads,
            self.qk_norm,
            self.mlp_ratio,
            self.swiglu,
            dtype,
            conditioned.context is not None,
            qkv_bias=self.qkv_bias,
            eps=self.norm_eps,
            mlp_eps=self.mlp_norm_eps,
            single=single,
        )
        per_block = self.embeddings == "per_block"
        stack = Stack(conditioned.block_branches(branches), self.depth, self.remat, self.scan, per_block, name="blocks")
        # Where blocks share one modulation, the output layer takes what that was made of, as shift and as scale.
        given = projection(6 * self.width, dtype=dtype, name="modulation")(jax.nn.silu(c)) if single else c
        h = stack(h, given, conditioned.side(h, rotary=rotary))[:, joined:]

        c = conditioned.vector[0] if per_block else conditioned.vector
        last = jnp.concatenate([c, c], axis=-1) if single else c
        features = self.patch**2 * channels * (2 if self.learn_sigma else 1)
        h = modulated_output(h, last, features, dtype, *([TableModulation] if single else []))
        y = unpatchify(h.astype(jnp.float32), self.patch, height, width)
        if not self.learn_sigma:
            return y, {}
        return y[..., :channels], {"log_variance": y[..., channels:]}

    def _conditioned(self, t, cond, shape, dtype):
        """Its vector is `[depth, *prefix, width]` where each block has its own."""
        encoder = ConditionEncoder(
            self.width, self.conditions, self.depth, dtype, frequency_shift=self.frequency_shift, name="condition"
        )

        def times(t):
            return patch_times(t, self.patch, shape[1], shape[2])

        if self.embeddings == "shared":
            return encoder(t, cond, shape, times)
        each = nn.vmap(
            lambda encoder, t, cond: encoder(t, cond, shape, times),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]: flax shows its default
            axis_size=self.depth,
        )
        return each(encoder, t, cond)

    def _learned(self, count):
        if self.has_variable("params", "positions"):
            there = self.get_variable("params", "positions").shape[0]
            if there != count:
                raise InvalidInput(
                    f"positions='learned' was made for {there} patches, but the image has {count}; "
                    "use 'sincos' or 'rotary' to change the resolution."
                )
        return self.param("positions", nn.initializers.normal(0.02), (count, self.width))


def _checked(x, patch, channels):
    if x.ndim != 4:
        raise invalid("x.shape", x.shape, "images [B, H, W, C] are needed")
    if channels and x.shape[3] != channels:
        raise invalid("x.shape", x.shape, f"images of {channels} channels, [B, H, W, {channels}], are needed")
    if x.shape[1] % patch or x.shape[2] % patch:
        raise invalid("x.shape", x.shape, f"height and width must divide by the patch, {patch}")
    return x.shape


def parse_preset(preset: str) -> dict[str, int]:
    """`"XL/2"` as the fields of `DiT`: a size of `SIZES` and a patch of `PATCHES`."""
    valid = [f"{size}/{patch}" for size in SIZES for patch in PATCHES]
    if preset not in valid:
        raise unknown("preset", preset, valid)
    size, patch = preset.split("/")
    width, depth, heads = SIZES[size]
    return {"patch": int(patch), "width": width, "depth": depth, "heads": heads}


def dit(preset: str = "S/2", **fields) -> Network:
    """A diffusion transformer: a preset ("S/2" .. "XL/8"), and any fields of `DiT` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    module = make_module(DiT, "dit", parse_preset(preset), fields)
    check_transformer(module)
    _check_fields(module)
    entrance = {"axes": 4, "entrance": "patch_embed", "patch": module.patch}
    return network(module, transformer_anatomy(module, frequency_shift=module.frequency_shift, **entrance))


def pixart(preset: str = "XL/2", **fields) -> Network:
    """A PixArt-alpha (Chen et al. 2023) or PixArt-Sigma (Chen et al. 2024): `dit` with the fields of `PIXART`.

    `cond` is `{"context": [B, M, C], "context_mask": [B, M]}`, the states of a text encoder; the 1024-pixel alpha has
    `conditions=(context("mlp"), sizes())`, and so "size" and "aspect" too. Alpha at 256 and 512 pixels has base_size 16
    and 32; alpha and Sigma at 1024 have base_size 64 and interpolation_scale 2.
    Raises InvalidInput for a preset, field or value that does not exist.
    """
    return dit(preset, **{**PIXART, **fields})


def _check_fields(module):
    for name in ("patch", "base_size", "in_channels"):
        if getattr(module, name) < (name == "patch"):
            raise invalid(
                name, getattr(module, name), "it must be positive" if name == "patch" else "it must not be negative"
            )
    choices = {"positions": POSITIONS, "modulation": MODULATIONS, "embeddings": EMBEDDINGS}
    for name, valid in choices.items():
        if getattr(module, name) not in valid:
            raise unknown(name, getattr(module, name), valid)
    if module.interpolation_scale <= 0:
        raise invalid("interpolation_scale", module.interpolation_scale, "it must be positive")
    if module.embeddings == "per_block":
        check_streams("dit with embeddings='per_block'", module.conditions, ("vector",))
        if module.modulation == "single":
            raise invalid("embeddings", "per_block", "with modulation='single' it is 'shared'")
