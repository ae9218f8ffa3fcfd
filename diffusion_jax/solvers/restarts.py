"""Singlestep methods on a grid that contains their intermediate times: blocks of 1, 2 or 3 steps from one start.

Within a block every step starts at x of the block's first step, and uses the outputs at all of the block's times so
far: the k-th step of a block is of order k. Between blocks nothing is remembered. One evaluation a step of the grid.
This is how diffusers spends a number of evaluations on DPM-Solver's singlestep form (Lu et al. 2022a, appendix D.1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.clock import remaining
from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import check_gaussian, hub_step, per_modality
from diffusion_jax.solvers.history import History, empty_history, push
from diffusion_jax.solvers.multistep import (
    Ending,
    Frame,
    Node,
    correction,
    noisy_hub_step,
    past_nodes,
    steps_left,
)
from diffusion_jax.time_axes import batch_first, expand, where
from diffusion_jax.typing import Solver


class RestartState(NamedTuple):
    """Where the block of an entry began, the outputs before the current one, and how many steps the entry has made.

    x0, eps: like x. t, count: prefix-shaped. total: how many steps the grid has for it.
    """

    x0: Any
    eps: Any
    t: Any
    history: History
    count: Any
    total: Any


def block_order(made: Any, left: Any, order: int, ending: Ending) -> Any:
    """The order of a step: 1, 2, .., `order`, again and again; prefix-shaped.

    made, left: how many steps of its grid are behind an entry and before it, this one included. With
    `lower_order_final` the last step is of first order where it would end a whole block.
    """
    total = made + left
    lowered = ending.lower_order_final
    if not isinstance(lowered, bool):
        lowered = total < lowered
    first_at_end = jnp.asarray(ending.euler_at_final) | (jnp.asarray(lowered) & (total % order == 0))
    return jnp.where(first_at_end & (left <= 1), 1, made % order + 1)


def restarting(
    name: str, order: int, frame: Any, prediction: str, ending: Ending, stochastic: bool, nearest_only: bool
) -> Solver:
    """The solver of equation (2) of `multistep` over blocks of up to `order` steps.

    frame: (process, t, t_next, count) -> Frame of the step from the block's start.
    nearest_only: third-order steps use the start and the latest time of the block only.

    A run that begins in the middle of its grid keeps the blocks of the whole grid: its first step is of first order,
    and those that follow have as many outputs as there are.
    """

    def empty(process, x, t, total):
        history = empty_history(x, t, max(order - 1, 1))
        count = jnp.zeros(jnp.shape(t), jnp.int32)
        return RestartState(jnp.zeros_like(x), jnp.zeros_like(x), t, history, count, total)

    def init(process, x, grid):
        check_gaussian(process, name)
        first, total = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (grid, remaining(grid)))
        return per_modality(empty, process, x, first, total)

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if stochastic else x

        def update(process, x, block, answer, noise, step):
            (x0, eps), t, t_next = answer[:2], step.t, step.t_next
            left = steps_left(step)
            this = block_order(jnp.maximum(block.total - left, block.count), left, order, ending)
            this = jnp.minimum(this, block.count + 1)
            fresh = this == 1
            value = x0 if prediction == "x0" else eps
            start = jnp.where(fresh, t, block.t)
            pair = where(fresh, x0, block.x0), where(fresh, eps, block.eps)
            # Newest first: the output now, then those of the block, its start last.
            past = block.history._replace(count=jnp.where(fresh, 0, block.history.count))
            whole: Frame = frame(process, start, t_next, order - 1)
            base = whole.coordinate(start)
            latest = push(past, value, t, jnp.ones_like(fresh))
            nodes = past_nodes(latest, whole.coordinate, base)
            usable = whole.usable & ~fresh
            # The start is the base of the polynomial, not a node of its own: `difference` finds it unusable.
            nodes = [Node(node.value, node.offset, node.usable & usable) for node in nodes[: order - 1]]
            if nearest_only:
                nodes = nodes[:1]
            anchor = pair[0] if prediction == "x0" else pair[1]
            attained = jnp.minimum(this, 1 + sum(node.usable.astype(jnp.int32) for node in nodes))
            simple = whole.simple
            if simple is not None and order == 3:
                simple = jnp.where(this == 2, simple, whole.moments[1])
            terms = correction(anchor, nodes, whole.moments, attained, simple)
            if stochastic:
                moved = noisy_hub_step(process, *pair, noise, start, t_next, 1.0)
            else:
                moved = hub_step(process, *pair, t_next)
            moves = t != t_next
            began = RestartState(
                where(moves, pair[0], block.x0),
                where(moves, pair[1], block.eps),
                jnp.where(moves, start, block.t),
                push(past, value, t, moves),
                jnp.where(moves, block.count + 1, block.count),
                block.total,
            )
            return moved + expand(whole.scale, x) * terms, began

        x, state = per_modality(update, process, x, state, answer, noise, step)
        return x, state, carry

    return Solver(init, step, order, batch_first)
