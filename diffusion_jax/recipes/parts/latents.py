"""The latent space that a recipe's diffusion model works in: an autoencoder of its own data, trained once and kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import invalid
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.frame import trained

_CHUNK = 256

_FEW = 64
"""Of fewer pictures than that the axes come from a small decomposition, without their covariance."""


class LatentSpace(NamedTuple):
    """encode: x `[B, ...]` to latents, the posterior's mean, standardised. decode: latents to x, clipped to [-1, 1].

    shape: of one example's latents.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    shape: tuple[int, ...]


def latent_space(config: ConfigDict, name: str) -> LatentSpace:
    """Trains the autoencoder that `config`, an experiment's, describes, or reads it from the cache.

    Latents have mean 0 and variance 1 over the first examples of the data, one figure for all of their channels
    (Rombach et al. 2022, appendix G).
    """
    experiment = prepare(config)
    params, autoencoder = trained(experiment, name), experiment.network
    examples = [experiment.source[i]["x0"] for i in range(min(len(experiment.source), _CHUNK))]
    latents = jax.jit(autoencoder.encode)(params, np.stack(examples))
    mean, deviation = jnp.mean(latents), jnp.std(latents)

    @jax.jit
    def encode(params, x):
        return (autoencoder.encode(params, x) - mean) / deviation

    @jax.jit
    def decode(params, latents):
        return jnp.clip(autoencoder.decode(params, latents * deviation + mean), -1.0, 1.0)

    return LatentSpace(partial(encode, params), partial(decode, params), latents.shape[1:])


def principal_space(pictures: Any, components: int, tokens: int | None = None) -> LatentSpace:
    """The best linear autoencoder: coordinates along the leading principal components of `pictures [N, H, W, C]`.

    Pictures `[..., H, W, C]` become `[..., 1, 1, components]`, of variance 1 in all, one figure for all of them; a clip
    has a token a frame. Costs an eigendecomposition, and is exact up to what the components leave out.
    tokens: cuts them into so many tokens, `[..., tokens, components / tokens]`, the leading ones first.
    """
    pictures = np.asarray(pictures, np.float32)
    flat = pictures.reshape(len(pictures), -1)
    if not 1 <= components <= flat.shape[1]:
        raise invalid("components", components, f"between 1 and {flat.shape[1]}, the numbers of a picture")
    if tokens is not None and (tokens < 1 or components % tokens):
        raise invalid("tokens", tokens, f"it must divide the {components} components")
    shape = (1, 1, components) if tokens is None else (tokens, components // tokens)
    mean = flat.mean(0)
    if components < len(flat) < min(_FEW, flat.shape[1]):
        _, singular, rows = np.linalg.svd(np.float64(flat) - flat.mean(0, dtype=np.float64), full_matrices=False)
        variances, axes = singular[::-1] ** 2 / (len(flat) - 1), rows[::-1].T
    else:
        variances, axes = np.linalg.eigh(np.cov(flat.T, dtype=np.float64))
    deviation = np.sqrt(variances[-components:].mean())
    axes = np.float32(deviation * axes[:, ::-1][:, :components])
    mean = mean.reshape(pictures.shape[1:])
    return LatentSpace(partial(_coordinates, mean, axes, shape), partial(_picture, mean, axes, shape), shape)


def _coordinates(mean, axes, shape, x):
    difference = (jnp.asarray(x) - mean).reshape(*jnp.shape(x)[:-3], -1)
    return (difference @ (axes / np.square(axes).sum(0))).reshape(*jnp.shape(x)[:-3], *shape)


def _picture(mean, axes, shape, z):
    flat = jnp.asarray(z).reshape(*jnp.shape(z)[: -len(shape)], -1) @ axes.T
    return jnp.clip(flat.reshape(*flat.shape[:-1], *mean.shape) + mean, -1.0, 1.0)


def encoded(space: LatentSpace, source: Any) -> data.ArraySource:
    """All examples of `source` in the latent space, with their conditions."""
    parts = [stacked_examples(source, range(i, min(i + _CHUNK, len(source)))) for i in range(0, len(source), _CHUNK)]
    x0 = np.concatenate([np.asarray(space.encode(part["x0"])) for part in parts])
    names = parts[0].get("cond", {})
    cond = {name: np.concatenate([part["cond"][name] for part in parts]) for name in names}
    return data.ArraySource(x0, cond, name=f"latents of {getattr(source, 'name', 'a source')}")


def stacked_examples(source: Any, indices: Any) -> dict:
    """The examples of `source` at `indices`, stacked."""
    if hasattr(source, "take"):
        return source.take(np.asarray(indices))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(source[int(i)] for i in indices))
