"""Scales: a strength as a function of the step, for guidance, gradients and the mixing of conditions.

A scale is a number, an array `[S, *prefix]` by step index (the last entry serves any later step; a first axis of 1
serves them all, so `[1, B]` is one value per sample), or a function `step -> array` whose shape is a prefix of the
data's. Joint data may have a dict of the latter two. Values of arrays may be traced: nothing here branches on them,
so changing them never recompiles. What a scale is multiplied with is decided where it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.processes import members
from diffusion_jax.typing import Number, Step

Scale = Number | Array | np.ndarray | Sequence[Any] | Mapping[str, Any] | Callable[[Step], Any]
"""A number, an array (or a list) by step `[S, *prefix]`, a dict of arrays, or a function of the step."""

UNITS = ("t", "log_snr")


def check_scale(field: str, scale: Any) -> None:
    """Raises InvalidInput for what is not a scale, and for a known one that is NaN or infinite."""
    if callable(scale):
        return
    for values in scale.values() if isinstance(scale, Mapping) else [scale]:
        try:
            values = jnp.asarray(values)
            numeric = jnp.issubdtype(values.dtype, jnp.number) and values.size > 0
        except (TypeError, ValueError):
            numeric = False
        if not numeric:
            raise invalid(field, scale, "a number, an array by step or a function of the step was expected")
        if not isinstance(values, Tracer) and not np.isfinite(np.asarray(values)).all():
            raise invalid(field, scale, "finite numbers were expected")


def is_static(scale: Any) -> bool:
    """Whether `scale` is a plain Python number, on which a program may be specialised."""
    return isinstance(scale, (int, float)) and not isinstance(scale, bool)


def value_at(scale: Scale, step: Step) -> Any:
    """The scale at `step`: an array with a prefix shape, a dict of those for joint data, or the number itself."""
    if is_static(scale):
        return scale
    if callable(scale):
        return jax.tree.map(jnp.asarray, scale(step))
    if isinstance(scale, Mapping):
        return {name: _entry(values, step.index) for name, values in scale.items()}
    return _entry(scale, step.index)


def _entry(values, index):
    values = jnp.asarray(values)
    return values if values.ndim == 0 else jnp.take(values, index, axis=0, mode="clip")


def inside(t: Any, low: Any, high: Any, unit: str = "t", process: Any = None) -> Any:
    """Where `low <= t <= high`, with the shape of t; bounds on log(alpha^2 / sigma^2) when `unit` is "log_snr"."""
    if isinstance(t, dict):
        parts = {} if process is None else members(process)
        return {name: inside(value, low, high, unit, parts.get(name, process)) for name, value in t.items()}
    value = jnp.asarray(t) if unit == "t" else process.log_snr(t)
    return (value >= low) & (value <= high)


def check_interval(field: str, bounds: Any, unit: str, process: Any) -> None:
    """Raises InvalidInput unless `bounds` is None or a rising pair in a unit that `process` knows."""
    if unit not in UNITS:
        raise unknown(f"{field}_unit", unit, UNITS)
    if bounds is None:
        return
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise invalid(field, bounds, "a pair (low, high) was expected")
    if all(map(is_static, bounds)) and not bounds[0] <= bounds[1]:
        raise invalid(field, bounds, "low must not exceed high, and neither be NaN")
    if unit == "log_snr" and process is None:
        raise invalid(f"{field}_unit", unit, "it needs a process with a log_snr; use 't'")


def interval_scale(
    scale: Scale = 3.0, low: Any = 0.2, high: Any = 0.8, outside: Any = 1.0, unit: str = "t", process: Any = None
) -> Callable[[Step], Any]:
    """`scale` where `low <= t <= high`, `outside` elsewhere (Kynkäänniemi et al. 2024).

    outside: the value that means "none": 1 for guidance (which then costs one evaluation), 0 for gradients.
    unit: "t", or "log_snr" for bounds on log(alpha^2 / sigma^2) of `process`.
    """
    check_scale("scale", scale)
    check_interval("interval", (low, high), unit, process)

    def at(step):
        active = inside(step.t, low, high, unit, process)
        value = value_at(scale, step)
        return _zip(lambda mask, v: jnp.where(mask, _align(v, mask), outside), active, value)

    return at


def _align(value, mask):
    """Gives a value `[B]` the trailing axes of a mask `[B, N]`."""
    value = jnp.asarray(value, jnp.result_type(float))
    return value.reshape(value.shape + (1,) * max(0, jnp.ndim(mask) - value.ndim)) if value.ndim else value


def _zip(function, left, right):
    if isinstance(left, dict):
        return {name: function(leaf, right[name] if isinstance(right, dict) else right) for name, leaf in left.items()}
    if isinstance(right, dict):
        return {name: function(left, leaf) for name, leaf in right.items()}
    return function(left, right)


def linear_scale(start: Any = 1.0, end: Any = 4.0) -> Callable[[Step], Any]:
    """`end + (start - end) t`: `start` at the prior (t = 1), `end` at the data (t = 0)."""
    return _ramp(start, end, lambda t: t)


def cosine_scale(start: Any = 1.0, end: Any = 4.0) -> Callable[[Step], Any]:
    """`end + (start - end) (1 - cos(pi t)) / 2`: from `start` at the prior to `end` at the data, flat at both."""
    return _ramp(start, end, lambda t: 0.5 * (1.0 - jnp.cos(jnp.pi * t)))


def _ramp(start, end, share):
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, (str, bool)) or value is None:
            raise invalid(name, value, "a number was expected")
    return lambda step: jax.tree.map(lambda t: end + (start - end) * share(jnp.asarray(t)), step.t)


def sample_scale(values: Any = (1.0,)) -> Callable[[Step], Any]:
    """One value per sample, `[B]`, the same at every step."""
    values = jnp.asarray(values, jnp.result_type(float))
    if values.ndim != 1:
        raise invalid("values.shape", values.shape, "one value per sample, [B], was expected")
    return lambda step: values
