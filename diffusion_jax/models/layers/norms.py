"""Normalisation layers. Statistics are always float32, whatever the compute dtype."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_norm(x, eps: float = 1e-6):
    """(x - mean) / sqrt(var + eps) over the last axis, without parameters; float32 inside, dtype of `x` outside."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm without parameters: shift and scale come from the modulation."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        return layer_norm(x, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019)."""

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group norm over space and the channels of a group (Wu & He 2018), with parameters unless modulated.

    groups: at most this many groups; fewer where the channels do not divide.
    affine: whether it has a scale and bias of its own.
    """

    groups: int = 32
    eps: float = 1e-6
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = next(size for size in range(min(self.groups, channels), 0, -1) if channels % size == 0)
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, channels // groups)
        y = y - y.mean(axis=(1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=(1, 3), keepdims=True) + self.eps)
        y = y.reshape(x.shape)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, (channels,))
            y = y + self.param("bias", nn.initializers.zeros, (channels,))
        return y.astype(self.dtype)
