"""A decoder that sees a picture: details that an autoencoder loses are taken from another picture of the same place.

With e_l(y) the features of the frozen encoder behind the blocks of level l, of a picture y that shares its details with
the one to be decoded (the same scene with shadows, rain, at low light), and h_l those of the frozen decoder there,

    h_l  <-  h_l + Z_l(silu(C_l[e_l(y), h_l, |r|])),                                                              (1)

C_l a convolution and Z_l one that starts at zero, so that at first the decoder is what it was, bit for bit. Features
are added at their own resolution, and the decoder's upsampling takes them to the next. |r| is how much latents and
those of y differ, enlarged to the level: it says where y is not to be trusted. From the residual generation of latent
shadow removal. Nothing of the autoencoder is copied or changed: both of its halves let others work behind their levels
(`vae.AtLevel`). An autoencoder without such levels, a linear one say, has a single one, that of pixels, where
h_0 = D(z), e_0 = y - D(E(y)), what it loses of y, and |r| = |D(E(y)) - D(z)|.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.layers.convolution import conv
from diffusion_jax.models.vae import KLVAE, Autoencoder
from diffusion_jax.typing import Params


class DetailSkips(nn.Module):
    """The branches of equation (1): `(level, h_l, e_l(y), difference of latents) -> h_l`. width: channels within."""

    features: tuple[int, ...]
    width: int

    def setup(self):
        self.reads = [conv(self.width) for _ in self.features]
        self.writes = [conv(size, zero=True) for size in self.features]

    def __call__(self, level, h, seen, difference):
        height, width = h.shape[1:3]
        far = jax.image.resize(difference, (*difference.shape[:1], height, width, difference.shape[-1]), "nearest")
        joined = jnp.concatenate([part.astype(jnp.float32) for part in (seen, h, far)], axis=-1)
        return h + self.writes[level](jax.nn.silu(self.reads[level](joined))).astype(h.dtype)

    def all_levels(self, inputs):
        return [self(level, *parts) for level, parts in enumerate(inputs)]


class DetailDecoder(NamedTuple):
    """A decoder that sees a picture, as pure functions.

    init:   key -> params of what is added, which learn
    decode: (params, autoencoder's params, latents [B, h, w, Z], picture [B, H, W, C]) -> x [B, H, W, C]
    """

    init: Callable[[Any], Params]
    decode: Callable[..., Any]


def detailed(autoencoder: Autoencoder, width: int = 32, channels: int = 3) -> DetailDecoder:
    """Equation (1) around the decoder of an autoencoder, whose parameters are used as they are.

    width: channels between C_l and Z_l. channels: of pictures, where the autoencoder is no `kl_vae`. Latents are as
    `autoencoder.encode` returns them. Train it with `objectives.detail_loss`, with pictures y as at the time of use:
    taught with clean ones it lets shadows through.
    Raises InvalidInput for a width or channels below 1.
    """
    module = autoencoder.module
    if width < 1 or channels < 1:
        raise invalid("width, channels", (width, channels), "at least one channel is needed")
    if not isinstance(module, KLVAE):
        return _behind(autoencoder, DetailSkips((channels,), width))
    skips, levels = DetailSkips(module.features, width), len(module.features)
    shift, factor = module.scales

    def init(key):
        sides = [2 ** (levels - 1 - level) for level in range(levels)]
        shapes = [(1, side, side, size) for side, size in zip(sides, module.features, strict=True)]
        latents = jnp.zeros((1, 1, 1, module.latent_channels))
        inputs = [(jnp.zeros(shape), jnp.zeros(shape), latents) for shape in shapes]
        return jax.jit(lambda key: skips.init(key, inputs, method="all_levels")["params"])(key)

    def decode(params, frozen, latents, picture):
        variables, seen = {"params": frozen}, {}

        def kept(level, h):
            seen[level] = h
            return h

        posterior: Any = module.apply(variables, picture, None, kept, method="posterior")
        own = autoencoder.scale(posterior.mean)
        difference = jnp.abs(own - latents)

        def added(level, h):
            return skips.apply({"params": params}, level, h, seen[level], difference)

        return module.apply(variables, latents / factor + shift, None, added, method="reconstruct")

    return DetailDecoder(init, decode)


def _behind(autoencoder, skips):
    """Behind a decoder whose levels are not known."""

    def init(key):
        pixel = jnp.zeros((1, 1, 1, *skips.features))
        return jax.jit(lambda key: skips.init(key, [(pixel, pixel, pixel)], method="all_levels")["params"])(key)

    def decode(params, frozen, latents, picture):
        h, known = (autoencoder.decode(frozen, z) for z in (latents, autoencoder.encode(frozen, picture)))
        return skips.apply({"params": params}, 0, h, picture - known, jnp.abs(known - h))

    return DetailDecoder(init, decode)
