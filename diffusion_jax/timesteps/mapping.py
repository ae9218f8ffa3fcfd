"""Conversions between a time and an index, a bucket, a noise ratio or a window.

log-SNRs are the process's own (`process.log_snr`, `process.inverse_log_snr`); here are the derived units.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes.schedules import as_time, at_least, at_most, safe_log
from diffusion_jax.typing import Number, Process


def _check_count(field: str, value: int) -> None:
    if value < 1:
        raise invalid(field, value, "it must be at least 1")


@runtime_checkable
class _LogSnr(Protocol):
    def log_snr(self, t: Any) -> Any: ...
    def inverse_log_snr(self, log_snr: Any) -> Any: ...


def _with_log_snr(process: Process) -> _LogSnr:
    if not isinstance(process, _LogSnr):
        raise InvalidInput("process has no log-SNR of its own; for joint data give the process of one entry instead.")
    return process


def index_to_time(index: ArrayLike, num_steps: int) -> Array:
    """`t = (k + 1) / T`, any shape."""
    _check_count("num_steps", num_steps)
    return (jnp.asarray(index) + 1) / num_steps


def time_to_index(t: ArrayLike, num_steps: int) -> Array:
    """The index whose time is nearest: `round(T t) - 1` in 0 .. T - 1, int32, any shape."""
    _check_count("num_steps", num_steps)
    return jnp.clip(jnp.round(as_time(t) * num_steps).astype(jnp.int32) - 1, 0, num_steps - 1)


def bucket(t: ArrayLike, num_buckets: int) -> Array:
    """Which of n equal parts of [0, 1] holds t: `[i / n, (i + 1) / n)`, the last closed; int32, any shape."""
    _check_count("num_buckets", num_buckets)
    return jnp.clip(jnp.floor(as_time(t) * num_buckets).astype(jnp.int32), 0, num_buckets - 1)


def bucket_of(value: ArrayLike, edges: Any) -> Array:
    """Which interval of the rising inner `edges [n - 1]` holds `value` (a time, a log-SNR, ...): 0 .. n - 1, int32."""
    return jnp.searchsorted(jnp.asarray(edges), as_time(value), side="right").astype(jnp.int32)


def bucket_center(index: ArrayLike, num_buckets: int) -> Array:
    """The time in the middle of a bucket, any shape."""
    _check_count("num_buckets", num_buckets)
    return (jnp.asarray(index) + 0.5) / num_buckets


def noise_ratio(process: Process, t: Any) -> Any:
    """`sigma / alpha = exp(-log_snr / 2)`: the noise level of Karras et al. 2022, any shape."""
    return jnp.exp(-0.5 * _with_log_snr(process).log_snr(t))


def time_at_noise_ratio(process: Process, ratio: Any) -> Any:
    """The t at which `sigma / alpha` is `ratio`, at most 1, any shape."""
    return _within(_with_log_snr(process).inverse_log_snr(-2.0 * safe_log(as_time(ratio))))


def _within(t: Any) -> Any:
    # Unlike a clip, with the whole derivative at the ends themselves.
    return at_most(at_least(t, 0.0), 1.0)


def in_window(t: ArrayLike, low: ArrayLike, high: ArrayLike) -> Array:
    """Whether `low <= t <= high`, any shape."""
    t = as_time(t)
    return (t >= low) & (t <= high)


def log_snr_window(process: Process, low: Number, high: Number) -> tuple[Any, Any]:
    """The window of t, `(t_low, t_high)`, in which the log-SNR lies between `low` and `high`."""
    if low > high:
        raise invalid("low", low, f"it must be at most high = {high}")
    levels = _with_log_snr(process)
    return levels.inverse_log_snr(high), levels.inverse_log_snr(low)


def matching_time(process: Process, other: Process, t: Any) -> Any:
    """The t' at which `other` has the log-SNR that `process` has at t, any shape; 1 where `other` has no such noise."""
    levels, other_levels = _with_log_snr(process), _with_log_snr(other)
    log_snr = at_least(levels.log_snr(t), other_levels.log_snr(1.0))
    return _within(other_levels.inverse_log_snr(log_snr))
