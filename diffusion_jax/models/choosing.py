"""A small network that chooses one of K actions for a picture or a clip: K logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.layers.convolution import conv
from diffusion_jax.typing import Params


class Chooser(NamedTuple):
    """init: (key, x) -> params. apply: (params, x [B, ...]) -> logits `[B, count]`."""

    init: Callable[..., Params]
    apply: Callable[..., Any]
    count: int


class ConvolutionalChooser(nn.Module):
    """Convolutions over `x [B, H, W, C]`, `[B, F, H, W, C]` (whose frames are channels) or `[B, D]`, their mean over
    all places, and logits that start at 0: all actions alike."""

    count: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        if x.ndim == 5:
            x = jnp.moveaxis(x, 1, -2)
            x = x.reshape(*x.shape[:-2], -1)
        elif x.ndim == 2:
            x = x[:, None, None]
        elif x.ndim != 4:
            raise invalid(
                "x.shape", x.shape, "vectors [B, D], pictures [B, H, W, C] or clips [B, F, H, W, C] are taken"
            )
        for i in range(self.depth):
            x = jax.nn.gelu(conv(self.width, name=f"conv_{i}")(x))
        return nn.Dense(self.count, kernel_init=nn.initializers.zeros, name="logits")(x.mean((1, 2)))


def chooser(count: int, width: int = 32, depth: int = 4) -> Chooser:
    """A `Chooser` of `count` actions by `depth` convolutions. Raises InvalidInput for sizes that are not positive."""
    for name, value in (("count", count), ("width", width), ("depth", depth)):
        if value < 1:
            raise invalid(name, value, "it must be positive")
    module = ConvolutionalChooser(count, width, depth)

    def init(key, x):
        return jax.jit(lambda: module.init(key, jnp.asarray(x))["params"])()

    def apply(params, x):
        return module.apply({"params": params}, jnp.asarray(x))

    return Chooser(init, apply, count)
