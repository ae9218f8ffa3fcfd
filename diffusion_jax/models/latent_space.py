"""Latent spaces: an autoencoder with its parameters, and a linear autoencoder that needs no training.

The best linear autoencoder of data with mean m and covariance C keeps the coordinates along the leading eigenvectors U
of C, its principal components (Pearson 1901): z = U' (x - m) / s and x = m + s U z, with one s for all of them, so that
z has variance 1 on the whole and its first coordinates, of pictures, most of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.models.layers.patches import from_patches, to_patches
from diffusion_jax.models.vae import Autoencoder, GaussianPosterior
from diffusion_jax.typing import Numbers, Params

FEW = 64
"""Of fewer pictures than that the axes come from a small decomposition, without their covariance."""


class LatentSpace(NamedTuple):
    """An autoencoder at its parameters.

    encode: x `[B, ...]` to latents, the posterior's mean. decode: latents to x, clipped to [-1, 1].
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def latent_space(autoencoder: Autoencoder, params: Params, examples: Any = None) -> LatentSpace:
    """`autoencoder` at `params`, compiled.

    examples: x `[B, ...]` over which latents get mean 0 and variance 1, one figure for all of their channels (Rombach
    et al. 2022, appendix G); latents stay as they come when None.
    """
    mean, deviation = 0.0, 1.0
    if examples is not None:
        latents = jax.jit(autoencoder.encode)(params, examples)
        mean, deviation = jnp.mean(latents), jnp.std(latents)

    @jax.jit
    def encode(params, x):
        return (autoencoder.encode(params, x) - mean) / deviation

    @jax.jit
    def decode(params, latents):
        return jnp.clip(autoencoder.decode(params, latents * deviation + mean), -1.0, 1.0)

    return LatentSpace(partial(encode, params), partial(decode, params))


def principal_components(
    pictures: Numbers, components: int, tokens: int | None = None
) -> tuple[Autoencoder, dict[str, Any]]:
    """The best linear autoencoder of `pictures [N, H, W, C]`, and its parameters.

    Pictures `[..., H, W, C]` become latents `[..., 1, 1, components]` of mean 0 and variance 1 in all, so a clip has a
    token a frame. Costs an eigendecomposition, and is exact up to what the components leave out.
    tokens: cuts them into so many tokens, `[..., tokens, components / tokens]`, the leading ones first.

        space = models.latent_space(*models.principal_components(pictures, 64))

    The autoencoder's `init` finds the components of other data; its posterior has no variance.
    Raises InvalidInput for more components than a picture has numbers or than there are pictures to tell them from, and
    for tokens that do not divide them.
    """
    pictures = np.asarray(pictures, np.float32)
    if pictures.ndim != 4:
        raise invalid("pictures.shape", pictures.shape, "[N, H, W, C] was expected")
    most = min(len(pictures) - 1, pictures[0].size)
    if not 1 <= components <= most:
        raise invalid("components", components, f"{len(pictures)} pictures of this size have between 1 and {most}")
    if tokens is not None and (tokens < 1 or components % tokens):
        raise invalid("tokens", tokens, f"it must divide the {components} components")
    shape = (1, 1, components) if tokens is None else (tokens, components // tokens)

    def coordinates(params, x):
        lead, axes = jnp.shape(x)[:-3], params["axes"]
        flat = (jnp.asarray(x) - params["mean"]).reshape(*lead, -1)
        return (flat @ (axes / jnp.square(axes).sum(0))).reshape(*lead, *shape)

    def posterior(params, x):
        mean = coordinates(params, x)
        return GaussianPosterior(mean, jnp.full_like(mean, -jnp.inf))

    def encode(params, x, key=None):
        return coordinates(params, x)

    def decode(params, latents):
        lead = jnp.shape(latents)[: -len(shape)]
        flat = jnp.asarray(latents).reshape(*lead, -1) @ params["axes"].T
        return flat.reshape(*lead, *params["mean"].shape) + params["mean"]

    def init(key, x):
        return _axes(np.asarray(x, np.float32), components)

    return Autoencoder(init, posterior, lambda z: z, encode, decode), init(None, pictures)


def patch_autoencoder(components: int = 8, patch: int = 4) -> Autoencoder:
    """The best linear autoencoder of square patches, which `init(key, pictures)` finds without training.

    components: of each patch. patch: pixels a side. Pictures `[B, H, W, C]` become latents
    `[B, H / patch, W / patch, components]` of mean 0 and variance 1 in all, over the pictures of `init`.
    Where data are few it keeps more than convolutional autoencoders of as many latents that were trained for minutes.
    Its posterior has no variance. Raises InvalidInput for sides that the patch does not divide, and for more components
    than a patch has numbers.
    """
    if patch < 1 or components < 1:
        raise invalid("components, patch", (components, patch), "at least one of each is needed")

    def cut(x):
        if jnp.ndim(x) != 4 or x.shape[1] % patch or x.shape[2] % patch:
            raise invalid("the shape of pictures", jnp.shape(x), f"[B, H, W, C] with sides of k x {patch} was expected")
        return to_patches(jnp.asarray(x), (patch, patch))

    def init(key, x):
        patches = np.asarray(cut(np.asarray(x, np.float32)))
        if components > patches.shape[-1]:
            raise invalid("components", components, f"a patch of {patch} x {patch} has {patches.shape[-1]} numbers")
        return _axes(patches.reshape(-1, patches.shape[-1]), components)

    def encode(params, x, key=None):
        axes, (batch, height, width, _) = params["axes"], x.shape
        found = (cut(jnp.asarray(x)) - params["mean"]) @ (axes / jnp.square(axes).sum(0))
        return found.reshape(batch, height // patch, width // patch, components)

    def posterior(params, x):
        mean = encode(params, x)
        return GaussianPosterior(mean, jnp.full_like(mean, -jnp.inf))

    def decode(params, latents):
        batch, height, width, _ = latents.shape
        patches = (latents @ params["axes"].T + params["mean"]).reshape(batch, height * width, -1)
        return from_patches(patches, (patch, patch), (height * patch, width * patch))

    return Autoencoder(init, posterior, lambda z: z, encode, decode)


def _axes(pictures, components):
    """The mean and, as columns `[H W C, components]`, the leading eigenvectors, as long as latents are short."""
    flat = pictures.reshape(len(pictures), -1)
    if len(flat) < min(FEW, flat.shape[1]):
        _, singular, rows = np.linalg.svd(np.float64(flat) - flat.mean(0, dtype=np.float64), full_matrices=False)
        variances, axes = singular[::-1] ** 2 / (len(flat) - 1), rows[::-1].T
    else:
        variances, axes = np.linalg.eigh(np.cov(flat.T, dtype=np.float64))
    deviation = np.sqrt(variances[-components:].mean())
    leading = np.float32(deviation * axes[:, ::-1][:, :components])
    return {"mean": flat.mean(0).reshape(pictures.shape[1:]), "axes": leading}
