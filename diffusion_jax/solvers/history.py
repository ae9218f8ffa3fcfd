"""The memory of multi-step methods: the latest outputs of each entry of a vector of times.

With a vector of times, the time of some entries changes in a step while that of others does not. The history records an
entry only when its time changes, so each entry has the history of a run of its own. A method with one evaluation per
step is one function for one modality (`with_history`); other methods call `push` themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import check_gaussian, per_modality
from diffusion_jax.time_axes import batch_first, where
from diffusion_jax.typing import Prediction, Solver, Step


class History(NamedTuple):
    """Latest outputs first.

    values: arrays like x. times: the t of each, prefix-shaped. count: how many are real, prefix-shaped; the values and
    times of others are 0.
    """

    values: tuple
    times: tuple
    count: Any


def empty_history(x: Any, t: Any, length: int) -> History:
    """A history for `length` past outputs of one modality."""
    zeros = jnp.zeros_like(x)
    return History((zeros,) * length, (jnp.zeros_like(t),) * length, jnp.zeros(jnp.shape(t), jnp.int32))


def push(history: History, value: Any, t: Any, moves: Any) -> History:
    """Puts the output at t in front, for the entries that move."""
    length = len(history.values)
    values, times = (value, *history.values)[:length], (t, *history.times)[:length]
    return History(
        tuple(where(moves, new, old) for new, old in zip(values, history.values)),
        tuple(jnp.where(moves, new, old) for new, old in zip(times, history.times)),
        jnp.where(moves, jnp.minimum(history.count + 1, length), history.count),
    )


def init_per_modality(name: str, empty: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The `init` of a Gaussian solver that begins with `empty(x, t)`, or with a dict of those for joint data."""

    def init(process, x, grid):
        check_gaussian(process, name)
        return per_modality(lambda _, x, t: empty(x, t), process, x, jax.tree.map(lambda g: g[0], grid))

    return init


def empty_histories(name: str, length: int) -> Callable[..., Any]:
    """The `init` of a solver whose only state is a history of `length` outputs per modality."""
    return init_per_modality(name, lambda x, t: empty_history(x, t, length))


Update = Callable[[Any, Any, History, Prediction, Step, Any], tuple[Any, Any]]
"""`(process, x, history, prediction, step, noise) -> (x', value)`, of one modality."""


def with_history(
    update: Update, length: int, *, order: int = 1, name: str = "with_history", stochastic: bool = False
) -> Solver:
    """The multi-step solver of one evaluation a step whose steps are `update`, for any vector of times.

    update: called for each modality with the `length` latest outputs before this one. It returns x at `step.t_next` and
        the output to remember, like x (`prediction.eps`, `prediction.x0` or a function of both). An entry that does not
        move remembers nothing, whatever `update` returns for it. Where `history.count` is less than the method needs,
        it takes what there is: `jnp.where(history.count > 0, ...)`.
    noise: fresh normal noise like x where `stochastic`, else None.
    order: of convergence. name: for the error that a process which is not Gaussian gives.
    """

    def step(process, denoise, carry, state, x, step, key):
        prediction, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if stochastic else None

        def advance(process, x, history, prediction, step, noise):
            x, value = update(process, x, history, prediction, step, noise)
            return x, push(history, value, step.t, step.t != step.t_next)

        x, state = per_modality(advance, process, x, state, prediction, step, noise)
        return x, state, carry

    return Solver(empty_histories(name, length), step, order, batch_first)
