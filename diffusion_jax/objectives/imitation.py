"""Imitation: a network learns to predict with one evaluation what a denoiser predicts, whatever that is made of.

For an example x0 noised to x_t and the prediction (x0', eps') of the denoiser there,

    loss = mean weight(t) (network(x_t, t, cond) - target(x0', eps', t))^2,                                    (1)

with the target of the network's own parameterisation, so that teacher and network may predict different things. With a
guided teacher this is guidance distillation (Meng et al. 2023). With factors beside frozen weights (`adapters.lora`,
`with_frozen`) and a teacher that is steered along an attribute it is a concept slider (Gandikota et al. 2023):

    | eps_{theta + dW}(x_t, c) - [eps_theta(x_t, c) + eta (eps_theta(x_t, c_plus) - eps_theta(x_t, c_minus))] |^2  (2)

where `denoisers.contrasted` is the term in brackets. By Bayes' rule the difference in it is -sigma times the
gradient of `log p(c_plus | x_t) / p(c_minus | x_t)`, so an attribute that no condition names, but that can be measured,
steers as well: `denoisers.energy_guided`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.clock import network_inputs, single_step
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives.batches import drawn, example_keys, refuse_weight, updated
from diffusion_jax.objectives.entries import per_example, squared_error
from diffusion_jax.objectives.frozen import with_frozen
from diffusion_jax.randomness import split
from diffusion_jax.time_axes import each, fill
from diffusion_jax.typing import Aux, Denoiser, Frozen, Network, Objective, Params, Process, TimestepDraw


class Imitated(NamedTuple):
    """teacher: its parameters, which do not learn. draw: the state of the draw of times."""

    teacher: Frozen
    draw: Any


def imitation(
    network: Network,
    process: Process,
    teacher: Denoiser,
    teacher_params: Params,
    draw: TimestepDraw | None = None,
    weight: Callable[[Any, Any], Any] | None = None,
) -> Objective:
    """Equation (1) as an `Objective` on batches `{"x0"}`, optionally with "cond" and "index"; one time per example.

    process: whose parameterisation the network has; x_t is noised by it, and the teacher is of the same noise.
    teacher: any denoiser without a memory; `teacher_params` do not learn (`typing.Frozen`). draw: which times are
    imitated, uniform by default. weight: `(process, t) -> weight [B]`, 1 by default.

    Metrics: `mse`, without weights. Per example: `loss`, `t`. Raises InvalidInput at `init` for a teacher that
    remembers its last step, since imitated times are not those of a run.
    """
    draw = timesteps.uniform() if draw is None else draw

    def init(key, params, batch):
        refuse_weight(batch, "imitation")
        carry = jax.eval_shape(lambda: teacher.init(teacher_params, batch["x0"], batch.get("cond")))
        if jax.tree.leaves(carry):
            raise InvalidInput("The teacher remembers its last step, but each example has a time of its own.")
        return Imitated(Frozen(teacher_params), draw.init())

    def prepare(state, batch, key):
        return drawn(draw, state.draw, batch, key, 1)

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        x0, t, cond = batch["x0"], fill(batch["t"], batch["x0"]), batch.get("cond")
        noise_key, network_key = split(example_keys(key, batch["index"]), 2)
        x_t, _ = process.corrupt(noise_key, x0, t)
        fixed = jax.lax.stop_gradient(state.teacher.value)
        said, _ = teacher.apply(fixed, teacher.init(fixed, x_t, cond), x_t, single_step(t), cond)
        target = jax.lax.stop_gradient(process.target(said.x0, said.eps, t))
        output, extras = network.apply(params, *network_inputs(process, x_t, t), cond, train=True, key=network_key)
        square = each(squared_error, output, target)
        plain = sum((per_example(leaf) for leaf in jax.tree.leaves(square)), jnp.zeros(()))
        losses = plain if weight is None else weight(process, batch["t"]) * plain
        # A draw that learns is told the loss without its own weight.
        draws = updated(draw, state.draw, batch["t"], losses)
        told = {"loss": losses, "t": batch["t"]}
        after = Imitated(state.teacher, draws)
        return batch["t_weight"] * losses, Aux(after, {"mse": jnp.mean(plain)}, told, extras)

    return Objective(init, loss, prepare)


def slider(
    adapted: Network, process: Process, steered: Denoiser, params: Params, draw: TimestepDraw | None = None
) -> Objective:
    """Equation (2): a concept slider, an `Objective` of low-rank factors alone.

    adapted: a network with factors beside it, parameters `{"params", "lora"}`: `adapters.lora(network).network`.
    steered: the frozen network at `params`, moved along an attribute: `denoisers.contrasted` between two conditions, or
        `denoisers.energy_guided` where the attribute is measured on the predicted x0. draw: as in `imitation`.

    What is learned is added at any strength, to this network or to one distilled from it, by `Lora.merge`.
    """
    return with_frozen(imitation(adapted, process, steered, params, draw), {"params": params}, "lora")
