"""Tiny networks shared by the tests of this folder, with weights that are nowhere zero."""

import functools

import jax
import jax.numpy as jnp

from diffusion_jax import models

T = jnp.array([100.0, 700.0])


def scramble(params, seed=5, size=0.2):
    """Adds noise to every parameter, so that zero-initialised gates and outputs take part."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([a + size * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)])


def image(shape=(2, 4, 6, 3), seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def tiny_dit(**fields):
    return models.dit("S/2", **{"width": 16, "depth": 3, "heads": 2, "num_classes": 3, **fields})


def labels(*values):
    return {"label": jnp.array(values)}


@functools.cache
def dit_case():
    """A tiny DiT: (network, params, x, t, cond, its output)."""
    network = tiny_dit()
    x, cond = image(), labels(0, 2)
    params = jax.jit(lambda key: scramble(network.init(key, x, T, cond)))(jax.random.key(0))
    return network, params, x, T, cond, jax.jit(network.apply)(params, x, T, cond)[0]
