"""Training to a budget of compute: the share that a network executes is held at a target on the mean of the batch.

    loss = L(dynamic) + [k < complete_steps] L(complete) + weight (mean_b ratio(b) - lambda_k)^2               (1)

(Zhao et al. 2025, DyDiT). The mean is over the batch, so over t: compute moves to the times where it is worth most.
Draw t stratified, or the mean is noisy. The ratio is what the network reports of its own gates, differentiably.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.routing import LEDGER, executed_ratio
from diffusion_jax.objectives.batches import refuse_gradient
from diffusion_jax.typing import Objective


class Budgeted(NamedTuple):
    """inner: the state of the dynamic network's objective. count: losses so far."""

    inner: Any
    count: Any


def executed(extras: Any) -> Any:
    """The share that a network with gates executed of its routed modules, `[B]`, from its extras."""
    return executed_ratio(extras[LEDGER])


def budgeted(
    dynamic: Objective,
    target: float,
    *,
    complete: Objective | None = None,
    complete_steps: int = 30_000,
    weight: float | int = 2.0,
    full_steps: int = 100,
    warmup_steps: int = 1000,
    ratio: Callable[[Any], Any] = executed,
) -> Objective:
    """Equation (1).

    dynamic: the loss of the network with gates, whose `Aux.extras` hold what it executed.
    complete: the loss of the same parameters without gates, at the same noise and times, for the first `complete_steps`
        losses; later it is not computed.
    target: lambda. lambda_k is 1 for `full_steps`, then falls linearly to lambda over `warmup_steps`.
    ratio: reads the share `[B]` from the extras.

    Metrics: those of `dynamic`, `ratio`, its mean, and `budget`, lambda_k. With gradient accumulation the mean, and the
    count of losses, is that of each part.
    Raises InvalidInput for a target outside (0, 1] and for negative numbers of steps.
    """
    if not 0 < target <= 1:
        raise invalid("target", target, "a share above 0, at most 1, is needed")
    for field, value in (
        ("complete_steps", complete_steps),
        ("full_steps", full_steps),
        ("warmup_steps", warmup_steps),
    ):
        if not value >= 0:
            raise invalid(field, value, "it must not be negative")

    refuse_gradient(dynamic, "budgeted")

    def init(key, params, batch):
        return Budgeted(dynamic.init(key, params, batch), jnp.int32(0))

    def loss(params, state, batch, key):
        if dynamic.prepare is not None:
            # Both losses are of the same times.
            batch = dynamic.prepare(state.inner, batch, key)
        losses, aux = dynamic.loss(params, state.inner, batch, key)
        if complete is not None:
            complete_losses = partial(complete.loss, params, state.inner, batch, key)
            losses = losses + jax.lax.cond(
                state.count < complete_steps, lambda: complete_losses()[0], lambda: jnp.zeros_like(losses)
            )
        limit = budget_at(state.count, target, full_steps, warmup_steps)
        mean = jnp.mean(ratio(aux.extras))
        metrics = {**aux.metrics, "ratio": mean, "budget": limit}
        aux = aux._replace(state=Budgeted(aux.state, state.count + 1), metrics=metrics)
        return losses + weight * jnp.square(mean - limit), aux

    prepare = dynamic.prepare
    return Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))


def budget_at(count: Any, target: float, full_steps: int = 100, warmup_steps: int = 1000) -> Any:
    """lambda_k: 1 while k < `full_steps`, then linear to `target` over `warmup_steps`."""
    risen = jnp.clip((count - full_steps) / max(warmup_steps, 1), 0.0, 1.0)
    return 1.0 + (target - 1.0) * risen
