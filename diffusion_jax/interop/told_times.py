"""The whole numbers that schedulers of diffusers tell a network between two nodes of their table.

They find the index of a noise level in a table of single precision and round it, or cut it off, which puts a level that
is that of a node on either side of it. A network is told the same only where the time is moved by what that precision
is worth. In double precision (jax.enable_x64) the peer is taken to compute in double precision too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.processes import GaussianProcess

MOST_MOVED = 1e-3
"""Of an index: more than single precision is worth in the tables of the published models."""


def _dtype():
    return np.dtype(jnp.result_type(float))


def _line(start: float, end: float, steps: int) -> np.ndarray:
    """Equal steps in single precision, as torch counts them: from either end to the middle."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(steps - 1, 1)))
    place = np.arange(steps)
    found = np.where(place < steps // 2, first + step * place, last - step * (steps - 1 - place))
    return found.astype(np.float32)


def peer_betas(schedule: str | None, ends: tuple[float, float], table: Any) -> np.ndarray:
    """The table of betas in the peer's precision; schedule: 'linear' or 'scaled_linear', else rounded."""
    if _dtype() == np.float32 and schedule == "linear":
        return _line(*ends, len(table))
    if _dtype() == np.float32 and schedule == "scaled_linear":
        return _line(ends[0] ** 0.5, ends[1] ** 0.5, len(table)) ** 2
    return np.asarray(table, _dtype())


def peer_noise_ratios(betas: np.ndarray) -> np.ndarray:
    """sigma / alpha of each index `[T]` as the peer's arithmetic gives it, which rounds betas, products and ratios."""
    one = _dtype().type(1)
    alpha_bar = np.cumprod((one - betas).astype(np.float64)).astype(_dtype())
    return np.sqrt((one - alpha_bar) / alpha_bar)


def peer_indices(ratios: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where `ratios [S]` lie in the rising `table [T]`, linearly in the logarithm, by the peer's arithmetic."""
    logs, log_ratios = np.log(table), np.log(np.maximum(np.asarray(ratios, np.float64), 1e-10))
    low = np.clip(np.sum(log_ratios[:, None] >= logs, axis=1) - 1, 0, len(logs) - 2)
    weight = np.clip((logs[low] - log_ratios) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def told_exactly(process: GaussianProcess, times: np.ndarray, told: np.ndarray, unit: int) -> np.ndarray:
    """`times [S]`, moved where needed, so that the network is told the whole numbers `told`.

    unit: how many of them there are from t = 0 to 1. What would have to be moved by more than `MOST_MOVED` stays.
    """
    with jax.ensure_compile_time_eval():
        found = np.asarray(process.network_time(jnp.asarray(times, _dtype())), np.float64)
    offset = 1.0 if process.time.endswith("index") else 0.0
    low = told - (0.5 if process.time == "nearest_index" else 0.0)
    value = unit * times - offset
    margin = 4 * np.finfo(_dtype()).eps * (low + 1 + offset)
    inside = np.clip(value, low + margin, low + 1 - margin)
    moved = (found != told) & (np.abs(inside - value) <= MOST_MOVED)
    return np.minimum.accumulate(np.where(moved, np.minimum((inside + offset) / unit, 1.0), times))
