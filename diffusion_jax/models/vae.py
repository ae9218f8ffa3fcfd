"""The convolutional KL autoencoder that latent diffusion models work in (Rombach et al. 2022, appendix G).

The encoder turns images `[B, H, W, C]` into a diagonal Gaussian over latents `[B, H/f, W/f, Z]`, f = 2^(levels - 1);
the decoder turns latents into images. Diffusion wants latents of unit variance, so what `Autoencoder.encode` returns
and `decode` takes is `(z - shift_factor) * scaling_factor`, or with the mean and standard deviation of each channel
`(z - latents_mean) / latents_std * scaling_factor`. The loss that trains it is `objectives.vae_loss`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import randomness
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.layers.branches import REMAT, Side
from diffusion_jax.models.layers.convolution import (
    Downsample,
    ResidualBranch,
    Upsample,
    check_images,
    conv,
    residual_block,
)
from diffusion_jax.models.layers.norms import GroupNorm
from diffusion_jax.models.layers.spatial import SpatialAttention
from diffusion_jax.models.network import check_dtype, chosen, make_module
from diffusion_jax.typing import Keys


class GaussianPosterior(NamedTuple):
    """A diagonal Gaussian over latents; mean and logvar are `[B, h, w, Z]`, float32."""

    mean: Any
    logvar: Any

    def sample(self, key: Keys):
        """`mean + exp(logvar / 2) eps`; with one key per sample, samples do not depend on their neighbours."""
        return self.mean + jnp.exp(0.5 * self.logvar) * randomness.normal(key, self.mean.shape)

    def kl(self):
        """KL(N(mean, exp(logvar)) || N(0, I)) per sample, `[B]`, in nats (Kingma & Welling 2014, appendix B)."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(tuple(range(1, terms.ndim)))


AtLevel = Callable[[int, Any], Any]
"""`(level, features) -> features`: what is done to those behind the blocks of each level; level 0 is that of pixels."""


def as_it_is(level: int, h: Any) -> Any:
    """The `AtLevel` that does nothing."""
    return h


class Coder(nn.Module):
    """What encoder and decoder share. out_channels: that come out; features: of each level; the rest as in `KLVAE`."""

    out_channels: int
    features: tuple[int, ...]
    num_residual: int
    attention: bool
    groups: int
    remat: str
    dtype: Any

    def block(self, h, features: int, name: str):
        make = partial(ResidualBranch, groups=self.groups, eps=1e-6, zero_init=False, dtype=self.dtype)
        return residual_block(make, features, remat=self.remat, dtype=self.dtype, name=name)(h, None, Side())

    def middle(self, h):
        h = self.block(h, h.shape[-1], "mid_0")
        if self.attention:
            h = h + SpatialAttention(1, self.groups, dtype=self.dtype, name="attention")(h, None, Side())
        return self.block(h, h.shape[-1], "mid_1")

    def finish(self, h):
        h = jax.nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(h))
        return conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class VAEEncoder(Coder):
    """`[B, H, W, C]` to `[B, H/f, W/f, out_channels]`. stage: "levels" or "end" is the part before or after them."""

    @nn.compact
    def __call__(self, h, stage=None, at_level: AtLevel = as_it_is):
        if stage != "end":
            h = conv(self.features[0], dtype=self.dtype, name="conv_in")(h.astype(self.dtype))
            for level, features in enumerate(self.features):
                for index in range(self.num_residual):
                    h = self.block(h, features, f"level_{level}_{index}")
                h = at_level(level, h)
                if level < len(self.features) - 1:
                    h = Downsample(h.shape[-1], (0, 1), self.dtype, name=f"level_{level}_down")(h)
        return h if stage == "levels" else self.finish(self.middle(h))


