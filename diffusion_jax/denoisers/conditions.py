"""Conditions as a function of the step: switches, blends, tables, and intervals without a condition.

A schedule is a function `(cond, step) -> cond`; `scheduled_condition` puts it in front of a denoiser. The conditions
themselves stay arguments of the run, with the batch first, so they are sharded and indexed like the samples. Each
sample is at one time here: where t has more axes, or a modality each, the noisiest entry decides.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax.clock import single_step
from diffusion_jax.denoisers.scales import Scale, check_scale, is_static, value_at
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser, Step

ConditionSchedule = Callable[[Any, Step], Any]


def null_condition(cond: Any, null: Any, size: int | None = None) -> Any:
    """`cond` with the entries that `null` names replaced, broadcast to the batch; the others are kept.

    null: a dict such as `{"label": 10}` whose leaves broadcast to those of `cond`, or a function `cond -> cond`
        (a negative prompt per sample then travels in `cond`: `lambda c: {**c, "context": c["negative"]}`; what a
        network's conditions themselves have for nothing said is `partial(models.empty_condition, conditions)`).
    size: B, to which a condition without a batch axis is broadcast.
    """
    if callable(null):
        return null(cond)
    if cond is None:
        raise InvalidInput(f"cond is None, but the null condition {sorted(null)} replaces entries of a condition.")
    for name in null:
        if name not in cond:
            raise unknown("an entry of null", name, cond)

    def broadcast(value, leaf):
        leaf = jnp.asarray(leaf)
        shape = leaf.shape if leaf.shape or size is None else (size,)
        if jnp.issubdtype(leaf.dtype, jnp.integer) and not isinstance(value, Tracer):
            bounds, numbers = jnp.iinfo(leaf.dtype), np.asarray(value)
            if not (bounds.min <= numbers.min() and numbers.max() <= bounds.max):
                raise invalid("the null condition", numbers.tolist(), f"the condition's {leaf.dtype} does not hold it")
        value = jnp.asarray(value).astype(leaf.dtype)
        try:
            return jnp.broadcast_to(value, shape)
        except ValueError:
            raise invalid("the null condition's shape", value.shape, f"it must broadcast to {shape}") from None

    def replace(value, entry):
        if isinstance(entry, Mapping) and isinstance(value, Mapping):
            return null_condition(entry, value, size)
        return jax.tree.map(lambda leaf: broadcast(value, leaf), entry)

    return {**cond, **{name: replace(value, cond[name]) for name, value in null.items()}}


def check_null(null: Any) -> None:
    """Raises InvalidInput unless `null` is a non-empty dict or a function of the condition."""
    if callable(null) or (isinstance(null, Mapping) and null):
        return
    raise invalid("null", null, "the null condition was expected, such as {'label': 10}, or a function cond -> cond")


def sample_time(t: Any) -> Any:
    """t as one number per sample, `[]` or `[B]`: that of the noisiest entry."""
    times = [
        leaf if jnp.ndim(leaf) < 2 else jnp.max(leaf, axis=tuple(range(1, jnp.ndim(leaf))))
        for leaf in jax.tree.leaves(t)
    ]
    largest = times[0]
    for time in times[1:]:
        largest = jnp.maximum(largest, time)
    return jnp.asarray(largest)


def scheduled_condition(denoiser: Denoiser, schedule: ConditionSchedule) -> Denoiser:
    """Asks `denoiser` with `schedule(cond, step)`. Its shapes must not depend on the step."""

    def init(params, x, cond):
        return denoiser.init(params, x, schedule(cond, single_step(jnp.float32(1))))

    def apply(params, carry, x, step, cond):
        return denoiser.apply(params, carry, x, step, schedule(cond, step))

    return denoiser._replace(init=init, apply=apply)


def switched_condition(at: Any = 0.5) -> ConditionSchedule:
    """`cond["early"]` while t > at, `cond["late"]` from there on (prompt editing, Hertz et al. 2022, section 3).

    Where only one of the two has an entry, it is always there.
    """
    if not is_static(at) and not hasattr(at, "shape"):
        raise invalid("at", at, "a time in [0, 1] was expected")

    def schedule(cond, step):
        early, late = _two(cond, "early", "late")
        return _merge(early, late, lambda a, b: _where(sample_time(step.t) > at, a, b))

    return schedule


def blended_condition(weight: Scale) -> ConditionSchedule:
    """`(1 - w) cond["early"] + w cond["late"]` for a weight w by step; for embeddings, not for labels or tokens."""
    check_scale("weight", weight)

    def schedule(cond, step):
        early, late = _two(cond, "early", "late")
        w = value_at(weight, step)

        def blend(a, b):
            if not jnp.issubdtype(a.dtype, jnp.floating):
                raise InvalidInput(
                    f"blended_condition mixes embeddings; an entry has dtype {a.dtype}, use switched_condition."
                )
            share = expand(w, a).astype(a.dtype)
            return a + share * (b - a)

        return _merge(early, late, blend)

    return schedule


def condition_by_step() -> ConditionSchedule:
    """A table: the leaves of `cond` are `[B, S, ...]`; step i uses entry i, and later steps use the last one."""

    def schedule(cond, step):
        if cond is None:
            raise InvalidInput("condition_by_step needs a cond whose leaves are [B, S, ...]; cond is None.")

        def entry(leaf):
            leaf = jnp.asarray(leaf)
            if leaf.ndim < 2:
                raise invalid("a shape in cond", leaf.shape, "condition_by_step needs leaves [B, S, ...]")
            return jnp.take(leaf, step.index, axis=1, mode="clip")

        return jax.tree.map(entry, cond)

    return schedule


def dropped_condition(null: Any = None, low: Any = 0.0, high: Any = 1.0) -> ConditionSchedule:
    """The null condition where `low <= t <= high`, the given one elsewhere.

    null: as in `guided`: the entries to replace, e.g. `{"label": 10}`.
    """
    check_null(null)
    if is_static(low) and is_static(high) and low > high:
        raise invalid("low, high", (low, high), "low must not exceed high")

    def schedule(cond, step):
        if not isinstance(cond, Mapping):
            raise InvalidInput(f"dropped_condition needs a condition to drop; cond is {cond!r}.")
        empty = null_condition(cond, null)
        t = sample_time(step.t)
        return jax.tree.map(lambda a, b: a if a is b else _where((t >= low) & (t <= high), b, a), cond, empty)

    return schedule


def _two(cond, *names):
    if not isinstance(cond, Mapping) or set(cond) != set(names):
        raise InvalidInput(
            f"This schedule needs cond={{{', '.join(f'{n!r}: ...' for n in names)}}}; cond has {cond and sorted(cond)}."
        )
    return tuple(cond[name] for name in names)


def _merge(early, late, choose):
    merged = {**early, **late}
    for name in set(early) & set(late):
        merged[name] = jax.tree.map(lambda a, b: _same_shape(name, a, b, choose), early[name], late[name])  # noqa: B023
    return merged


def _same_shape(name, early, late, choose):
    early, late = jnp.asarray(early), jnp.asarray(late)
    if early.shape != late.shape:
        raise invalid(f"cond['late'][{name!r}].shape", late.shape, f"it must be that of cond['early'], {early.shape}")
    return choose(early, late)


def _where(mask, a, b):
    a, b = jnp.asarray(a), jnp.asarray(b)
    like = a if a.ndim else jnp.broadcast_to(a, jnp.shape(mask) or ())
    return jnp.where(expand(mask, like), a, b)
