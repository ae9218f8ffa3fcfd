"""Static ranges of what layers read, by intervals of times, from the states of a sampler's own runs.

A network meets other inputs at other times, so ranges that were found at a few of them clip, or waste bits, at the
others (Li et al. 2023, Q-Diffusion). What counts are the states that a run visits, not noised data, and with guidance
the null condition as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.clock import network_inputs
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.edits import taps
from diffusion_jax.models.interception import Select, intercepted
from diffusion_jax.quantization.quantized import quantizable
from diffusion_jax.quantization.statistics import time_edges
from diffusion_jax.timesteps import bucket_of
from diffusion_jax.typing import Condition, Network, Params, Process

_TAPS = "input ranges"


def input_ranges(
    network: Network,
    process: Process,
    params: Params,
    states: Any,
    times: Any,
    cond: Condition = None,
    *,
    null: Condition = None,
    edges: Sequence[float] = (),
    momentum: float | None = None,
    select: Select = quantizable,
) -> Any:
    """`{path of a layer: {"low", "high"}}` of what each selected layer reads, `[K]`, or `[K, L]` within a stack.

    states: `[B, m, ...]`, x at the times `times [m]` of the process, falling: those of `data.trajectories(keep=...)`
        without the last. cond: of the B runs. null: the condition of the other branch of guidance, which is asked too.
    edges: `[K - 1]`, rising, in the network's own times: one range for each of K intervals, of which each needs one of
        the times at least. momentum: None takes the least and the largest of all; otherwise a moving average of
        those of each time, from the first on, such as 0.95 (which gives up rare outliers).
    Raises InvalidInput for an interval without a time, and for shapes that do not fit.
    """
    states, times = states_at(states, times)
    inner, told = time_edges(edges), process.network_time(times)
    assert not isinstance(told, Mapping)
    intervals, bucket = range(len(inner) + 1), np.asarray(bucket_of(told, inner))
    if lacking := sorted(set(intervals) - set(bucket.tolist())):
        raise InvalidInput(f"There is no state within the intervals {lacking} of edges: keep more of the run.")
    opened = intercepted(network, taps(select, lambda output, x: {"low": x.min(), "high": x.max()}, "input", _TAPS))
    branches = [cond] if null is None else [cond, nullified(cond, null, len(states))]

    @jax.jit
    def ranges(params, states):
        def at(state, t):
            t = jnp.broadcast_to(t, (len(state),))
            found = [opened.apply(params, {}, *network_inputs(process, state, t), one)[1][_TAPS] for one in branches]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

        return jax.lax.map(lambda one: at(*one), (jnp.moveaxis(states, 1, 0), times))

    found = jax.tree.map(lambda leaf: leaf["input"], ranges(params, states), is_leaf=_is_entry)

    def gathered(entry):
        joined = {"low": np.min, "high": np.max}
        each = {name: joined[name](np.asarray(entry[name], np.float32), axis=1) for name in joined}

        def of(name, number):
            rows = each[name][bucket == number]
            if momentum is None:
                return joined[name](rows, axis=0)
            mean = rows[0]
            for row in rows[1:]:
                mean = momentum * mean + (1 - momentum) * row
            return mean

        return {name: np.stack([of(name, number) for number in intervals]) for name in joined}

    return jax.tree.map(gathered, found, is_leaf=lambda node: isinstance(node, dict) and "low" in node)


def _is_entry(node):
    return isinstance(node, dict) and "input" in node and "low" in node["input"]


def states_at(states: Any, times: Any) -> tuple[Any, Any]:
    """States `[B, m, ...]` of runs and their times `[m]`. Raises InvalidInput where they do not fit."""
    states, times = jnp.asarray(states), jnp.asarray(times, jnp.float32)
    if states.ndim < 2 or times.shape != states.shape[1:2]:
        raise invalid("shapes of states and times", (states.shape, times.shape), "[B, m, ...] and [m] were expected")
    return states, times


def nullified(cond: Condition, null: Any, size: int) -> dict[str, Any]:
    """The condition of the other branch of guidance, for `size` examples."""
    spread = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)[1:])), null)
    return {**(cond or {}), **spread}
