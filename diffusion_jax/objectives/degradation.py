"""Training inputs made of imperfect data, as the later steps of a run meet them, with the true data as the target.

A run noises nothing: at time t it holds what its own earlier answers made of x, errors included. Noising
`base = degrade(key, x0, t)` in the place of x0 shows the network such inputs (Pang et al. 2025, ADDP),

    x_t = alpha base + sigma eps,       target(x0, (x_t - alpha x0) / sigma).                                      (1)

The target's eps grows as alpha / sigma where base is not x0: train x0, or weigh low noise down
(`timesteps.low_noise_weight`). What is degraded is the answer inside x_t, never its condition or the target.

Degradations are functions `(key, x0, t) -> base` of one example, whose strength a(t) = amount (1 - t) grows as the
noise falls. At t = 1 and at amount 0 the base is x0, bit for bit. Those of pictures take x0 `[H, W, C]` and a scalar t.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import example_keys
from diffusion_jax.randomness import fold
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Number, Objective

Degrade = Callable[[Any, Any, Any], Any]
"""`(key, x0 [...], t) -> base [...]` of one example."""


def degraded(objective: Objective, degrade: Degrade) -> Objective:
    """`objective` on batches whose `base`, equation (1), is `degrade(key, x0, t)` at the times that it draws.

    objective: one that noises x0: `denoising`, `consistency`, `progressive`, `mean_flow`, `shortcut`, and what wraps
        them. degrade: of one example `[...]`, its t a scalar or what is left of a prefix of the data's shape; it is
        called with a key of the example, and may depend on nothing else. A batch that has a "base" keeps it.
    Raises InvalidInput for joint data, and for an objective that does not draw its times before the loss.
    """
    if not callable(degrade):
        raise invalid("degrade", degrade, "a function (key, x0, t) is needed, such as perturbed()")
    draw = objective.prepare
    if draw is None:
        raise InvalidInput("degraded needs an objective that draws times before its loss (Objective.prepare).")

    def prepare(state, batch, key):
        batch = draw(state, batch, key)
        if "base" in batch:
            return batch
        if isinstance(batch["x0"], Mapping):
            raise InvalidInput(f"degrade is for data of one array; these have {', '.join(sorted(batch['x0']))}.")
        keys = fold(example_keys(key, batch["index"]), 3)
        return {**batch, "base": jax.vmap(degrade)(keys, batch["x0"], batch["t"])}

    def loss(params, state, batch, key):
        return objective.loss(params, state, prepare(state, batch, key), key)

    def gradient(params, state, batch, key):
        assert objective.gradient is not None
        return objective.gradient(params, state, prepare(state, batch, key), key)

    return Objective(objective.init, loss, prepare, objective.gradient and gradient)


def perturbed(amount: Number = 0.3) -> Degrade:
    """`x0 + a(t) n` with n ~ N(0, I), of any shape."""
    _check(amount)
    return lambda key, x0, t: x0 + expand(amount * (1.0 - t), x0) * jax.random.normal(key, x0.shape, x0.dtype)


def tinted(amount: Number = 0.3, cells: int = 1) -> Degrade:
    """A smooth random field is added: `cells` x `cells` numbers of N(0, a(t)^2) a channel, interpolated.

    One cell shifts the colour of the whole picture, a few distort low frequencies.
    """
    _check(amount, cells)

    def degrade(key, x0, t):
        return x0 + _strength(amount, t, x0) * _field(key, x0, cells, x0.shape[2])

    return degrade


def warped(pixels: Number = 1.0, cells: int = 1) -> Degrade:
    """What stands at each pixel comes from another one, away by a smooth random field of N(0, a(t)^2) pixels.

    One cell moves the whole picture, more deform it. Beyond the border is what is nearest to it.
    """
    _check(pixels, cells)

    def degrade(key, x0, t):
        away = _strength(pixels, t, x0) * _field(key, x0, cells, 2)
        rows, columns = jnp.meshgrid(*(jnp.arange(size, dtype=x0.dtype) for size in x0.shape[:2]), indexing="ij")
        places = [rows + away[..., 0], columns + away[..., 1]]
        return jax.vmap(lambda plane: map_coordinates(plane, places, 1, "nearest"), 2, 2)(x0)

    return degrade


def blurred(pixels: Number = 1.0) -> Degrade:
    """A Gaussian blur of standard deviation a(t) pixels; at the border the weights that are left count as all."""
    _check(pixels)

    def degrade(key, x0, t):
        width = jnp.maximum(_strength(pixels, t, x0), 1e-4)
        for axis in (0, 1):
            place = jnp.arange(x0.shape[axis])
            weights = jnp.exp(-0.5 * jnp.square((place[:, None] - place) / width))
            weights = weights / weights.sum(axis=1, keepdims=True)
            x0 = jnp.moveaxis(jnp.tensordot(weights, x0, axes=(1, axis)), 0, axis)
        return x0

    return degrade


def thickened(amount: Number = 1.0, radius: int = 1) -> Degrade:
    """Bright regions grow or shrink: `x0 + |s| (extremum - x0)` with s uniform in [-a(t), a(t)], at most 1.

    The extremum is the maximum of the window of 2 radius + 1 pixels where s is positive, else the minimum.
    """
    _check(amount, radius)

    def degrade(key, x0, t):
        share = jnp.clip(_strength(amount, t, x0) * jax.random.uniform(key, minval=-1.0, maxval=1.0), -1.0, 1.0)
        sign, side = jnp.where(share < 0, -1.0, 1.0), 2 * radius + 1
        largest = jax.lax.reduce_window(sign * x0, -jnp.inf, jax.lax.max, (side, side, 1), (1, 1, 1), "SAME")
        return x0 + jnp.abs(share) * (sign * largest - x0)

    return degrade


def one_after_another(parts: Sequence[Degrade]) -> Degrade:
    """All degradations in turn, each with a key of its own."""
    if not isinstance(parts, Sequence) or not parts or not all(map(callable, parts)):
        raise invalid("parts", parts, "a sequence of one degradation at least is needed, such as [perturbed()]")

    def degrade(key, x0, t):
        for i, part in enumerate(parts):
            x0 = part(fold(key, i), x0, t)
        return x0

    return degrade


def _check(amount: Number, count: int = 1) -> None:
    if not amount >= 0 or count < 1:
        raise invalid("the amount and size of a degradation", (amount, count), "none negative, and a size from 1 up")


def _strength(amount, t, x0):
    if x0.ndim != 3 or jnp.ndim(t):
        told = (x0.shape, jnp.shape(t))
        raise invalid("the shapes of x0 and t in a degradation", told, "one picture [H, W, C] at one time is needed")
    return amount * (1.0 - t)


def _field(key, x0, cells, channels):
    values = jax.random.normal(key, (cells, cells, channels), x0.dtype)
    return jax.image.resize(values, (*x0.shape[:2], channels), "linear")