class VAEDecoder(Coder):
    """`[B, h, w, Z]` to `[B, f h, f w, out_channels]`. stage: "start" ends before the levels, "levels" is the rest."""

    @nn.compact
    def __call__(self, h, stage=None, at_level: AtLevel = as_it_is):
        if stage != "levels":
            h = self.middle(conv(self.features[-1], dtype=self.dtype, name="conv_in")(h.astype(self.dtype)))
        if stage == "start":
            return h
        for level, features in reversed(list(enumerate(self.features))):
            for index in range(self.num_residual + 1):
                h = self.block(h, features, f"level_{level}_{index}")
            h = at_level(level, h)
            if level > 0:
                h = Upsample(h.shape[-1], self.dtype, name=f"level_{level}_up")(h)
        return self.finish(h)


class KLVAE(nn.Module):
    """Encoder and decoder; `kl_vae` makes pure functions of them. The defaults are KL-f8 of latent diffusion.

    channels, multipliers: level l has `round(channels * multipliers[l])` features; every level but the last halves the
        size.
    num_residual: residual blocks per level of the encoder; the decoder has one more.
    latent_channels: Z. data_channels: of the images, and of their reconstructions.
    attention: whether the middle attends over pixels (one head).
    quant_conv: whether a 1 x 1 convolution stands on either side of the latents (latent diffusion has them, FLUX not).
    groups: of the group norms. remat: a key of `REMAT`, applied to each residual block.
    scaling_factor, shift_factor: see the module's docstring; 0.18215 and 0 in Stable Diffusion 1.
    latents_mean, latents_std: of each channel of the latents, where they are known; both or neither.
    dtype: compute dtype; parameters, mean, logvar and reconstructions are float32.
    """

    channels: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 4, 4)
    num_residual: int = 2
    latent_channels: int = 4
    data_channels: int = 3
    attention: bool = True
    quant_conv: bool = True
    groups: int = 32
    remat: str = "none"
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """How many pixels a latent spans along each axis, f."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.channels * multiplier) for multiplier in self.multipliers)

    @property
    def scales(self) -> tuple[Any, Any]:
        """What latents are shifted by and then multiplied by, each a number or one for each channel."""
        if not self.latents_std:
            return self.shift_factor, self.scaling_factor
        factor = self.scaling_factor / np.asarray(self.latents_std, np.float64)
        return np.asarray(self.latents_mean, np.float32), factor.astype(np.float32)

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        fields = {
            "features": self.features,
            "num_residual": self.num_residual,
            "attention": self.attention,
            "groups": self.groups,
            "remat": self.remat,
            "dtype": dtype,
        }
        self.encoder = VAEEncoder(2 * self.latent_channels, **fields)
        self.decoder = VAEDecoder(self.data_channels, **fields)
        if self.quant_conv:
            self.to_moments = conv(2 * self.latent_channels, 1, dtype=dtype)
            self.from_latents = conv(self.latent_channels, 1, dtype=dtype)

    def posterior(self, x, stage=None, at_level: AtLevel = as_it_is):
        """The `GaussianPosterior` over (unscaled) latents; logvar is kept within [-30, 20].

        stage: "levels" returns the features of the encoder's levels, which "end" takes for x. at_level: see `AtLevel`.
        """
        if stage != "end":
            check_images(x.shape, len(self.multipliers) - 1, "x")
            if x.shape[-1] != self.data_channels:
                raise invalid("x.shape", x.shape, f"the autoencoder was made for data_channels={self.data_channels}")
        moments = self.encoder(x, stage, at_level)
        if stage == "levels":
            return moments
        if self.quant_conv:
            moments = self.to_moments(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return GaussianPosterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def reconstruct(self, z, stage=None, at_level: AtLevel = as_it_is):
        """The image of unscaled latents `z`.

        stage: "start" returns the features that the decoder's levels begin with, which "levels" takes for z. at_level:
        see `AtLevel`.
        """
        if stage != "levels":
            if z.ndim != 4 or z.shape[-1] != self.latent_channels:
                expected = f"latents [B, h, w, {self.latent_channels}] are needed"
                raise invalid("z.shape", z.shape, expected)
            if self.quant_conv:
                z = self.from_latents(z.astype(self.dtype))
        y = self.decoder(z, stage, at_level)
        return y if stage == "start" else y.astype(jnp.float32)

    def __call__(self, x):
        posterior = self.posterior(x)
        return self.reconstruct(posterior.mean), posterior


class Autoencoder(NamedTuple):
    """An autoencoder as pure functions; `module` is the linen module behind them, for interception.

    init:      (key, x) -> params
    posterior: (params, x) -> GaussianPosterior      over latents as the network has them
    scale:     (z) -> (z - shift) * scale, latents as a diffusion model sees them
    encode:    (params, x, key=None) -> scaled latents: a sample of the posterior, its mean when there is no key
    decode:    (params, latents) -> x                undoes the scaling first
    """

    init: Callable[..., Any]
    posterior: Callable[..., GaussianPosterior]
    scale: Callable[..., Any]
    encode: Callable[..., Any]
    decode: Callable[..., Any]
    module: Any = None


PRESETS = {
    "kl_f8": {"scaling_factor": 0.18215},
    "kl_f4": {"multipliers": (1, 2, 4), "latent_channels": 3, "scaling_factor": 0.18215},
    "sdxl": {"scaling_factor": 0.13025},
    "kl_f8_16ch": {"latent_channels": 16, "quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "small": {"channels": 32, "multipliers": (1, 2), "num_residual": 1, "attention": False},
}
"""Fields of `KLVAE`. `kl_f8` is that of Stable Diffusion 1 and 2, `sdxl` of XL, `kl_f8_16ch` of 3 (FLUX.1's has other
factors, 0.3611 and 0.1159); `small` (f = 2) is for the embedded data."""


def kl_vae(preset: str = "kl_f8", **fields) -> Autoencoder:
    """A KL autoencoder: a preset of `PRESETS`, and any fields of `KLVAE` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    module = make_module(KLVAE, "kl_vae", chosen(preset, PRESETS), fields)
    for name in ("channels", "num_residual", "latent_channels", "data_channels", "groups"):
        if getattr(module, name) < 1:
            raise invalid(name, getattr(module, name), "it must be a positive integer")
    if not module.multipliers or min(module.features) < 1:
        raise invalid("multipliers", module.multipliers, "one positive number per level is needed")
    if not module.scaling_factor > 0:
        raise invalid("scaling_factor", module.scaling_factor, "it must be positive")
    for name in ("latents_mean", "latents_std"):
        given = getattr(module, name)
        if len(given) != (module.latent_channels if module.latents_mean or module.latents_std else 0):
            told = f"it and its fellow need one number for each of the {module.latent_channels} latent channels, or ()"
            raise invalid(name, given, told)
    if module.latents_std and (module.shift_factor or min(module.latents_std) <= 0):
        raise invalid("latents_std", module.latents_std, "positive numbers are needed, and shift_factor must be 0")
    if module.remat not in REMAT:
        raise unknown("remat", module.remat, REMAT)
    check_dtype(module.dtype)
    return autoencoder(module)


