"""Consistency models: one evaluation says where the flow through (x_t, t) ends, the same from everywhere along it.

With f(x, t) the predicted x0, which at t = 0 is x itself, and a time s < t on the same path,

    loss = weight(t, s) distance(f(x_t, t) - stopgrad f'(x_s, s)),                                                 (1)

where x_s comes from x_t by one step of a teacher (consistency distillation, Song et al. 2023), or from the same x0 and
noise (consistency training). f' has the parameters of f, or an average of them. With a guided teacher that is told its
scale, and s some steps of a grid below t, it is a latent consistency model (Luo et al. 2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.clock import as_grid, single_step
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import invalid
from diffusion_jax.objectives.batches import corrupted, drawn, example_keys, refuse_weight, updated
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.processes import need_gaussian
from diffusion_jax.randomness import split
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Aux, Denoiser, Frozen, Network, Number, Objective, Params, Process, Times, TimestepDraw

Earlier = Callable[[Any, Any], Any]
"""`(t [B], losses so far) -> s [B]`, the time below t that is compared with it."""

Distance = Callable[[Any], Any]
"""`difference [B, ...] -> [B]`."""


def squared_distance(difference: Any) -> Any:
    """The mean of squares."""
    return per_example(jnp.square(difference))


def pseudo_huber(c: Number | None = None) -> Distance:
    """`(sqrt(|d|^2 + c^2) - c)`, |d| over all entries; c is 0.00054 sqrt(number of entries) unless given.

    It is Song & Dhariwal's (2023) robust distance. Raises InvalidInput for a c that is not positive.
    """
    if c is not None and not c > 0:
        raise invalid("c", c, "it must be positive")

    def distance(difference):
        size = difference[0].size
        width = 0.00054 * size**0.5 if c is None else c
        return jnp.sqrt(size * per_example(jnp.square(difference)) + width**2) - width

    return distance


def neighbour(grid: Times, skip: int = 1) -> Earlier:
    """The entry of a grid `[S + 1]` that is `skip` steps below the first one that t has reached; draw with `on_grid`.

    Raises InvalidInput for a grid of vector times and a skip below 1.
    """
    times: Any = as_grid(grid)
    if times.ndim != 1 or skip < 1:
        raise invalid("grid, skip", (times.shape, skip), "scalar times [S + 1] and a skip of at least 1 are needed")
    rising = times[::-1]
    return lambda t, count: rising[jnp.maximum(jnp.searchsorted(rising, t * (1 - 1e-6), side="left") - skip, 0)]


def shrinking(process: Process, ratio: Number = 2.0, every: int = 1000) -> Earlier:
    """A gap that narrows as training goes on (Geng et al. 2024): sigma_s / alpha_s = (1 - ratio^-n) sigma_t / alpha_t.

    It is their schedule without the factor that widens the gap at low noise. n begins at 1 and grows by 1 every so many
    losses. Where the ratio is infinite, at pure noise, s is t: draw times below 1.
    Raises InvalidInput for a ratio of at most 1 and `every` below 1.
    """
    if ratio <= 1 or every < 1:
        raise invalid("ratio, every", (ratio, every), "a ratio above 1 and at least one loss are needed")

    def earlier(t, count):
        share = 1.0 - jnp.asarray(ratio, jnp.float32) ** -(1.0 + count // every)
        return jnp.minimum(timesteps.time_at_noise_ratio(process, share * timesteps.noise_ratio(process, t)), t)

    return earlier


def gap_weight(process: Process, least: Number = 1e-4) -> Callable[[Any, Any], Any]:
    """`1 / (sigma_t / alpha_t - sigma_s / alpha_s)` (Song & Dhariwal 2023), at most 1 / least.

    It is 0 where alpha_t is 0, as at t = 1 of a linear flow, so one step from there is not learned: leave the weight
    out, or draw times that end before.
    """

    def weight(t, s):
        high, low = timesteps.noise_ratio(process, t), timesteps.noise_ratio(process, s)
        # Of two infinite ones the difference would be NaN.
        gap = jnp.where(jnp.isfinite(high), high - low, jnp.inf)
        return 1.0 / jnp.maximum(gap, jnp.asarray(least, jnp.float32))

    return weight


class Consistency(NamedTuple):
    """teacher: parameters that do not learn. target: an average of the parameters, or () where there is none.
    draw: the state of the draw. count: losses so far."""

    teacher: Frozen
    target: Any
    draw: Any
    count: Any


def consistency(
    network: Network,
    process: Any,
    earlier: Earlier,
    draw: TimestepDraw | None = None,
    *,
    teacher: Denoiser | None = None,
    teacher_params: Params = None,
    distance: Distance = squared_distance,
    weight: Callable[[Any, Any], Any] | None = None,
    decay: Number = 0.0,
) -> Objective:
    """Equation (1) as an `Objective` on batches `{"x0"}`, optionally with "cond" and "index"; one time an example.

    network: of `process`, in a prediction for which x0 at t = 0 is x: velocity, v, epsilon or EDM's, not x0.
    earlier: `neighbour(grid)`, `shrinking(process)`, or a function of one's own. draw: which t, uniform by default.
    teacher: any denoiser of this process without a memory, guided if need be, which makes one DDIM step from t to s; a
        teacher of two times (`denoisers.denoiser(..., target_time=True)`) is told s. None: the data make it.
    distance: of each example; `squared_distance` or `pseudo_huber()`. weight: `(t, s) -> [B]`, 1 by default.
    decay: of the average whose answer is the target; 0 takes the parameters themselves, which is what works best.

    Sample with `solvers.lcm` on a few times, or in one step. Metrics: `distance`, without weights, and `gap`, the mean
    of t - s. Per example: `loss`, `t`. Raises InvalidInput for joint or discrete data, an x0 prediction and a decay
    outside of [0, 1).
    """
    need_gaussian("consistency", process)
    if process.prediction == "x0":
        raise invalid("process.prediction", "x0", "one that gives back x at t = 0 is needed, such as velocity or v")
    if not 0 <= decay < 1:
        raise invalid("decay", decay, "it must lie in [0, 1)")
    if not callable(earlier):
        raise invalid("earlier", earlier, "neighbour(grid), shrinking(process) or a function (t, losses) is needed")
    draw = timesteps.uniform() if draw is None else draw

    def init(key, params, batch):
        refuse_weight(batch, "consistency")
        target = jax.tree.map(jnp.asarray, params) if decay else ()
        return Consistency(Frozen(() if teacher_params is None else teacher_params), target, draw.init(), jnp.int32(0))

    def prepare(state, batch, key):
        return drawn(draw, state.draw, batch, key, 1)

    def answer(params, x, t, cond, key):
        told = Network(network.init, lambda *args: network.apply(*args, train=True, key=key))
        return denoiser(told, process).apply(params, (), x, single_step(t), cond)[0].x0

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        x0, t, cond = batch["x0"], fill(batch["t"], batch["x0"]), batch.get("cond")
        s = jnp.clip(earlier(t, state.count), 0.0, t)
        noise_key, network_key = split(example_keys(key, batch["index"]), 2)
        x_t, noise = corrupted(process, noise_key, batch, t)
        if teacher is None:
            x_s = process.marginal(x0, noise, s)
        else:
            fixed = jax.lax.stop_gradient(state.teacher.value)
            said, _ = teacher.apply(fixed, teacher.init(fixed, x_t, cond), x_t, single_step(t, s), cond)
            x_s = process.marginal(said.x0, said.eps, s)
        # The same dropout on both sides.
        goal = jax.lax.stop_gradient(answer(state.target if decay else params, x_s, s, cond, network_key))
        plain = distance((answer(params, x_t, t, cond, network_key) - goal).astype(jnp.float32))
        recorded = plain if weight is None else weight(t, s) * plain
        target = state.target
        if decay:
            new = jax.lax.stop_gradient(params)
            target = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, target, new)
        after = Consistency(state.teacher, target, updated(draw, state.draw, batch["t"], recorded), state.count + 1)
        metrics = {"distance": jnp.mean(plain), "gap": jnp.mean(t - s)}
        return batch["t_weight"] * recorded, Aux(after, metrics, {"loss": recorded, "t": batch["t"]})

    return Objective(init, loss, prepare)
