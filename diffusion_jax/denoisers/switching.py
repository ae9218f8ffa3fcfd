"""Several denoisers of one process: one of them at each step, or a weighted mean of all.

The parameters are a tuple, one entry a denoiser. The networks may predict different things: they meet in the pair.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.denoisers.conditions import sample_time
from diffusion_jax.denoisers.scales import Number, is_static
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.time_axes import each
from diffusion_jax.typing import Cost, Denoiser


class SwitchedCarry(NamedTuple):
    """carries: one a denoiser. last: the denoiser that ran last, -1 before the first."""

    carries: Any
    last: Any


def by_time(*boundaries: Number) -> Callable[[Any], Any]:
    """Index 0 while t > boundaries[0], 1 while boundaries[0] >= t > boundaries[1], and so on: falling boundaries.

    The step is scalar here: with a time per sample the noisiest decides for the batch.
    """
    if not boundaries or not all(map(is_static, boundaries)) or any(a <= b for a, b in itertools.pairwise(boundaries)):
        raise invalid("boundaries", boundaries, "at least one time, falling, was expected")
    return lambda step: jnp.sum(jnp.max(sample_time(step.t)) <= jnp.asarray(boundaries)).astype(jnp.int32)


def switched(denoisers: Sequence[Denoiser], which: Any = (0.5,), compute: Sequence[Number] | None = None) -> Denoiser:
    """Runs `denoisers[which]`, and only that one.

    which: falling times between the denoisers (see `by_time`), an int array `[S]` by step, or a function of the step
        that returns one int.
    compute: the work of one evaluation of each, in units in which the cost is reported; 1 each when absent.

    A denoiser that takes over starts with a fresh carry: nothing that it kept from an earlier turn is trusted.
    Extras are kept when all denoisers report the same ones, and dropped otherwise.
    """
    denoisers = _check(denoisers)
    compute = _weights("compute", compute, denoisers)
    if isinstance(which, (tuple, list)):
        if len(which) != len(denoisers) - 1:
            raise invalid(
                "which", which, f"{len(denoisers) - 1} boundaries between {len(denoisers)} denoisers were expected"
            )
        which = by_time(*which)
    elif not callable(which):
        if jnp.ndim(which) != 1 or not jnp.issubdtype(jnp.result_type(which), jnp.integer):
            raise invalid("which", which, "falling times, an int array [S] or a function of the step was expected")
        table = jnp.asarray(which, jnp.int32)

        def which(step):
            return jnp.take(table, step.index, mode="clip")

    def init(params, x, cond):
        _check_params(params, denoisers)
        carries = tuple(d.init(p, x, cond) for d, p in zip(denoisers, params))
        return SwitchedCarry(carries, jnp.int32(-1))

    def apply(params, carry, x, step, cond):
        index = jnp.asarray(which(step), jnp.int32)
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

    return Denoiser(init, apply, denoisers[0].process)


def averaged(
    denoisers: Sequence[Denoiser], weights: Sequence[Number] | None = None, compute: Sequence[Number] | None = None
) -> Denoiser:
    """The weighted mean of the pairs: an ensemble of scores (a product of experts with those powers).

    weights: they should sum to 1, for then the mean of pairs is a pair; equal when absent.
    compute: as in `switched`. For discrete processes the mean of the log-probabilities is normalised.
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

    return Denoiser(init, apply, denoisers[0].process)


def _check(denoisers):
    denoisers = tuple(denoisers)
    if len(denoisers) < 2:
        raise InvalidInput(f"Two denoisers or more were expected; {len(denoisers)} given.")
    return denoisers


def _weights(field, values, denoisers):
    values = [1.0] * len(denoisers) if values is None else list(values)
    if len(values) != len(denoisers) or not all(map(is_static, values)):
        raise invalid(field, values, f"{len(denoisers)} numbers, one a denoiser, were expected")
    return values


def _check_params(params, denoisers):
    if not isinstance(params, (tuple, list)) or len(params) != len(denoisers):
        raise InvalidInput(
            f"{len(denoisers)} denoisers need params=({', '.join(['...'] * len(denoisers))}), one entry each."
        )