def autoencoder(
    module: KLVAE, around_encoder: Callable[..., Any] | None = None, around_decoder: Callable[..., Any] | None = None
) -> Autoencoder:
    """The pure functions of the module; `init` compiles as one program.

    around_encoder, around_decoder: `(levels, h) -> features`: how the levels of either, a local map to fewer or more
        pixels, are applied where that is not to all of h at once (`models.tiling`).
    """

    def init(key, x):
        return jax.jit(lambda *inputs: module.init(*inputs)["params"])(key, x)

    def call(params, method, value, stage=None) -> Any:
        return module.apply({"params": params}, value, stage, method=method)

    def posterior(params, x):
        if around_encoder is None:
            return call(params, "posterior", x)
        h = around_encoder(lambda part: call(params, "posterior", part, "levels"), x)
        return call(params, "posterior", h, "end")

    shift, factor = module.scales

    def scale(z):
        return (z - shift) * factor

    def encode(params, x, key=None):
        latents = posterior(params, x)
        return scale(latents.mean if key is None else latents.sample(key))

    def decode(params, latents):
        z = latents / factor + shift
        if around_decoder is None:
            return call(params, "reconstruct", z)
        h = call(params, "reconstruct", z, "start")
        return around_decoder(lambda part: call(params, "reconstruct", part, "levels"), h)

    return Autoencoder(init, posterior, scale, encode, decode, module)
