"""Feed-forward layers: GELU and SwiGLU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.layers.dense import projection


class FeedForward(nn.Module):
    """`down(gelu(up(x)))`, or with `swiglu` `down(silu(gate(x)) * up(x))` (Shazeer 2020).

    ratio: hidden width over width. SwiGLU's hidden width is two thirds of that, rounded up to a multiple of 8, which
    keeps the number of parameters.
    """

    ratio: float = 4.0
    swiglu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = int(width * self.ratio)
        if self.swiglu:
            hidden = -(-hidden * 2 // 24) * 8

        def dense(features, name):
            return projection(features, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)

        y = dense(hidden, "up")(x)
        y = jax.nn.silu(dense(hidden, "gate")(x)) * y if self.swiglu else jax.nn.gelu(y, approximate=True)
        return dense(width, "down")(y)
