"""Clips through an autoencoder of images, frame by frame."""

from typing import Any

import jax

from diffusion_jax.errors import invalid
from diffusion_jax.models.vae import Autoencoder


def framewise(autoencoder: Autoencoder) -> Autoencoder:
    """The autoencoder for clips `[B, F, H, W, C]`: each frame is an image to it, latents are `[B, F, h, w, Z]`.

    Functions and parameters are otherwise the same; the divergence of a posterior is that of the whole clip. Frames are
    coded independently: what joins them is left to the diffusion model (Ma et al. 2024, Latte; Liu et al. 2024, FVDM).
    Raises InvalidInput for what is not a clip.
    """

    def by_frame(function, clips):
        if clips.ndim != 5:
            raise invalid("clips.shape", clips.shape, "[B, F, H, W, C] was expected")
        batch, frames = clips.shape[:2]
        results = function(clips.reshape(batch * frames, *clips.shape[2:]))
        return jax.tree.map(lambda leaf: leaf.reshape(batch, frames, *leaf.shape[1:]), results)

    def init(key, x):
        return autoencoder.init(key, x[:, 0])

    def posterior(params, x):
        return by_frame(lambda images: autoencoder.posterior(params, images), x)

    def encode(params, x, key: Any = None):
        found = posterior(params, x)
        return autoencoder.scale(found.mean if key is None else found.sample(key))

    def decode(params, latents):
        return by_frame(lambda images: autoencoder.decode(params, images), latents)

    return Autoencoder(init, posterior, autoencoder.scale, encode, decode, autoencoder.module)
