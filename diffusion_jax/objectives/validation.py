"""Validation: the loss at fixed times, bin by bin, since the training loss varies with the drawn times."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.objectives.batches import batch_size
from diffusion_jax.typing import Objective


def validation_loss(objective: Objective, num_bins: int = 8) -> Callable[[Any, Any, Any, Any], dict[str, Any]]:
    """`(params, state, batch, key) -> metrics`: the loss at equidistant times, per bin, as in MLPerf's gate.

    Every example is evaluated at the middle of each of `num_bins` equal bins of [0, 1], with its own noise:
    `loss/t=0.0625`, ..., and `loss`, their mean. Give it an objective with `train=False` and no condition dropout.
    Jit it, and give all validation the same key: noise belongs to examples, so evaluations are comparable.
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
        raise invalid("num_bins", num_bins, "it must be a whole number of at least 1")
    times = [(i + 0.5) / num_bins for i in range(num_bins)]

    def evaluate(params, state, batch, key):
        size = batch_size(batch)

        def at(t):
            pinned = {**batch, "t": jnp.full((size,), t), "t_weight": jnp.ones((size,))}
            return jnp.mean(objective.loss(params, state, pinned, key)[1].per_example["loss"])

        # One time after the other: the memory is that of one evaluation.
        losses = jax.lax.map(at, jnp.asarray(times, jnp.float32))
        return {"loss": jnp.mean(losses)} | {f"loss/t={t:.4g}": losses[i] for i, t in enumerate(times)}

    return evaluate
