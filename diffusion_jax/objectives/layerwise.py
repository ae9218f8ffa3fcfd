"""Training of exits: what is said behind each block, weighted by certainty, and how uncertain that is.

For exits i = 1 .. L whose outputs have the errors e_i, and whose estimates are u_i (Tang et al. 2023, DeeDiff),

    loss = e_L^2 + uncertainty * mean_i (u_i - tanh |e_i'|)^2 + layers * mean_{i < L} (1 - u_i) e_i^2              (1)

entry by entry. e' is the error in units of epsilon, in which thresholds mean the same for every parameterisation: it is
alpha e for VP-v and for flow, alpha / sigma e for x0. Targets and weights have no gradient: otherwise a network could
lower its loss by declaring that it is uncertain.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.objectives.denoising import objective
from diffusion_jax.objectives.entries import EntryLoss, per_example
from diffusion_jax.typing import Network, Objective, Process, Time, TimestepDraw


def layerwise(
    network: Network,
    process: Process,
    draw: TimestepDraw | None = None,
    *,
    uncertainty: float | int = 1.0,
    layers: float | int = 1.0,
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
) -> Objective:
    """Equation (1) for a network that answers for all its layers, `models.early_exit(...).network`.

    uncertainty, layers: weights, 1 in the paper; with `with_frozen` only what is beside the network is trained.
    draw, cond_dropout, null, train: as in `denoising`. Metric `mse`: of the last layer alone, e_L^2: whether the whole
    network suffers from its exits. Raises InvalidInput for negative weights.
    """
    return objective(
        network, process, exit_losses(uncertainty, layers), draw, cond_dropout=cond_dropout, null=null, train=train
    )


def exit_losses(uncertainty: float | int = 1.0, layers: float | int = 1.0) -> EntryLoss:
    """Equation (1) as an entry loss; `output` is `Layers`. Raises InvalidInput for negative weights."""
    for name, weight in (("uncertainty", uncertainty), ("layers", layers)):
        if weight < 0:
            raise invalid(name, weight, "it must not be negative")

    def entry(process, answers, x0, noise, x_t, t):
        target = process.target(x0, noise, t)
        square = jnp.square(answers.output.astype(jnp.float32) - target)
        wrong = uncertainty_target(process, answers.output, target, x_t, t)
        estimated = jnp.square(answers.uncertainty - wrong).mean(axis=0)
        certain = jax.lax.stop_gradient(1.0 - answers.uncertainty[:-1])
        early = (certain * square[:-1]).sum(axis=0) / max(len(square) - 1, 1)
        whole, plain = square[-1], per_example(square[-1])
        return whole + uncertainty * estimated + layers * early, "mse", plain, jnp.ones_like(plain)

    return entry


def uncertainty_target(process: Process, outputs: Any, target: Any, x_t: Any, t: Time) -> Any:
    """`tanh |e'|` of outputs `[L, B, ...]`: in [0, 1), 0 where the output is the target; without gradient."""

    def eps(output):
        return process.predict(output, x_t, t).eps

    # Both sides by the same arithmetic: what is equal has exactly no error.
    return jax.lax.stop_gradient(jnp.tanh(jnp.abs(jax.vmap(eps)(outputs) - eps(target))))
