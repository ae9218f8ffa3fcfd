"""Convolutional parts that the U-Net and the autoencoder share: convolutions, resampling, the residual branch.

Everything is channels-last, `[B, H, W, C]`, with float32 parameters and `dtype` arithmetic. Attention over pixels is in
`layers.spatial`; what knows about levels or latents is in `models.unet` and `models.vae`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.models.layers.branches import REMAT, Branch
from diffusion_jax.models.layers.modulation import Modulation, expand_vector, modulate
from diffusion_jax.models.layers.norms import GroupNorm

MODULATIONS = ("scale_shift", "shift")
"""How c enters a residual branch: `norm(h) (1 + scale) + shift` (adaptive group norm, Dhariwal & Nichol 2021,
section 3.2), or `norm(h + shift)` (Ho et al. 2020; Stable Diffusion)."""


def conv(
    features: int, kernel: int = 3, *, dtype: Any = jnp.float32, zero: bool = False, name: str | None = None
) -> nn.Conv:
    """A convolution that keeps the size; `zero` starts it at zero, so that the branch it ends starts as nothing."""
    init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(features, (kernel, kernel), padding="SAME", dtype=dtype, kernel_init=init, name=name)


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
    """The mean of each 2 x 2 window; H and W are even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def check_images(shape: tuple[int, ...], halvings: int, field: str) -> None:
    """Raises `InvalidInput` unless `shape` is `[B, H, W, C]` with H and W divisible by `2**halvings`."""
    if len(shape) != 4:
        raise InvalidInput(f"{field} has shape {shape}, but must be images or latents [B, H, W, C].")
    height, width = shape[1:3]
    factor = 2**halvings
    if height % factor or width % factor:
        near = " x ".join(str(-(-size // factor) * factor) for size in (height, width))
        raise InvalidInput(
            f"{field} is {height} x {width}, but {halvings} halvings need height and width divisible by {factor}: "
            f"pad it to {near}, or use fewer levels."
        )


class Downsample(nn.Module):
    """Halves height and width by a 3 x 3 convolution with stride 2.

    padding: rows and columns of zeros before and after; the U-Nets use (1, 1), the latent-diffusion autoencoder (0, 1).
    """

    features: int
    padding: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.features, (3, 3), (2, 2), [self.padding] * 2, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then convolves 3 x 3.

    size: height and width of the result where they were odd before they were halved: the last row or column is then
        not repeated.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, size=None):
        height, width = size or (None, None)
        x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
        return conv(self.features, dtype=self.dtype, name="conv")(x)


class ResidualBranch(Branch):
    """`conv(dropout(silu(norm(conv(silu(norm(h)))))))`, modulated by c at the second norm.

    features: channels of the result, to be added to a shortcut of as many. groups: see `GroupNorm`.
    modulation: one of `MODULATIONS`; c None leaves the branch unmodulated.
    dropout: rate; where it is not 0, the network needs a key for `dropout`.
    zero_init: whether the last convolution starts at zero.
    """

    features: int
    groups: int = 32
    modulation: str = "scale_shift"
    dropout: float = 0.0
    eps: float = 1e-6
    zero_init: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        def norm(name):
            return GroupNorm(self.groups, self.eps, dtype=self.dtype, name=name)

        y = conv(self.features, dtype=self.dtype, name="conv_in")(jax.nn.silu(norm("norm_in")(h)))
        if c is None:
            y = norm("norm_out")(y)
        elif self.modulation == "scale_shift":
            shift, scale = Modulation(self.features, 2, self.dtype, name="modulation")(c)
            y = modulate(norm("norm_out")(y), shift, scale)
        elif self.modulation == "shift":
            (shift,) = Modulation(self.features, 1, self.dtype, name="modulation")(c)
            y = norm("norm_out")(y + expand_vector(shift, y))
        else:
            raise unknown("modulation", self.modulation, MODULATIONS)
        y = nn.Dropout(self.dropout, deterministic=False)(jax.nn.silu(y))
        return conv(self.features, dtype=self.dtype, zero=self.zero_init, name="conv_out")(y)


class ResidualBlock(nn.Module):
    """`shortcut(h) + residual(h, c, side)`; the shortcut is a 1 x 1 convolution where the channels change.

    make: `make(features, name="residual")` is the branch; features: its number of channels.
    """

    make: Callable[..., nn.Module]
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        shortcut = h
        if h.shape[-1] != self.features:
            shortcut = conv(self.features, 1, dtype=self.dtype, name="shortcut")(h)
        return shortcut + self.make(self.features, name="residual")(h, c, side).astype(shortcut.dtype)


def residual_block(
    make: Callable[..., nn.Module], features: int, *, remat: str, dtype: Any, name: str
) -> ResidualBlock:
    """A `ResidualBlock` whose activations the backward pass treats as `REMAT[remat]` says; remat changes no name."""
    block = ResidualBlock if remat == "none" else nn.remat(ResidualBlock, policy=REMAT[remat])
    return block(make, features, dtype, name=name)
