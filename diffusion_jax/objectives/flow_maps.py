"""Flow maps: networks that are told a second time, and answer for the whole jump from t to s.

With the flow dx/dt = v(x, t) and u(x_t, t, s) the mean velocity between the two times, x_s = x_t - (t - s) u, so that

    u(x_t, t, s) = v(x_t, t) - (t - s) d/dt u(x_t, t, s),      d/dt = v d/dx + d/dt along the flow                 (1)
    u(x_t, t, t - 2 d) = 1/2 (u(x_t, t, t - d) + u(x_{t - d}, t - d, t - 2 d))                                     (2)

(1) is the identity of mean flows (Geng et al. 2025), differentiated forwards by `jax.jvp`; (2) the self-consistency of
shortcut models (Frans et al. 2024). Both right sides are targets without gradient. v is a teacher's, or that of the
pair of x0 and noise. The network is of the linear flow `processes.rectified_flow()` and has `models.target_time()`
among its conditions; sample with `denoisers.denoiser(network, process, target_time=True)` and `solvers.ddim` or
`flow_euler`, in one step or several.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import timesteps
from diffusion_jax.clock import network_inputs, single_step
from diffusion_jax.denoisers import with_target_time
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import batch_size, corrupted, drawn, example_keys, refuse_weight
from diffusion_jax.objectives.entries import per_example, squared_error
from diffusion_jax.processes import need_gaussian
from diffusion_jax.randomness import fold, split, uniform
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Aux, Denoiser, Frozen, Network, Number, Objective, Params, TimestepDraw


class FlowMap(NamedTuple):
    """The state of both objectives. teacher: parameters that do not learn."""

    teacher: Frozen


def mean_flow(
    network: Network,
    process: Any,
    draw: TimestepDraw | None = None,
    *,
    teacher: Denoiser | None = None,
    teacher_params: Params = None,
    instant_share: Number = 0.75,
    power: Number = 1.0,
) -> Objective:
    """Equation (1), an `Objective` on batches `{"x0"}`, optionally with "cond" and "index".

    draw: of two times, of which the larger is t and the smaller s; logit-normal(-0.4, 1), as published, by default.
    instant_share: of the examples for which s = t, which learn the velocity itself.
    teacher: a denoiser of this process whose velocity is v, guided if need be; None trains from nothing.
    power: the loss is `e / (e + 1e-3)^power` with e the mean square of the error, the denominator without gradient; 0
        is the mean square itself. (The published code has the sum of squares in the place of e.)

    Metrics: `mse`, without the power. Per example: `loss`, `t`.
    Raises InvalidInput for another process than the linear flow, a draw that learns from losses and a share outside of
    [0, 1].
    """
    _check_flow(process)
    if not 0 <= instant_share <= 1:
        raise invalid("instant_share", instant_share, "it must lie in [0, 1]")
    draw = timesteps.logit_normal(-0.4, 1.0) if draw is None else draw

    def prepare(state, batch, key):
        pinned, batch = "t" in batch, drawn(draw, (), batch, key, 1)
        if "target" in batch:
            return batch
        other, _ = draw.draw((), fold(key, 2), batch["t"].shape)
        t = batch["t"] if pinned else jnp.maximum(batch["t"], other)
        instant = uniform(fold(example_keys(key, batch["index"]), 2), t.shape) < instant_share
        return {**batch, "t": t, "target": jnp.where(instant, t, jnp.minimum(batch["t"], other))}

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        t, s = batch["t"], batch["target"]
        noise_key, network_key = split(example_keys(key, batch["index"]), 2)
        x_t, v = _point(process, teacher, state, batch, t, noise_key)
        ask = _asked(network, process, params, batch.get("cond"), network_key)
        u, change = jax.jvp(lambda x, t: ask(x, t, s), (x_t, t), (v, jnp.ones_like(t)))
        goal = v - expand(t - s, v) * change.astype(jnp.float32)
        square = per_example(squared_error(u, jax.lax.stop_gradient(goal)))
        losses = jax.lax.stop_gradient((square + 1e-3) ** -power) * square
        return batch["t_weight"] * losses, Aux(state, {"mse": jnp.mean(square)}, {"loss": losses, "t": t})

    return Objective(_initial(teacher_params, draw, "mean_flow"), loss, prepare)


def shortcut(
    network: Network,
    process: Any,
    draw: TimestepDraw | None = None,
    *,
    teacher: Denoiser | None = None,
    teacher_params: Params = None,
    steps: int = 128,
    one_in: int = 4,
) -> Objective:
    """Equation (2) for one example in `one_in`, and the velocity (s = t) for the others, as an `Objective`.

    steps: a power of two; jumps are of 2 / steps, 4 / steps, ... 1, equally often, from times that are whole multiples
        of the jump. The halves of the shortest, of 1 / steps, are steps along the velocity (s = t), which is learned;
        no loss would say what the network answers for such a jump.
    draw: of the times at which velocities are learned, uniform by default. teacher: as in `mean_flow`.

    Metrics: `mse`, and of the two parts `velocity` and `self_consistency`. Per example: `loss`, `t`.
    A batch that brings its times learns velocities alone, at those. Raises InvalidInput for another process than the
    linear flow, a draw that learns from losses, steps that are no power of two from 2 up and `one_in` below 2.
    """
    _check_flow(process)
    if steps < 2 or steps & (steps - 1):
        raise invalid("steps", steps, "a power of two is needed, 2 or more")
    if one_in < 2:
        raise invalid("one_in", one_in, "it must be at least 2: some examples learn the velocity")
    draw = timesteps.uniform() if draw is None else draw
    jumps = jnp.asarray(0.5 ** np.arange(steps.bit_length() - 1), jnp.float32)

    def prepare(state, batch, key):
        if "jump" in batch:
            return dict(batch)
        if "t" in batch:
            batch = drawn(draw, (), batch, key, 1)
            return {**batch, "jump": jnp.zeros_like(batch["t"])}
        batch = drawn(draw, (), batch, key, 1)
        keys = example_keys(key, batch["index"])
        which = jnp.floor(uniform(fold(keys, 2), batch["t"].shape) * len(jumps)).astype(jnp.int32)
        consistent = jnp.arange(batch_size(batch)) % one_in == 0
        jump = jnp.where(consistent, jumps[which], 0.0)
        places = 1.0 / jumps[which]
        t = jumps[which] * (1.0 + jnp.floor(uniform(fold(keys, 6), jump.shape) * places))
        return {**batch, "t": jnp.where(consistent, t, batch["t"]), "jump": jump}

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        t, jump = batch["t"], batch["jump"]
        noise_key, network_key = split(example_keys(key, batch["index"]), 2)
        x_t, v = _point(process, teacher, state, batch, t, noise_key)
        ask = _asked(network, process, params, batch.get("cond"), network_key)
        some = slice(None, None, one_in)
        cond = jax.tree.map(lambda leaf: leaf[some], batch.get("cond"))
        half = _asked(network, process, jax.lax.stop_gradient(params), cond, network_key[some])
        x, at, d = x_t[some], t[some], 0.5 * jump[some]
        told = jnp.where(d * steps > 1.0, d, 0.0)
        first = half(x, at, at - told)
        second = half(x - expand(d, x) * first, at - d, at - d - told)
        jumping = expand(jump[some] > 0, first)
        goal = v.at[some].set(jnp.where(jumping, 0.5 * (first + second), v[some]))
        losses = per_example(squared_error(ask(x_t, t, t - jump), jax.lax.stop_gradient(goal)))
        consistent = (jump > 0).astype(jnp.float32)

        def mean(weights):
            return (weights * losses).sum() / jnp.maximum(weights.sum(), 1.0)

        told = {"mse": losses.mean(), "velocity": mean(1.0 - consistent), "self_consistency": mean(consistent)}
        return batch["t_weight"] * losses, Aux(state, told, {"loss": losses, "t": t})

    return Objective(_initial(teacher_params, draw, "shortcut"), loss, prepare)


def _check_flow(process: Any) -> None:
    need_gaussian("A flow map", process)
    t = np.linspace(0.0, 1.0, 5, dtype=np.float32)
    linear = np.allclose(process.alpha(t), 1 - t, atol=1e-6) and np.allclose(process.sigma(t), t, atol=1e-6)
    if process.prediction != "velocity" or not linear:
        raise InvalidInput("A flow map predicts velocities of the linear flow: processes.rectified_flow() is needed.")


def _initial(teacher_params: Params, draw: TimestepDraw, what: str) -> Callable[..., FlowMap]:
    if jax.tree.leaves(draw.init()):
        raise invalid("draw", draw, f"{what} takes one that learns nothing from losses: its times come in pairs")

    def init(key, params, batch):
        refuse_weight(batch, what)
        return FlowMap(Frozen(() if teacher_params is None else teacher_params))

    return init


def _point(process, teacher, state, batch, t, keys):
    """x_t, and the velocity there, in one precision, as `jax.jvp` needs them."""
    batch = {**batch, "x0": batch["x0"].astype(jnp.float32)}
    x_t, noise = corrupted(process, keys, batch, t)
    if teacher is None:
        return x_t, noise - batch["x0"]
    fixed, cond = jax.lax.stop_gradient(state.teacher.value), batch.get("cond")
    said, _ = teacher.apply(fixed, teacher.init(fixed, x_t, cond), x_t, single_step(t), cond)
    return x_t, jax.lax.stop_gradient(process.velocity(said, t))


def _asked(network, process, params, cond, keys):
    """The network's answer as a function of x, t and s."""

    def ask(x, t, s):
        told = with_target_time(process, x, s, cond)
        return network.apply(params, *network_inputs(process, x, t), told, train=True, key=keys)[0].astype(jnp.float32)

    return ask
