"""Attention over the pixels of convolutional networks: unmodulated residual branches and the spatial transformer.

These branches normalise with parameters of their own; time and pooled conditions reach them through the residual
blocks between which they stand. The modulated ones of the transformers are in `layers.branches`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.layers.attention import Attention, key_mask
from diffusion_jax.models.layers.branches import Branch, Stack
from diffusion_jax.models.layers.convolution import conv
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.norms import GroupNorm


def _norm(groups: int, dtype: Any) -> nn.Module:
    if groups:
        return GroupNorm(groups, 1e-6, dtype=dtype, name="norm")
    return nn.LayerNorm(1e-5, dtype=dtype, name="norm")


class SpatialAttention(Branch):
    """`attention(norm(h))` among all pixels. groups: of the group norm, or 0 for a layer norm.

    qkv_bias: whether queries, keys and values have biases.
    """

    heads: int
    groups: int = 32
    zero_init: bool = False
    dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, h, c, side):
        y = _norm(self.groups, self.dtype)(h).reshape(h.shape[0], -1, h.shape[-1])
        attention = Attention(
            self.heads, dtype=self.dtype, zero_init=self.zero_init, qkv_bias=self.qkv_bias, name="attention"
        )
        return attention(y, y, key_mask(side.mask), side.rotary).reshape(h.shape)


class SpatialCrossAttention(Branch):
    """`attention(norm(h), context)`: every pixel attends to the context. The fields are those of `SpatialAttention`."""

    heads: int
    groups: int = 32
    zero_init: bool = False
    dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, h, c, side):
        y = _norm(self.groups, self.dtype)(h).reshape(h.shape[0], -1, h.shape[-1])
        attention = Attention(
            self.heads, dtype=self.dtype, zero_init=self.zero_init, qkv_bias=self.qkv_bias, name="attention"
        )
        return attention(y, side.context.astype(y.dtype), key_mask(side.context_mask), None).reshape(h.shape)


class SpatialMlp(Branch):
    """`down(gelu(gate(norm(h))) * up(norm(h)))`, GEGLU (Shazeer 2020); hidden width `ratio` times the width."""

    ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        y = _norm(0, self.dtype)(h)
        hidden = int(h.shape[-1] * self.ratio)
        gate = projection(hidden, dtype=self.dtype, name="gate")(y)
        y = projection(hidden, dtype=self.dtype, name="up")(y) * jax.nn.gelu(gate, approximate=False)
        return projection(h.shape[-1], dtype=self.dtype, name="down")(y)


class PixelAttention(nn.Module):
    """`depth` blocks of attention (with `cross` also to the context) on the features (Dhariwal & Nichol 2021).

    Called as `(h, c, side)`, it returns the new h; each of its branches starts as zero.
    """

    depth: int
    heads: int
    cross: bool = False
    groups: int = 32
    remat: str = "none"
    dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, h, c, side):
        fields = {"groups": self.groups, "zero_init": True, "dtype": self.dtype, "qkv_bias": self.qkv_bias}
        branches = (("attention", partial(SpatialAttention, self.heads, **fields)),)
        if self.cross:
            branches += (("cross_attention", partial(SpatialCrossAttention, self.heads, **fields)),)
        return Stack(branches, self.depth, self.remat, name="blocks")(h, c, side)


class SpatialTransformer(nn.Module):
    """`h + out(blocks(in(norm(h))))`, `depth` blocks of attention, cross-attention (with `cross`) and GEGLU.

    Rombach et al. 2022, appendix E.2.1. Called as `(h, c, side)`, it returns the new h; `out` starts as zero.
    linear: `in` and `out` are dense layers, not 1 x 1 convolutions: the same function (Stable Diffusion 2 and later).
    """

    depth: int
    heads: int
    cross: bool = True
    groups: int = 32
    remat: str = "none"
    dtype: Any = jnp.float32
    qkv_bias: bool = True
    linear: bool = False

    @nn.compact
    def __call__(self, h, c, side):
        attention = {"groups": 0, "dtype": self.dtype, "qkv_bias": self.qkv_bias}
        branches = (("attention", partial(SpatialAttention, self.heads, **attention)),)
        if self.cross:
            branches += (("cross_attention", partial(SpatialCrossAttention, self.heads, **attention)),)
        branches += (("mlp", partial(SpatialMlp, dtype=self.dtype)),)
        width = h.shape[-1]
        if self.linear:
            first = projection(width, dtype=self.dtype, name="in")
            last = projection(width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")
        else:
            first = conv(width, 1, dtype=self.dtype, name="in")
            last = conv(width, 1, dtype=self.dtype, zero=True, name="out")
        y = first(_norm(self.groups, self.dtype)(h))
        return h + last(Stack(branches, self.depth, self.remat, name="blocks")(y, c, side))
