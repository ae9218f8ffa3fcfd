"""The branches of published encoders: attention and feed-forward behind an affine norm, relative positions.

No time reaches them, so there is no modulation; what encoders differ in is fields. The modulated branches of diffusion
networks are in `layers.branches`, those over pixels in `layers.spatial`, whole encoders in `models.text_encoders` and
`models.vision_encoders`.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from diffusion_jax.models.layers.attention import Attention, key_mask
from diffusion_jax.models.layers.branches import Branch
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.models.layers.norms import RMSNorm


def affine_norm(kind: str, eps: float, dtype: Any = jnp.float32, name: str = "norm") -> nn.Module:
    """A norm with its own parameters and float32 statistics: "layer", `(x - mean) / std * scale + bias`, or "rms"."""
    if kind == "rms":
        return RMSNorm(eps, dtype, name=name)
    # The fast variance, E[x^2] - E[x]^2, cancels where a few channels are huge, as they are in trained encoders.
    return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


def causal_mask(mask: Bool[Array, "B N"] | None, length: int) -> Bool[Array, "#B 1 N N"]:
    """Which keys a query sees that looks back only: those up to its own position that `mask` does not hide."""
    earlier = jnp.asarray(np.tri(length, dtype=bool))[None, None]
    return earlier if mask is None else earlier & mask[:, None, None, :]


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "N N"]:
    """The bucket of `key - query`: half of them for each sign, of these half for each small distance and the rest for
    distances up to `max_distance` on a logarithmic scale (Raffel et al. 2020, section 2.1)."""
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # In float32, as the published networks were trained: the logarithm decides which bucket a distance falls into.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(distance < exact, distance, far) + half * (offset > 0)


class RelativeBias(nn.Module):
    """A learned bias of the logits for each bucket of relative positions and each head, `[1, H, N, N]`."""

    heads: int
    buckets: int = 32
    max_distance: int = 128

    @nn.compact
    def __call__(self, length: int):
        table = self.param("embedding", nn.initializers.normal(0.02), (self.buckets, self.heads))
        index = relative_buckets(length, self.buckets, self.max_distance)
        return jnp.take(table, jnp.asarray(index), axis=0).transpose(2, 0, 1)[None]


class PreNormBranch(Branch):
    """What both branches share: the norm before, and with `layer_scale` a learned factor a channel behind.

    norm: "layer" or "rms". layer_scale: Touvron et al. 2021, equation 5.
    """

    norm: str = "layer"
    eps: float = 1e-5
    layer_scale: bool = False
    dtype: Any = jnp.float32

    def normed(self, h):
        return affine_norm(self.norm, self.eps, self.dtype)(h)

    def weighted(self, y):
        if not self.layer_scale:
            return y
        return y * self.param("layer_scale", nn.initializers.ones, (y.shape[-1],))


class PreNormAttention(PreNormBranch):
    """`layer_scale * attention(norm(h))`.

    causal: whether positions see only themselves and earlier ones. bias: whether projections have biases (`qkv_bias` of
    queries, keys and values alone). head_dim, scaled: see `Attention`.
    buckets, max_distance: of a relative bias of this block's own; without buckets it is `side.bias`, if there is one.
    qk_norm: see `Attention`.
    """

    heads: int = 8
    causal: bool = False
    bias: bool = True
    qkv_bias: bool = True
    head_dim: int = 0
    scaled: bool = True
    buckets: int = 0
    max_distance: int = 128
    qk_norm: bool = False

    @nn.compact
    def __call__(self, h, c, side):
        y, length = self.normed(h), h.shape[1]
        mask = causal_mask(side.mask, length) if self.causal else key_mask(side.mask)
        bias = side.bias
        if self.buckets:
            bias = RelativeBias(self.heads, self.buckets, self.max_distance, name="relative_bias")(length)
        attention = Attention(
            self.heads,
            self.qk_norm,
            self.dtype,
            qkv_bias=self.bias and self.qkv_bias,
            out_bias=self.bias,
            head_dim=self.head_dim,
            scaled=self.scaled,
            name="attention",
        )
        return self.weighted(attention(y, y, mask, None, bias))


class PreNormMlp(PreNormBranch):
    """`layer_scale * feed_forward(norm(h))`; `hidden`, `activation`, `gated` and `bias` are `FeedForward`'s."""

    hidden: int = 0
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, h, c, side):
        feed_forward = FeedForward(
            hidden=self.hidden,
            activation=self.activation,
            gated=self.gated,
            use_bias=self.bias,
            dtype=self.dtype,
            name="feed_forward",
        )
        return self.weighted(feed_forward(self.normed(h)))
