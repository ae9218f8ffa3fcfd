"""Optimisers and learning-rate schedules by public constructor, through optax.

An `Optimizer` is an optax gradient transformation that also knows its learning rate, so that the loop can log it.
Any optax transformation works in its place. Gradient clipping, skipping of non-finite steps and averages of the
parameters belong to the step.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffusion_jax.distributed import path_name
from diffusion_jax.errors import invalid, unknown

RateSchedule = Callable[[Any], Array]


class Optimizer(NamedTuple):
    """init: params -> state. update: (grads, state, params) -> (updates, state). learning_rate: count -> rate."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    learning_rate: RateSchedule


def constant(value: float = 1e-4, warmup_steps: int = 0) -> RateSchedule:
    """`value`, after a linear rise from 0 over `warmup_steps`."""
    _positive("value", value)
    _steps("warmup_steps", warmup_steps)
    return lambda count: value * _rise(count, warmup_steps)


def cosine(
    peak: float = 1e-4, total_steps: int | None = None, warmup_steps: int | float = 0, end: float = 0.0
) -> RateSchedule:
    """A linear rise to `peak`, then half a cosine down to `end` at `total_steps` (Loshchilov & Hutter 2017).

    total_steps: the length of the run when left out of a config (`train.steps`); needed elsewhere.
    warmup_steps: of the rise; a number below 1, such as 0.05, is a share of `total_steps`.
    """
    span = _span(peak, total_steps, warmup_steps, end)
    return _rise_and_fall(peak, *span, lambda share: end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * share)))


def linear(
    peak: float = 1e-4, total_steps: int | None = None, warmup_steps: int | float = 0, end: float = 0.0
) -> RateSchedule:
    """A linear rise to `peak`, then a line down to `end` at `total_steps`.

    total_steps: the length of the run when left out of a config (`train.steps`); needed elsewhere.
    warmup_steps: of the rise; a number below 1, such as 0.05, is a share of `total_steps`.
    """
    span = _span(peak, total_steps, warmup_steps, end)
    return _rise_and_fall(peak, *span, lambda share: peak + (end - peak) * share)


def _rise_and_fall(peak: float, total: int, rise: int, fall: Callable[[Any], Any]) -> RateSchedule:
    """A line to `peak` over `rise` steps, then `fall` of the share of the other steps that is done."""

    def schedule(count):
        share = jnp.clip((count - rise) / (total - rise), 0.0, 1.0)
        return jnp.where(count < rise, peak * _rise(count, rise), fall(share))

    return schedule


def inverse_sqrt(peak: float = 1e-4, flat_steps: int = 10_000, warmup_steps: int = 0) -> RateSchedule:
    """A linear rise, `peak` until `flat_steps`, then `peak / sqrt(count / flat_steps)` (Karras et al. 2024, eq. 67)."""
    _positive("peak", peak)
    _steps("warmup_steps", warmup_steps)
    if flat_steps < 1:
        raise invalid("flat_steps", flat_steps, "it must be at least 1")
    return lambda count: peak * _rise(count, warmup_steps) / jnp.sqrt(jnp.maximum(count / flat_steps, 1.0))


def _rise(count, warmup_steps):
    # Counts from 1, so that the very first step already moves.
    return jnp.minimum((count + 1) / max(warmup_steps, 1), 1.0)


def adamw(
    learning_rate: float | RateSchedule = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decayed: str = r"kernel$",
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019). `decayed`: a regex of the paths of the parameters that decay."""
    rate = _rate(learning_rate)
    _unit(b1=b1, b2=b2)
    mask = _mask("decayed", decayed)
    return _named(optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask), rate)


def adafactor(
    learning_rate: float | RateSchedule = 1e-4,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    weight_decay: float | None = None,
    decayed: str = r"kernel$",
    multiply_by_parameter_scale: bool = False,
) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018): second moments kept as row and column means."""
    rate = _rate(learning_rate)
    transformation = optax.adafactor(
        rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        # optax adds this decay after scaling, so it is given the rate here to mean the same as in AdamW.
        weight_decay_rate=None if weight_decay is None else (lambda count: weight_decay * rate(count)),
        weight_decay_mask=_mask("decayed", decayed),
        multiply_by_parameter_scale=multiply_by_parameter_scale,
    )
    return _named(transformation, rate)


def muon(
    learning_rate: float | RateSchedule = 2e-3,
    beta: float = 0.95,
    weight_decay: float = 0.0,
    adam_learning_rate: float | RateSchedule | None = None,
    matrices: str = r"kernel$",
    excluded: str = r"(embed|final|head|patch)",
    consistent_rms: float | None = 0.2,
) -> Optimizer:
    """Muon (Jordan et al. 2024): momentum orthogonalised by Newton-Schulz for matrices, Adam for the rest.

    matrices: regex of the paths that are matrices; the last two dimensions are one, leading ones (depth) are batched.
    excluded: regex of those that are not (embeddings and the last layer), which Adam trains.
    consistent_rms: scales updates to this RMS, so that AdamW's rates carry over (Liu et al. 2025); None: no scaling.
    """
    rate = _rate(learning_rate)
    _unit(beta=beta)
    is_matrix, is_excluded = _regex("matrices", matrices), _regex("excluded", excluded)

    def dimensions(params):
        def of(path, leaf):
            name = path_name(path)
            if leaf.ndim >= 2 and is_matrix.search(name) and not is_excluded.search(name):
                return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
            return None

        return jax.tree_util.tree_map_with_path(of, params)

    transformation = optax.contrib.muon(
        rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_learning_rate=None if adam_learning_rate is None else _rate(adam_learning_rate),
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=consistent_rms,
    )
    return _named(transformation, rate)


