"""Progressive distillation: a student makes in one DDIM step what its teacher makes in two (Salimans & Ho 2022).

With x_m and x_s the teacher's DDIM steps from t over m to s, the student regresses, in its own parameterisation, on

    the prediction with which one step from x_t ends in x_s, `trajectories.secant`.                               (1)

The student of S steps teaches the next, of S / 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.clock import network_inputs, single_step
from diffusion_jax.errors import invalid
from diffusion_jax.objectives.batches import corrupted, drawn, example_keys, refuse_weight
from diffusion_jax.objectives.entries import per_example, squared_error
from diffusion_jax.objectives.trajectories import key_times, secant
from diffusion_jax.processes import need_gaussian
from diffusion_jax.randomness import split
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Aux, Denoiser, Frozen, Network, Objective, Params, Times


class Halving(NamedTuple):
    """teacher: parameters that do not learn."""

    teacher: Frozen


def progressive(
    network: Network,
    process: Any,
    grid: Times,
    teacher: Denoiser,
    teacher_params: Params,
    weight: Callable[[Any, Any], Any] | None = None,
) -> Objective:
    """Equation (1) as an `Objective` on batches `{"x0"}`, optionally with "cond" and "index".

    grid: of the teacher, `[2 S + 1]` scalar times; the student's is every second of them, `grid[::2]`, on which it is
        to be sampled by `solvers.ddim()`. teacher: of the same process, without a memory, guided if need be.
    weight: `(process, t) -> [B]` of the error of the network's output, 1 by default. A prediction whose target grows
        where alpha is 0, such as epsilon, cannot begin at pure noise: use v or velocity.

    Times that a batch brings along become the nearest from which the student steps. Begin with the teacher's
    parameters. Metrics: `mse`, without weights. Per example: `loss`, `t`.
    Raises InvalidInput for a grid of an odd number of steps, and for one that pauses.
    """
    need_gaussian("progressive", process)
    times = key_times(grid)
    if len(times) < 3 or len(times) % 2 == 0:
        raise invalid("grid.shape", times.shape, "scalar times of an even number of steps are needed, [2 S + 1]")
    draw = timesteps.on_grid(times[::2])

    def init(key, params, batch):
        refuse_weight(batch, "progressive")
        return Halving(Frozen(teacher_params))

    def prepare(state, batch, key):
        return drawn(draw, (), batch, key, 1)

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        given, cond = fill(batch["t"], batch["x0"]), batch.get("cond")
        at = jnp.argmin(jnp.abs(times[:-1:2] - given[:, None]), axis=1) * 2
        t = times[at]
        noise_key, network_key = split(example_keys(key, batch["index"]), 2)
        x_t, _ = corrupted(process, noise_key, batch, t)
        fixed = jax.lax.stop_gradient(state.teacher.value)
        x = x_t
        for first in (at, at + 1):
            now, then = times[first], times[first + 1]
            said, _ = teacher.apply(fixed, teacher.init(fixed, x, cond), x, single_step(now, then), cond)
            x = process.marginal(said.x0, said.eps, then)
        said = secant(process, x_t, t, x, times[at + 2])
        goal = jax.lax.stop_gradient(process.target(said.x0, said.eps, t))
        output, extras = network.apply(params, *network_inputs(process, x_t, t), cond, train=True, key=network_key)
        square = per_example(squared_error(output, goal))
        losses = square if weight is None else weight(process, t) * square
        return batch["t_weight"] * losses, Aux(state, {"mse": jnp.mean(square)}, {"loss": losses, "t": t}, extras)

    return Objective(init, loss, prepare)
