"""Diffusion transformer: patches, adaLN-Zero blocks of named branches, patches back (Peebles & Xie 2023)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.layers.branches import Side, Stack, modulated_output, transformer_branches
from diffusion_jax.models.layers.conditioning import ConditionEncoder
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import grid_positions, rotary_angles, sincos_positions
from diffusion_jax.models.network import check_transformer, network
from diffusion_jax.typing import Network

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads of Peebles & Xie 2023, table 1."""

PATCHES = (1, 2, 4, 8)
POSITIONS = ("sincos", "learned", "rotary")


def patchify(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N K"]:
    """Non-overlapping patches in row-major order, `K = patch^2 C`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(x: Float[Array, "B N K"], patch: int, height: int, width: int) -> Float[Array, "B H W C"]:
    """The inverse of `patchify` for an image of `height` by `width`."""
    x = x.reshape(x.shape[0], height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)


def patch_times(t: Float[Array, "*prefix"], patch: int, height: int, width: int) -> Float[Array, "B *tokens"]:
    """A time per sample `[B]` as it is; per row or per pixel as the mean in each patch, `[B, N]`."""
    if t.ndim == 1:
        return t
    if t.shape[1:] not in ((height,), (height, width)):
        raise invalid(
            "t.shape", t.shape, f"an image of {height} x {width} takes [B], [B, {height}] or [B, {height}, {width}]"
        )
    pixels = jnp.broadcast_to(t.reshape(*t.shape, *(1,) * (3 - t.ndim)), (t.shape[0], height, width))
    return patchify(pixels[..., None], patch).mean(axis=-1)


class DiT(nn.Module):
    """Predicts an image-shaped output from `x [B, H, W, C]`, `t` (see `patch_times`) and `cond`.

    patch, width, depth, heads, mlp_ratio: the size; see `SIZES`.
    positions: "sincos" (fixed), "learned" (bound to one resolution), or "rotary" (of queries and keys, Su et al. 2021).
    qk_norm, swiglu: RMS-normalised queries and keys; SwiGLU instead of GELU.
    num_classes, pooled, context, text_vocab_size, text_depth: the conditions; see `ConditionEncoder`. With `context`
        or text there is a cross-attention branch.
    learn_sigma: a second set of output channels, reported as `extras["log_variance"]`.
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
    num_classes: int = 0
    pooled: bool = False
    context: bool = False
    text_vocab_size: int = 0
    text_depth: int = 2
    learn_sigma: bool = False
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, t, cond, train):
        dtype = jnp.dtype(self.dtype)
        _, height, width, channels = _checked(x, self.patch)
        rows, columns = height // self.patch, width // self.patch
        positions = grid_positions(rows, columns)

        h = patchify(x.astype(dtype), self.patch)
        h = projection(self.width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name="patch_embed")(h)
        rotary = None
        if self.positions == "rotary":
            rotary = jnp.asarray(rotary_angles(positions, self.width // self.heads))
        elif self.positions == "learned":
            h = h + self._learned(len(positions)).astype(dtype)
        else:
            h = h + jnp.asarray(sincos_positions(positions, self.width), dtype)

        t = patch_times(t, self.patch, height, width)
        encoder = ConditionEncoder(
            self.width,
            num_classes=self.num_classes,
            pooled=self.pooled,
            context=self.context,
            vocab_size=self.text_vocab_size,
            text_depth=self.text_depth,
            dtype=dtype,
            name="condition",
        )
        c, context, context_mask = encoder(t, cond)

        branches = transformer_branches(
            self.heads, self.qk_norm, self.mlp_ratio, self.swiglu, dtype, crossed=context is not None
        )
        stack = Stack(branches, self.depth, self.remat, self.scan, name="blocks")
        h = stack(h, c, Side(context, context_mask, None, rotary))

        features = self.patch**2 * channels * (2 if self.learn_sigma else 1)
        h = modulated_output(h, c, features, dtype)
        y = unpatchify(h.astype(jnp.float32), self.patch, height, width)
        if not self.learn_sigma:
            return y, {}
        return y[..., :channels], {"log_variance": y[..., channels:]}

    def _learned(self, count):
        if self.has_variable("params", "positions"):
            there = self.get_variable("params", "positions").shape[0]
            if there != count:
                raise InvalidInput(
                    f"positions='learned' was made for {there} patches, but the image has {count}; "
                    "use 'sincos' or 'rotary' to change the resolution."
                )
        return self.param("positions", nn.initializers.normal(0.02), (count, self.width))


def _checked(x, patch):
    if x.ndim != 4:
        raise invalid("x.shape", x.shape, "images [B, H, W, C] are needed")
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
    known = [name for name in DiT.__dataclass_fields__ if name not in ("parent", "name")]
    for name in fields:
        if name not in known:
            raise unknown("field of dit", name, known)
    module = DiT(**{**parse_preset(preset), **fields})
    check_transformer(module)
    for name in ("patch", "num_classes", "text_vocab_size"):
        if getattr(module, name) < (name == "patch"):
            raise invalid(
                name, getattr(module, name), "it must be positive" if name == "patch" else "it must not be negative"
            )
    if module.positions not in POSITIONS:
        raise unknown("positions", module.positions, POSITIONS)
    return network(module)
