"""Training of exits: the prediction behind each block, weighted by its certainty, and the estimate of its error.

For exits i = 1 .. L whose outputs have the errors e_i, and whose estimates are u_i (Tang et al. 2023, DeeDiff),

    loss = e_L^2 + uncertainty * mean_i (u_i - tanh |e_i'|)^2 + layers * mean_{i < L} (1 - u_i) e_i^2              (1)

entry by entry. e' is the error in units of epsilon, in which thresholds mean the same for every parameterisation: it is
alpha e for VP-v and for flow, alpha / sigma e for x0. Targets and weights have no gradient: otherwise a network could
lower its loss by declaring that it is uncertain. `layerwise` is that for denoising, with any entry loss in the place of
the square; `with_exits` puts exits into an objective of which nothing is known but its losses l_i `[B]`,

    loss = l_L + uncertainty * (mean_i (mean u_i - tanh sqrt l_i)^2) + layers * mean_{i < L} (1 - mean u_i) l_i    (2)

so that an exit is taken where the loss of its answer is estimated to be small, in whatever units the objective has.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.clock import network_inputs
from diffusion_jax.errors import invalid
from diffusion_jax.models import EarlyExit
from diffusion_jax.objectives.denoising import objective
from diffusion_jax.objectives.entries import EntryLoss, regression
from diffusion_jax.time_axes import batch_size
from diffusion_jax.typing import Network, Objective, Params, Process, Time, TimestepDraw


def layerwise(
    network: Network,
    process: Process,
    draw: TimestepDraw | None = None,
    *,
    entry: EntryLoss | None = None,
    uncertainty: float | int = 1.0,
    layers: float | int = 1.0,
    cond_dropout: float = 0.0,
    null: Mapping[str, Any] | None = None,
    train: bool = True,
) -> Objective:
    """Equation (1) for a network that predicts behind all its layers, `models.early_exit(...).network`.

    entry: what stands for the square, such as `objectives.regression(weight)`. uncertainty, layers: weights, 1 in the
    paper; with `with_frozen` only what is beside the network is trained. draw, cond_dropout, null, train: as in
    `denoising`. The metric is that of the entry loss at the last layer alone: whether the whole network suffers from
    its exits. Raises InvalidInput for negative weights.
    """
    losses = exit_losses(uncertainty, layers, entry)
    return objective(network, process, losses, draw, cond_dropout=cond_dropout, null=null, train=train)


def exit_losses(uncertainty: float | int = 1.0, layers: float | int = 1.0, entry: EntryLoss | None = None) -> EntryLoss:
    """Equation (1) as an entry loss; `output` is `Layers`. Raises InvalidInput for negative weights."""
    _check(uncertainty, layers)
    entry = regression() if entry is None else entry

    def of_layers(process, answers, x0, noise, x_t, t):
        target = process.target(x0, noise, t)
        lost = jax.vmap(lambda output: entry(process, output, x0, noise, x_t, t)[0])(answers.output)
        _, name, plain, share = entry(process, answers.output[-1], x0, noise, x_t, t)
        wrong = uncertainty_target(process, answers.output, target, x_t, t)
        estimated = jnp.square(answers.uncertainty - wrong).mean(axis=0)
        early = _certain(answers.uncertainty, lost)
        return lost[-1] + uncertainty * estimated + layers * early, name, plain, share

    return of_layers


def with_exits(
    make: Callable[[Network], Objective], exits: EarlyExit, uncertainty: float | int = 1.0, layers: float | int = 1.0
) -> Objective:
    """Equation (2): any objective, evaluated for the output behind each block, on `{"params": params, "exits": exits}`.

    make: the objective of a network, `lambda network: objectives.imitation(network, ...)`. It is asked for every exit,
        with the same key, in one `vmap` in which only the answers differ: the network is run once. It has to hand on
        what networks report (`Aux.extras`).
    uncertainty, layers: weights. Metrics, state and what is recorded per example are those of the last layer.
    Raises InvalidInput for negative weights, and for an objective that hands nothing on.
    """
    _check(uncertainty, layers)

    def behind(index):
        def apply(params, x, t, cond=None, train=False, key=None):
            said, extras = exits.network.apply(params, x, t, cond, train=train, key=key)
            u = said.uncertainty.reshape(*said.uncertainty.shape[:2], -1).mean(axis=2)
            return jnp.take(said.output, index, axis=0), {**extras, "uncertainty": u}

        return make(Network(exits.network.init, apply))

    last = behind(exits.depth - 1)

    def loss(params, state, batch, key):
        lost, every = jax.vmap(lambda index: behind(index).loss(params, state, batch, key))(jnp.arange(exits.depth))
        aux = jax.tree.map(lambda leaf: leaf[-1], every)
        if "uncertainty" not in aux.extras:
            raise invalid("make(network)", list(aux.extras), "its losses must hand on the network's extras in `Aux`")
        u = aux.extras["uncertainty"]
        wrong = jax.lax.stop_gradient(jnp.tanh(jnp.sqrt(lost)))
        total = lost[-1] + uncertainty * jnp.square(u - wrong).mean(axis=0) + layers * _certain(u, lost)
        return total, aux

    return Objective(last.init, loss, last.prepare)


def _certain(u, lost):
    """The mean over the exits before the last of what was lost, where they were certain."""
    return (jax.lax.stop_gradient(1.0 - u[:-1]) * lost[:-1]).sum(axis=0) / max(len(lost) - 1, 1)


def _check(uncertainty, layers):
    for name, weight in (("uncertainty", uncertainty), ("layers", layers)):
        if not weight >= 0:
            raise invalid(name, weight, "it must not be negative")


def uncertainty_target(process: Process, outputs: Any, target: Any, x_t: Any, t: Time) -> Any:
    """`tanh |e'|` of outputs `[L, B, ...]`: in [0, 1), 0 where the output is the target; without gradient."""

    def eps(output):
        return process.predict(output, x_t, t).eps

    # Both sides by the same arithmetic: what is equal has exactly no error.
    return jax.lax.stop_gradient(jnp.tanh(jnp.abs(jax.vmap(eps)(outputs) - eps(target))))


class ExitErrors(NamedTuple):
    """Means over examples, by exit and time: estimated and actual uncertainty, and the squared error of the output."""

    estimated: Float[Array, "L T"]
    actual: Float[Array, "L T"]
    square: Float[Array, "L T"]


def exit_errors(network: Network, process: Process, params: Params, batch: Any, times: Any, key: Any) -> ExitErrors:
    """How good estimates and answers are, behind each block and at each of `times [T]`, by `batch` at the same noise.

    network: `models.early_exit(...).network`. batch: `x0`, and `cond` if there is one, not of the training data.
    """
    x0, cond = batch["x0"], batch.get("cond")

    def at(t):
        t = jnp.full(batch_size(x0), t)
        x_t, noise = process.corrupt(key, x0, t)
        answers, _ = network.apply(params, *network_inputs(process, x_t, t), cond)
        target = process.target(x0, noise, t)
        actual = uncertainty_target(process, answers.output, target, x_t, t)
        each = answers.uncertainty, actual, jnp.square(answers.output - target)
        return ExitErrors(*(values.reshape(len(values), -1).mean(axis=1) for values in each))

    return jax.tree.map(jnp.transpose, jax.lax.map(at, jnp.asarray(times)))
