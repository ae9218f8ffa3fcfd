"""Random keys per sample instead of per batch.

Sample i of a run uses `fold_in(key, i)` with its global index i, whatever the batch size, the number of devices or
the order. Functions here take one key, or one key per sample (`[B]`), and with the latter never mix samples. What a
sample of a run draws is `prior_key`, `solver_key`, `denoiser_key` and `corruption_key` of its key.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Keys


def sample_keys(key: Key[Array, ""], index: Int[Array | np.ndarray, " B"]) -> Key[Array, " B"]:
    """One key per sample from its global index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def fold(key: Keys, data: int | Int[Array, ""]) -> Keys:
    """`fold_in` for one key or one per sample."""
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, data)


def prior_key(key: Keys) -> Keys:
    """Of the noise at t = 1 with which a sample begins."""
    return fold(key, 0)


def solver_key(key: Keys) -> Keys:
    """Of the noise that a solver adds: it is folded with the step's index."""
    return fold(key, 1)


def denoiser_key(key: Keys) -> Keys:
    """Of what a denoiser draws, `Step.key`: the same at every step."""
    return fold(key, 2)


def corruption_key(key: Keys) -> Keys:
    """Of the noise that brings known data to a level of a run."""
    return fold(key, 3)


def split(key: Keys, num: int) -> tuple[Keys, ...]:
    """`num` independent keys (each one per sample when `key` is)."""
    return tuple(fold(key, i) for i in range(num))


def draw_per_sample(draw: Callable[..., Any], key: Keys, shape: Any, *args: Any) -> Any:
    """`draw(key, shape, *args)`, sample by sample when there is one key per sample.

    `shape` includes the batch, and may be a dict of shapes (then each entry gets a key of its own).
    """
    if isinstance(shape, dict):
        keys = split(key, len(shape))
        return {name: draw_per_sample(draw, k, shape[name], *args) for k, name in zip(keys, sorted(shape), strict=True)}
    shape = tuple(shape)
    if key.ndim == 0:
        return draw(key, shape, *args)
    if not shape or shape[0] != key.shape[0]:
        raise invalid("shape", shape, f"its first entry must be the number of keys, {key.shape[0]}")
    return jax.vmap(lambda k: draw(k, shape[1:], *args))(key)


def normal(key: Keys, shape: Any) -> Any:
    """Standard normal noise of `shape`."""
    return draw_per_sample(jax.random.normal, key, shape)


def uniform(key: Keys, shape: Any) -> Any:
    """Uniform noise in [0, 1) of `shape`."""
    return draw_per_sample(jax.random.uniform, key, shape)


def normal_like(key: Keys, x: Any) -> Any:
    """Standard normal noise with the structure and shapes of `x`."""
    shape = {name: leaf.shape for name, leaf in x.items()} if isinstance(x, dict) else x.shape
    return normal(key, shape)
