"""Trajectories stitched from several denoisers: models and costs, one program for all time tables, and their gap."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, metrics, timesteps
from diffusion_jax.sampling import Samples, sample
from diffusion_jax.typing import Denoiser, Solver

INDICES = [30, 60, *range(100, 1000, 100), 999]
"""Where the gap between two models is measured: training index k is at t = (k + 1) / 1000."""


class Model(NamedTuple):
    """A denoiser, its parameters, and the work of one evaluation in units of the largest model's."""

    denoiser: Denoiser
    params: Any
    cost: float = 1.0


def stitched(models: Sequence[Model], solver: Solver, shape: tuple[int, ...]) -> Callable[..., Samples]:
    """`(key, table [S], grid [S + 1], cond=None, size=...) -> Samples`: at step i the model `table[i]` runs.

    Compiled once for all tables of one length, so a sweep over boundaries, the reverse order and runs of one model
    alone are the same program on other values. `run.carry.values` is x before each step, `[S, size, ...]`.
    """
    params = tuple(model.params for model in models)

    @partial(jax.jit, static_argnames="size")
    def run(key, params, table, grid, cond, size):
        d = denoisers.switched([model.denoiser for model in models], table, [model.cost for model in models])
        d = denoisers.recorded(d, len(table), lambda prediction, x, step: x)
        return sample(key, d, params, solver, grid, shape=(size, *shape), cond=cond)

    def sampler(key: Any, table: Any, grid: Any, cond: Any = None, *, size: int) -> Samples:
        return run(key, params, jnp.asarray(table, jnp.int32), grid, cond, size)

    return sampler


def stitch_table(steps: int, *shares: float) -> np.ndarray:
    """The first of `shares[0]` of the steps, then the next; the last model has the rest: int32 `[S]`."""
    return np.asarray(_table(steps, shares))


@partial(jax.jit, static_argnums=0)
def _table(steps, shares):
    return denoisers.time_table(denoisers.by_share(*shares), jnp.linspace(1.0, 0.0, steps + 1))


def backwards(steps: int, share: float, large: int) -> np.ndarray:
    """The wrong way round: model 0 has the last `share` of the steps, model `large` all before."""
    return np.where(stitch_table(steps, 1.0 - share) == 0, large, 0).astype(np.int32)


def relative_cost(table: np.ndarray, models: Sequence[Model]) -> float:
    """The work of a run by `table`, in units of a run of the last model alone."""
    return float(np.mean([models[index].cost for index in table]) / models[-1].cost)


def padded_run(which: np.ndarray, steps: int) -> tuple[np.ndarray, Any]:
    """The table and its grid of equal steps, padded to `steps`; model 0 is asked at those that stand still."""
    grid = timesteps.linspace(len(which))
    return np.pad(which, (0, steps - len(which))), timesteps.padded(grid, steps)


def gap_times() -> list[float]:
    """The times of `INDICES`."""
    return [(index + 1) / 1000 for index in INDICES]


def gap(key: Any, first: Model, second: Model, x0: Any, cond: Any = None) -> list[float]:
    """`metrics.epsilon_gap` of two models at `gap_times()`."""
    pair, params = (first.denoiser, second.denoiser), (first.params, second.params)
    return metrics.epsilon_gap(key, pair, params, x0, gap_times(), cond).tolist()
