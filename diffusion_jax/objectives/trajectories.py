"""Learning on the stored runs of a teacher: a student makes in one step what the teacher made in many.

A run of the teacher is kept at the key times t_0 > t_1 > ... > t_m: its noise x_{t_0}, what it passed through, and its
sample x_{t_m}. The prediction with which one step of DDIM (of Euler, for a flow) leads from x_t to x_s is

    x0  = (sigma_t x_s - sigma_s x_t) / (sigma_t alpha_s - sigma_s alpha_t),
    eps = (alpha_s x_t - alpha_t x_s) / (sigma_t alpha_s - sigma_s alpha_t),                                      (1)

and for a flow eps - x0 is the secant velocity (x_t - x_s) / (t - s), the average of the teacher's between the two
(Zhang et al. 2025, AccVideo). Since x_t = alpha_t x0 + sigma_t eps, a loss of denoising at (x0, eps, t) is the
regression on it: no data are noised, and the student learns at states that runs do pass through. A student without an
error ends where the stored runs end. Guidance with which they were made is part of what is learned.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax import timesteps
from diffusion_jax.clock import as_grid
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import batch_size, drawn, refuse_gradient
from diffusion_jax.processes import need_gaussian
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Objective, Prediction, Process, Time, Times


def secant(process: Process, x: Any, t: Time, x_next: Any, t_next: Time) -> Prediction:
    """Equation (1): the prediction with which one DDIM step from x at t ends in x_next at t_next, below t.

    x, x_next: `[B, ...]`. t, t_next: of a prefix of that shape. Differences of states are divided by the length of the
    step, so keep them in float32.
    """
    need_gaussian("secant", process)
    gaussian: Any = process
    alpha, sigma = gaussian.alpha(t), gaussian.sigma(t)
    alpha_next, sigma_next = gaussian.alpha(t_next), gaussian.sigma(t_next)
    scale = 1.0 / (sigma * alpha_next - sigma_next * alpha)

    def combined(a, b):
        return expand(scale * a, x) * x_next - expand(scale * b, x) * x

    return Prediction(combined(sigma, sigma_next), combined(-alpha, -alpha_next))


def key_times(grid: Times) -> Any:
    """The key times `[m + 1]` as an array. Raises InvalidInput unless they are scalars that fall at every step."""
    times: Any = as_grid(grid).astype(jnp.float32)
    if times.ndim != 1:
        raise invalid("grid.shape", times.shape, "scalar key times are needed, [m + 1]")
    # NumPy, for a known grid may be inspected while something else is being traced.
    known: Any = None if isinstance(times, Tracer) else np.asarray(times)
    if known is not None and (known[1:] >= known[:-1]).any():
        raise InvalidInput("The grid of key times pauses: each of its times must be below the one before.")
    return times


def stored_states(batch: Mapping[str, Any], times: Any) -> Any:
    """`states` of a batch, of the runs at these key times. Raises InvalidInput where there are none or others."""
    if "states" not in batch:
        raise InvalidInput(f"the batch has no 'states', the stored runs; it has: {', '.join(sorted(batch))}.")
    states, like = jnp.asarray(batch["states"]), jnp.shape(batch["x0"])
    expected = (like[0], len(times), *like[1:])
    if states.shape != expected:
        raise invalid("the shape of 'states' in the batch", states.shape, f"{expected} was expected, one at each time")
    return states


def on_trajectories(objective: Objective, process: Process, grid: Times) -> Objective:
    """`objective`, a loss of denoising, on steps of stored runs: of each example one of the m steps, drawn evenly.

    objective: `denoising` in any parameterisation, or what else uses the "noise" and "t" of a batch; its own draw of
        times is not asked. process: its process.
    grid: key times `[m + 1]`, falling, on which the student is to be sampled by `solvers.ddim()`: 5 of 50 steps that
        are shifted alike are `timesteps.shift(timesteps.linspace(5), 7)`.

    Batches hold "states" `[B, m + 1, ...]`: noise in `states[:, 0]`, sample in `states[:, m]`, with the "cond" of the
    run; and "x0", the sample. Begin with the teacher's parameters. For the states of a run of your own:
    `sample(..., save_every=k).trace`.

    Times that a batch brings along become the nearest from which the student steps. In the batch that `prepare`
    returns, "step" `[B]` is the drawn step, and "x0" and "noise" are those of equation (1).
    Raises InvalidInput for key times that pause, and for batches without states at these times.
    """
    need_gaussian("on_trajectories", process)
    refuse_gradient(objective, "on_trajectories")
    times = key_times(grid)
    draw = timesteps.on_grid(times)

    def prepare(state, batch, key):
        if "step" not in batch:
            states = stored_states(batch, times)
            batch = drawn(draw, (), batch, key, 1)
            step = jnp.argmin(jnp.abs(times[:-1] - batch["t"][:, None]), axis=1)
            rows = jnp.arange(batch_size(batch))
            t, t_next = times[step], times[step + 1]
            said = secant(process, states[rows, step], t, states[rows, step + 1], t_next)
            batch = {**batch, "x0": said.x0, "noise": said.eps, "t": t, "step": step}
        return batch if objective.prepare is None else objective.prepare(state, batch, key)

    def init(key, params, batch):
        stored_states(batch, times)
        return objective.init(key, params, batch)

    def loss(params, state, batch, key):
        return objective.loss(params, state, prepare(state, batch, key), key)

    return Objective(init, loss, prepare)
