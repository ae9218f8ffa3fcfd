"""Feed-forward layers, plain and gated, and the activations that published networks use."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.layers.dense import projection

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Hendrycks & Gimpel 2016 for GELU, its tanh form and x sigmoid(1.702 x)."""


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or with `gated` `down(activation(gate(x)) * up(x))` (Shazeer 2020).

    ratio: hidden width over width. swiglu: gated by SiLU, with a hidden width of two thirds of that, rounded up to a
        multiple of 8, which keeps the number of parameters.
    hidden: the hidden width itself, where it is not 0. activation: a key of `ACTIVATIONS`.
    use_bias: whether the projections have biases.
    """

    ratio: float = 4.0
    swiglu: bool = False
    dtype: Any = jnp.float32
    hidden: int = 0
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = int(width * self.ratio)
        if self.swiglu:
            hidden = -(-hidden * 2 // 24) * 8
        hidden = self.hidden or hidden
        activation = ACTIVATIONS["silu" if self.swiglu else self.activation]

        def dense(features, name):
            init = nn.initializers.xavier_uniform()
            return projection(features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, name=name)

        y = dense(hidden, "up")(x)
        y = activation(dense(hidden, "gate")(x)) * y if self.swiglu or self.gated else activation(y)
        return dense(width, "down")(y)
