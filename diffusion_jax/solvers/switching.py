"""Several solvers in one run: one of them at each step, by the rules of `denoisers.switched`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers.switching import rule_of
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.time_axes import batch_axes
from diffusion_jax.typing import Solver, Step


class SwitchedState(NamedTuple):
    """first: how each solver begins. states: where each is. last: the solver that made the last step, -1 before any."""

    first: Any
    states: Any
    last: Any


def switched(solvers: Sequence[Solver], which: Callable[[Step], Any] | Sequence[float] | Any = (0.5,)) -> Solver:
    """Makes each step by `solvers[which]`: with `denoisers.switched` and the same `which`, a run that one model begins
    by its own solver and another ends by its own, as one scan (`timesteps.spliced` makes grid and table).

    which: as in `denoisers.switched`: falling times, an int array `[S]` by step, or a function of the step.

    A solver that takes over begins without a history. Its noise is that of the step, whoever made the one before. The
    order is the least of all. Raises InvalidInput for fewer than two solvers, and for a `which` that does not fit.
    """
    solvers = tuple(solvers)
    if len(solvers) < 2:
        raise InvalidInput(f"Two solvers or more were expected; {len(solvers)} given.")
    if isinstance(which, (tuple, list)) and len(which) != len(solvers) - 1:
        raise invalid("which", which, f"{len(solvers) - 1} boundaries between {len(solvers)} solvers were expected")
    rule = rule_of(which)

    def init(process, x, grid):
        first = tuple(solver.init(process, x, grid) for solver in solvers)
        return SwitchedState(first, first, jnp.int32(-1))

    def step(process, denoise, carry, state, x, step, key):
        def branch(number):
            def made(carry, states, x):
                own = jax.tree.map(
                    lambda kept, new: jnp.where(state.last == number, kept, new), states[number], state.first[number]
                )
                x, own, carry = solvers[number].step(process, denoise, carry, own, x, step, key)
                return x, (*states[:number], own, *states[number + 1 :]), carry

            return made

        index = jnp.clip(jnp.asarray(rule(step), jnp.int32), 0, len(solvers) - 1)
        branches = [branch(number) for number in range(len(solvers))]
        x, states, carry = jax.lax.switch(index, branches, carry, state.states, x)
        return x, SwitchedState(state.first, states, index), carry

    def axes(state):
        each = tuple(map(batch_axes, solvers, state.states))
        return SwitchedState(each, each, None)

    return Solver(init, step, min(solver.order for solver in solvers), axes)
