"""Inputs and predictions of a denoiser during a run, kept in its carry: for calibration, and for pictures.

`sample(...).run.carry` of a recorded denoiser is `Recorded`, with one entry per step of the run. Methods that are
calibrated on trajectories and pictures of predictions through time use the same recording.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.clock import some_step
from diffusion_jax.errors import invalid
from diffusion_jax.time_axes import batch_axes
from diffusion_jax.typing import Denoiser, Prediction, Step


class Recorded(NamedTuple):
    """A recording. inner: the carry of the recorded denoiser. values: what was read, `[S, ...]` a leaf, by step."""

    inner: Any
    values: Any


def predicted_x0(prediction: Prediction, x: Any, step: Step) -> Any:
    """The clean sample as it was predicted at each step (DT-visualisation, Gandikota & Bau 2025)."""
    return prediction.x0


def recorded(
    inner: Denoiser, num_steps: int, read: Callable[[Prediction, Any, Step], Any] = predicted_x0, axes: Any = 0
) -> Denoiser:
    """`inner`, whose predictions are read into `Recorded.values[step.index]` and returned unchanged.

    num_steps: S, steps of the run.
    read: `(prediction, x, step) -> pytree`, such as `lambda prediction, x, step: {"x": x, "x0": prediction.x0}`. With a
        solver of several evaluations per step, the last one of the step is kept.
    axes: the batch axes of what is read, see `typing.BatchAxes`.
    Raises InvalidInput unless `num_steps` is positive.
    """
    if num_steps < 1:
        raise invalid("num_steps", num_steps, "it must be positive")

    def ask(params, carry, x, step, cond):
        prediction, carry = inner.apply(params, carry, x, step, cond)
        return prediction, carry, read(prediction, x, step)

    def init(params, x, cond):
        carry = inner.init(params, x, cond)
        shapes = jax.eval_shape(lambda: ask(params, carry, x, some_step(x, num_steps), cond)[2])
        return Recorded(carry, jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), shapes))

    def apply(params, carry, x, step, cond):
        prediction, kept, value = ask(params, carry.inner, x, step, cond)
        values = jax.tree.map(lambda all, one: all.at[step.index].set(one), carry.values, value)
        return prediction, Recorded(kept, values)

    # Behind the steps; None stays what it is, a tree without leaves.
    by_step = jax.tree.map(lambda axis: axis + 1, axes)
    return Denoiser(init, apply, inner.process, lambda carry: Recorded(batch_axes(inner, carry.inner), by_step))
