"""Training in one compiled program, for small problems whose data are drawn: bandits, worlds of two dimensions."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Key

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Objective, Params


def train_on_draws(
    objective: Objective,
    optimizer: Any,
    params: Params,
    batch_of: Callable[[Any], Any],
    steps: int,
    key: Key[Array, ""],
) -> Params:
    """The parameters after `steps` updates on batches `batch_of(key)`, drawn anew for each: one scan, to be jitted.

    It keeps nothing, checks nothing and averages nothing; `train` is for runs that anybody waits for. Several runs at
    once are its vmap over params and key. Raises InvalidInput for less than one step.
    """
    if steps < 1:
        raise invalid("steps", steps, "at least one is needed")
    keys = jax.random.split(key, steps + 1)

    def step(carry, key):
        params, moments, state = carry
        batch_key, loss_key = jax.random.split(key)
        batch = batch_of(batch_key)

        def mean(params):
            losses, aux = objective.loss(params, state, batch, loss_key)
            return losses.mean(), aux

        gradient, aux = jax.grad(mean, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments, aux.state), None

    begun = params, optimizer.init(params), objective.init(keys[0], params, batch_of(keys[0]))
    return jax.lax.scan(step, begun, keys[1:])[0][0]
