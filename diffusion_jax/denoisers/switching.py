"""Several denoisers of one process: one of them at each step, or a weighted mean of all.

The parameters are a tuple with one entry per denoiser. The networks may predict different quantities, since all are
converted to x0 and eps. A network that was trained on another schedule joins through `matching.on_process`.

Which one runs is a rule, a function of the step: `by_share`, `by_time` and `by_log_snr` put boundaries between the
denoisers, whose values may be traced, so that moving them compiles nothing; `by_interval` puts one of two denoisers in
the middle. `time_table` is what a rule comes to on a grid. Each denoiser brings its own guidance and its own view of
the condition, since transformations nest:
`switched((guided(scheduled_condition(small, lambda cond, step: cond["small"]), 1.5, null), large))`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from diffusion_jax.clock import as_grid, clock, num_steps
from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.denoisers.conditions import sample_time
from diffusion_jax.denoisers.scales import is_static
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes import is_joint, members
from diffusion_jax.time_axes import batch_axes, each
from diffusion_jax.typing import Cost, Denoiser, Number, Step


class SwitchedCarry(NamedTuple):
    """carries: one a denoiser. last: the denoiser that ran last, -1 before the first."""

    carries: Any
    last: Any


def by_time(*boundaries: Any) -> Callable[[Step], Any]:
    """Index 0 while t > boundaries[0], 1 while boundaries[0] >= t > boundaries[1], and so on: falling boundaries.

    A t within 1e-6 of a boundary is at the boundary. The step is scalar here: with a time per sample the noisiest
    decides for the batch.
    """
    _check_boundaries(boundaries, falling=True)
    return lambda step: _passed(jnp.max(sample_time(step.t)) <= jnp.asarray(boundaries) + 1e-6)


def by_interval(low: Any, high: Any) -> Callable[[Step], Any]:
    """Index 1 while low < t <= high, and 0 elsewhere: one denoiser in an interval of times, another around it.

    With a specialist, trained on `timesteps.restricted(draw, low, high)`, inside and the joint network outside, samples
    that are better than the joint network's show that joint training harms that interval (negative transfer, Go et al.
    2023). A step belongs to the t that it leaves. Within 1e-6 of an edge is at it; the noisiest sample decides.
    """
    if is_static(low) and is_static(high) and not low < high:
        raise invalid("low", low, f"a number below high = {high} was expected")

    def rule(step):
        t = jnp.max(sample_time(step.t))
        return ((t > low + 1e-6) & (t <= high + 1e-6)).astype(jnp.int32)

    return rule


def by_log_snr(process: Any, *boundaries: Any) -> Callable[[Step], Any]:
    """Index 0 while log(alpha^2 / sigma^2) < boundaries[0], and so on: rising boundaries, in units of no schedule.

    The same boundaries mean the same noise on every process. Within 1e-4 of a boundary is at it; the noisiest sample
    decides. Raises InvalidInput for a process without a log-SNR.
    """
    _check_boundaries(boundaries, falling=False)
    if is_joint(process):
        raise invalid("process", process, "boundaries in log-SNR need a process that has one; use by_time")
    return lambda step: _passed(process.log_snr(jnp.max(sample_time(step.t))) >= jnp.asarray(boundaries) - 1e-4)


def by_share(*shares: Any) -> Callable[[Step], Any]:
    """Index 0 for the first `shares[0]` of the S steps, 1 for the next `shares[1]`, and so on; the last has the rest.

    Half-open: step i is past a boundary at the cumulative share c unless `i < floor(c S + 1/2)`. So a share of 0 runs
    nothing and a share of 1 everything, and on a grid of equal steps it is `by_time` with boundaries 1 - c.
    shares: one fewer than there are denoisers, each at least 0, with a sum of at most 1.
    """
    if not shares:
        raise invalid("shares", shares, "at least one share of the steps was expected")
    if all(map(is_static, shares)) and not (min(shares) >= 0 and sum(shares) <= 1 + 1e-6):
        raise invalid("shares", shares, "shares of at least 0 with a sum of at most 1 were expected")

    def rule(step):
        cumulative = jnp.cumsum(jnp.asarray(shares, jnp.result_type(float)))
        # A share that is meant to fall on a half, 0.3 of 5, does so whatever its last bit.
        return _passed(step.index >= jnp.floor(cumulative * step.num_steps + 0.5 + 1e-4))

    return rule


def time_table(which: Any, grid: Any) -> Int[Array, " S"]:
    """Which denoiser runs at each step of `grid`: what `switched` makes of `which`, int32 `[S]`, before anything runs.

    Counting its entries shows how often each denoiser will be evaluated, and what a run will cost.
    """
    rule, ticks = rule_of(which), clock(as_grid(grid))
    steps = jnp.arange(num_steps(ticks.grid), dtype=jnp.int32)
    return jax.lax.map(lambda index: jnp.asarray(rule(ticks.step(index)), jnp.int32), steps)


def switched(denoisers: Sequence[Denoiser], which: Any = (0.5,), compute: Sequence[Number] | None = None) -> Denoiser:
    """Runs `denoisers[which]`, and only that one.

    which: falling times between the denoisers (see `by_time`), an int array `[S]` by step (the last entry serves later
        steps), or a function of the step that returns one int (`by_share`, `by_log_snr`, ...).
    compute: the work of one evaluation of each, in units in which the cost is reported; 1 each when absent.

    A denoiser that takes over starts with a fresh carry: nothing that it kept from an earlier turn is trusted.
    Extras are kept when all denoisers report the same ones, and dropped otherwise. Raises InvalidInput for denoisers of
    different noise schedules, whose x_t are not the same thing at one t.
    """
    denoisers = _check(denoisers)
    compute = _weights("compute", compute, denoisers)
    if isinstance(which, (tuple, list)) and len(which) != len(denoisers) - 1:
        raise invalid(
            "which", which, f"{len(denoisers) - 1} boundaries between {len(denoisers)} denoisers were expected"
        )
    rule = rule_of(which)

    def init(params, x, cond):
        _check_params(params, denoisers)
        carries = tuple(d.init(p, x, cond) for d, p in zip(denoisers, params))
        return SwitchedCarry(carries, jnp.int32(-1))

    def apply(params, carry, x, step, cond):
        index = jnp.asarray(rule(step), jnp.int32)
        if index.ndim:
            raise invalid(
                "which(step).shape", index.shape, "one denoiser runs for the whole batch: one int was expected"
            )
        index = jnp.clip(index, 0, len(denoisers) - 1)

        def ask(number, own):
            return denoisers[number].apply(params[number], own, x, step, cond)

        reports = [jax.eval_shape(lambda n=n: ask(n, carry.carries[n])[0].extras) for n in range(len(denoisers))]
        alike = all(report == reports[0] for report in reports)

        def branch(number):
            def run(carry):
                own = carry.carries[number]
                if jax.tree.leaves(own):
                    first = denoisers[number].init(params[number], x, cond)
                    own = jax.tree.map(lambda kept, new: jnp.where(carry.last == number, kept, new), own, first)
                prediction, own = ask(number, own)
                cost = Cost(prediction.cost.evaluations, compute[number] * prediction.cost.compute)
                carries = (*carry.carries[:number], own, *carry.carries[number + 1 :])
                extras = prediction.extras if alike else {}
                return prediction._replace(extras=extras, cost=cost_like(cost)), SwitchedCarry(
                    carries, jnp.int32(number)
                )

            return run

        return jax.lax.switch(index, [branch(number) for number in range(len(denoisers))], carry)

    return Denoiser(
        init, apply, denoisers[0].process, lambda carry: SwitchedCarry(_axes(denoisers, carry.carries), None)
    )


def averaged(
    denoisers: Sequence[Denoiser], weights: Sequence[Number] | None = None, compute: Sequence[Number] | None = None
) -> Denoiser:
    """The weighted mean of the pairs: an ensemble of scores (a product of experts with those powers).

    weights: they should sum to 1, for then the mean of pairs is a pair; equal when absent.
    compute: as in `switched`. For discrete processes the mean of the log-probabilities is normalised.
    Raises InvalidInput for denoisers of different noise schedules.
    """
    denoisers = _check(denoisers)
    weights = [1.0 / len(denoisers)] * len(denoisers) if weights is None else _weights("weights", weights, denoisers)
    if abs(sum(weights) - 1.0) > 1e-6:
        raise invalid("weights", tuple(weights), "they must sum to 1")
    compute = _weights("compute", compute, denoisers)

    def init(params, x, cond):
        _check_params(params, denoisers)
        return tuple(d.init(p, x, cond) for d, p in zip(denoisers, params))

    def apply(params, carry, x, step, cond):
        answers = [d.apply(p, c, x, step, cond) for d, p, c in zip(denoisers, params, carry)]
        predictions = [prediction for prediction, _ in answers]

        def mean(*values):
            return sum(weight * value for weight, value in zip(weights, values))

        first = predictions[0]
        eps = jax.tree.map(mean, *(p.eps for p in predictions))
        x0 = jax.tree.map(mean, *(p.x0 for p in predictions))
        x0 = each(lambda x0, eps: jax.nn.log_softmax(x0) if eps is None else x0, x0, eps)
        costs = [Cost(p.cost.evaluations, c * p.cost.compute) for p, c in zip(predictions, compute)]
        cost = sum(costs[1:], start=costs[0])
        return first._replace(x0=x0, eps=eps, cost=cost_like(cost)), tuple(carry for _, carry in answers)

    return Denoiser(init, apply, denoisers[0].process, lambda carry: _axes(denoisers, carry))


def _axes(denoisers, carries):
    return tuple(map(batch_axes, denoisers, carries))


def _check(denoisers):
    denoisers = tuple(denoisers)
    if len(denoisers) < 2:
        raise InvalidInput(f"Two denoisers or more were expected; {len(denoisers)} given.")
    schedules = [_schedules(denoiser.process) for denoiser in denoisers]
    if any(schedule != schedules[0] for schedule in schedules):
        raise InvalidInput(
            "The denoisers have different noise schedules; put denoisers.on_process(denoiser, process) around those "
            "that shall join another one's."
        )
    return denoisers


def _schedules(process):
    """What must agree for x_t to mean the same: the schedule of each Gaussian member, the kind of any other."""
    return {name: getattr(member, "schedule", type(member)) for name, member in members(process).items()}


def rule_of(which: Any) -> Callable[[Step], Any]:
    """What `switched` makes of its `which`: a function of the step."""
    if callable(which):
        return which
    if isinstance(which, (tuple, list)):
        return by_time(*which)
    if jnp.ndim(which) != 1 or not jnp.issubdtype(jnp.result_type(which), jnp.integer):
        raise invalid("which", which, "falling times, an int array [S] or a function of the step was expected")
    table = jnp.asarray(which, jnp.int32)
    return lambda step: jnp.take(table, step.index, mode="clip")


def _check_boundaries(boundaries, falling):
    static = all(map(is_static, boundaries))
    ordered = [a > b if falling else a < b for a, b in itertools.pairwise(boundaries)] if static else []
    if not boundaries or not all(ordered) or (static and any(map(math.isnan, boundaries))):
        raise invalid("boundaries", boundaries, f"at least one, {'falling' if falling else 'rising'}, was expected")


def _passed(boundaries):
    return jnp.sum(boundaries, dtype=jnp.int32)


def _weights(field, values, denoisers):
    values = [1.0] * len(denoisers) if values is None else list(values)
    if len(values) != len(denoisers) or not all(is_static(value) and math.isfinite(value) for value in values):
        raise invalid(field, values, f"{len(denoisers)} numbers, one a denoiser, were expected")
    return values


def _check_params(params, denoisers):
    if not isinstance(params, (tuple, list)) or len(params) != len(denoisers):
        raise InvalidInput(
            f"{len(denoisers)} denoisers need params=({', '.join(['...'] * len(denoisers))}), one entry each."
        )
