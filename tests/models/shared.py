"""Tiny networks shared by the tests of this folder, with weights that are nowhere zero, and their programs.

Answers are NumPy arrays: what a test does with them compiles nothing.
"""

import functools

import jax
import numpy as np

from diffusion_jax import models
from tests.models.drawn import drawn

T = jax.device_put(np.array([100.0, 700.0], np.float32))


def scramble(params, seed=5, size=0.2):
    """Adds noise to every parameter, so that zero-initialised gates and outputs take part."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        noise = (size * rng.standard_normal(leaf.shape)).astype(np.float32)
        return leaf + noise if isinstance(leaf, jax.core.Tracer) else jax.device_put(np.asarray(leaf) + noise)

    return jax.tree.map(moved, params)


def drawn_params(network, x, t, cond=None, seed=0):
    """Parameters of a network for such inputs, drawn: nothing is compiled."""
    return drawn(jax.eval_shape(network.init, jax.random.key(0), x, t, cond), seed)


def compiled(function):
    """`function` as one program that answers in NumPy arrays."""
    program = jax.jit(function)
    return lambda *args: jax.device_get(program(*args))


def now(function):
    """What a function gives, as one program, in NumPy arrays."""
    return compiled(function)()


def image(shape=(2, 4, 6, 3), seed=1):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def changed(array, index, value):
    """A copy of an array with another value at `index`."""
    array = np.array(array)
    array[index] = value
    return array


def tiny_dit(**fields):
    return models.dit("S/2", **{"width": 16, "depth": 3, "heads": 2, "conditions": (models.label(3),), **fields})


def labels(*values):
    return {"label": jax.device_put(np.array(values, np.int32))}


@functools.cache
def dit_apply():
    """`(params, x, t, cond) -> output` of the tiny DiT, one program for all tests."""
    network = tiny_dit()
    return compiled(lambda *args: network.apply(*args)[0])


@functools.cache
def dit_case():
    """A tiny DiT: (network, params, x, t, cond, its output)."""
    network = tiny_dit()
    x, cond = image(), labels(0, 2)
    params = drawn_params(network, x, T, cond)
    return network, params, x, T, cond, dit_apply()(params, x, T, cond)