def sgd(learning_rate: float | RateSchedule = 1e-2, momentum: float | None = None, nesterov: bool = False) -> Optimizer:
    """Stochastic gradient descent, with momentum if given."""
    rate = _rate(learning_rate)
    return _named(optax.sgd(rate, momentum, nesterov), rate)


def alternating(parts: Mapping[str, Any], every: Mapping[str, int] | None = None) -> optax.GradientTransformation:
    """One optimiser for each entry of the parameters, each at its own pace: networks that are trained in turns.

    parts: `{entry: optimiser}`, the same entries as the parameters have. every: `{entry: k}`: it moves in the steps
    0, k, 2k, ... and is left alone in others, its moments and its schedule's count included; k = 1 when left out.
    Raises InvalidInput for entries that `parts` lacks, k below 1, and other parameters.
    """
    every = dict(every or {})
    for name, k in every.items():
        if name not in parts:
            raise unknown("an entry of every", name, parts)
        if k < 1:
            raise invalid(f"every[{name!r}]", k, "it must be at least 1")

    def at_pace(k, part):
        return optax.conditionally_mask(part, lambda step, **_: step % k == 0)

    paced = {name: at_pace(every.get(name, 1), part) for name, part in parts.items()}

    def init(params):
        if set(params) != set(paced):
            raise invalid("parts", sorted(paced), f"one optimiser for each of {', '.join(sorted(params))} is needed")
        return {name: part.init(params[name]) for name, part in paced.items()}

    def update(updates, state, params=None):
        both = {
            name: part.update(updates[name], state[name], None if params is None else params[name])
            for name, part in paced.items()
        }
        return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}

    return optax.GradientTransformation(init, update)


def until(optimizer: optax.GradientTransformation | Optimizer, steps: int = 4000) -> Any:
    """`optimizer` in the first `steps` steps; afterwards nothing moves, whatever its momentum and weight decay.

    Raises InvalidInput for a negative number of steps.
    """
    _steps("steps", steps)
    inner: Any = optimizer
    masked = optax.conditionally_mask(inner, lambda step, **_: jnp.asarray(step) < steps)
    if isinstance(optimizer, Optimizer):
        return Optimizer(masked.init, masked.update, optimizer.learning_rate)
    return masked


def below_norm(optimizer: optax.GradientTransformation | Optimizer, norm: float | int = 15.0) -> Any:
    """`optimizer` without the steps whose gradient has a global norm above `norm`: nothing moves in them, its moments
    and its schedule's count included (Zhao et al. 2025, DyDiT). It sees gradients as they are after any clipping.

    Raises InvalidInput unless `norm` is positive.
    """
    _positive("norm", norm)

    def update(updates, state, params=None):
        small = optax.tree.norm(updates) <= norm
        updates, new = optimizer.update(updates, state, params)
        return jax.tree.map(lambda leaf: jnp.where(small, leaf, jnp.zeros_like(leaf)), updates), jax.tree.map(
            lambda after, before: jnp.where(small, after, before), new, state
        )

    if isinstance(optimizer, Optimizer):
        return Optimizer(optimizer.init, update, optimizer.learning_rate)
    return optax.GradientTransformation(optimizer.init, update)


def _named(transformation: optax.GradientTransformation, rate: RateSchedule) -> Optimizer:
    return Optimizer(transformation.init, transformation.update, rate)


def _rate(learning_rate: float | RateSchedule) -> RateSchedule:
    if callable(learning_rate):
        return learning_rate
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)):
        raise invalid("learning_rate", learning_rate, "a positive number or a schedule is needed")
    _positive("learning_rate", learning_rate)
    return constant(learning_rate)


def _positive(field: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise invalid(field, value, "it must be positive and finite")


def _steps(field: str, value: int | float) -> None:
    if not 0 <= value < float("inf"):
        raise invalid(field, value, "it must be finite and not negative")


def _span(peak: float, total_steps: int | None, warmup_steps: int | float, end: float) -> tuple[int, int]:
    """The steps of a schedule, and those of its rise."""
    _positive("peak", peak)
    _steps("warmup_steps", warmup_steps)
    if not 0 <= end < float("inf"):
        raise invalid("end", end, "it must be finite and not negative")
    if total_steps is None:
        raise invalid("total_steps", total_steps, "the number of steps is needed: only a config knows that of its run")
    if warmup_steps >= 1 and warmup_steps != warmup_steps // 1:
        raise invalid("warmup_steps", warmup_steps, "a whole number is needed, or a share of total_steps below 1")
    rise = int(warmup_steps) if warmup_steps >= 1 else round(warmup_steps * total_steps)
    if total_steps <= rise:
        expected = f"it must be larger than warmup_steps, {warmup_steps}; a share such as 0.05 follows train.steps"
        raise invalid("total_steps", total_steps, expected)
    return total_steps, rise


def _unit(**values: float) -> None:
    for field, value in values.items():
        if not 0 <= value < 1:
            raise invalid(field, value, "it must be at least 0 and below 1")


def _regex(field: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise invalid(field, pattern, f"a regular expression is needed ({error})") from None


def _mask(field: str, pattern: str) -> Callable[[Any], Any]:
    regex = _regex(field, pattern)
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: bool(regex.search(path_name(path))), params
    )
