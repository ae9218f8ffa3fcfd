"""Consistency in continuous time (Lu & Song 2024, sCM): the two times of `consistency` are infinitely close.

With s the standard deviation of the data, x_t = alpha x0 + sigma eps of any Gaussian process, divided by its length,
moves on a circle as the noise grows (TrigFlow), and a prediction (x0, eps) is a velocity F = dy/da there:

    y = x_t / sqrt(alpha^2 s^2 + sigma^2) = cos(a) x0 / s + sin(a) eps,        tan(a) = sigma / (alpha s)          (1)
    F = cos(a) eps - sin(a) x0 / s,        x0 = s (cos(a) y - sin(a) F)                                            (2)

Let F be that of the student and G the velocity of the flow, a teacher's or that of the pair (x0, eps). The student is
consistent if its x0 does not change along the flow. The tangent g is cos(a) times that change, with D, the derivative
of F along the flow, from one `jax.jvp`:

    g = -s [cos^2(a) (F - G) + r (cos(a) sin(a) y + D)],        D = cos(a) sin(a) (dF/dy G + dF/da)                (3)
    loss = alpha / sigma exp(-l(t)) mean (F - stopgrad(F + g / (|g| + c)))^2 + l(t)                                (4)

|g| is the norm over all entries of an example, in units of the data, so that what c does depends on their number. r
rises from 0, where (4) regresses F to G, to 1 (`tangent_ramp`). l is the learned logarithm of the variance, or 0. At
pure noise, alpha = 0, the weight is 0: what a run begins with is learned from times just below. (2) is regular at all
times for networks that predict a velocity, v or `edm_v`, whose output is F itself (`processes.trig_flow`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import timesteps
from diffusion_jax.clock import network_inputs, single_step
from diffusion_jax.denoisers import on_process
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import corrupted, drawn, example_keys, refuse_weight, updated
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.processes import need_gaussian, safe_inverse
from diffusion_jax.randomness import fold, split
from diffusion_jax.time_axes import expand, fill
from diffusion_jax.typing import Aux, Denoiser, Frozen, Network, Number, Objective, Params, TimestepDraw

TangentRamp = Callable[[Any], Any]
"""`losses so far -> r` of equation (3)."""

ScaledTeacher = Denoiser | Callable[[Any], Denoiser]
"""A teacher, or with `scales` a function of the scales of guidance `[B]` that makes one."""


def tangent_ramp(
    warmup: int = 1000, calm_from: int | None = None, calm_steps: int = 2000, final: Number = 0.75
) -> TangentRamp:
    """r rises linearly to 1 within the first `warmup` losses; from the loss `calm_from` on it falls to `final` within
    `calm_steps` more, which damps the derivative late in training (TBCM); with None it stays.

    Raises InvalidInput for numbers of losses below 1 and a final r outside of [0, 1].
    """
    for name, value in (("warmup", warmup), ("calm_steps", calm_steps)):
        if not value >= 1:
            raise invalid(name, value, "at least one loss is needed")
    if not 0 <= final <= 1:
        raise invalid("final", final, "it must lie in [0, 1]")

    def ramp(count):
        risen = jnp.minimum(1.0, count / warmup)
        fallen = 0.0 if calm_from is None else jnp.clip((count - calm_from) / calm_steps, 0.0, 1.0)
        return risen * (1.0 - fallen) + final * fallen

    return ramp


class Circle(NamedTuple):
    """Equations (1) and (2) for data of one standard deviation under one process."""

    process: Any
    deviation: Number

    def angle(self, t: Any) -> Any:
        """a(t) in [0, pi / 2], any shape."""
        return jnp.arctan2(self.process.sigma(t), self.deviation * self.process.alpha(t))

    def time(self, angle: Any) -> Any:
        """The t of an angle, any shape."""
        ratio = self.deviation * jnp.sin(angle) / jnp.maximum(jnp.cos(angle), 1e-7)
        return timesteps.time_at_noise_ratio(self.process, ratio)

    def length(self, t: Any) -> Any:
        """What x_t is divided by."""
        return jnp.hypot(self.process.sigma(t), self.deviation * self.process.alpha(t))

    def time_rate(self, t: Any) -> Any:
        """dt / da, and 0 where the schedule stands still."""
        alpha_rate, sigma_rate = self.process.rates(t)
        turned = sigma_rate * self.process.alpha(t) - self.process.sigma(t) * alpha_rate
        return jnp.square(self.length(t)) * safe_inverse(self.deviation * turned)

    def velocity(self, x0: Any, eps: Any, t: Any) -> Any:
        """F of a pair."""
        angle = self.angle(t)
        return expand(jnp.cos(angle), x0) * eps - expand(jnp.sin(angle) / self.deviation, x0) * x0


class FlowPairs(NamedTuple):
    """Where a student is compared with the flow: n pairs of each of B examples, `[B n, ...]` and those of an example
    together.

    y, flow: a point on the circle and the velocity G there. t: its time. cond: of the student. keys: of its dropout.
    """

    y: Any
    flow: Any
    t: Any
    cond: Any
    keys: Any


class Tangents(NamedTuple):
    """The loss (4) by pair. weighted: with l = 0. total: the whole."""

    weighted: Any
    total: Any


class TangentLoss(NamedTuple):
    """Equations (3) and (4). circle: equation (1). constant: c. ramp: r. learned: whether l is."""

    network: Network
    circle: Circle
    constant: Number
    ramp: TangentRamp
    learned: bool

    def check(self, params: Params) -> None:
        """Raises InvalidInput at `init` for parameters of another form."""
        if self.learned and (not isinstance(params, dict) or set(params) != {"params", "log_variance"}):
            raise InvalidInput(
                'With log_variance=True the parameters are {"params": those of the network, "log_variance": zeros [K]}.'
            )

    def tangent(self, params: Params, pairs: FlowPairs, r: Any) -> tuple[Any, Any, Any]:
        """F, g of equation (3) without gradient, and what the network reported. params: the network's."""
        circle, process, t = self.circle, self.circle.process, pairs.t
        both = jnp.cos(circle.angle(t)) * jnp.sin(circle.angle(t))

        def student(y, t):
            x = expand(circle.length(t), y) * y
            inputs = network_inputs(process, x, t)
            output, extras = self.network.apply(params, *inputs, pairs.cond, train=True, key=pairs.keys)
            said = process.predict(output.astype(jnp.float32), x, t)
            return circle.velocity(said.x0, said.eps, t), extras

        moves = expand(both, pairs.y) * pairs.flow, both * circle.time_rate(t)
        # One call, so that F and its derivative see the same dropout.
        found, change, extras = jax.jvp(student, (pairs.y, t), moves, has_aux=True)
        near = expand(jnp.square(jnp.cos(circle.angle(t))), found) * (found - pairs.flow)
        g = -circle.deviation * (near + r * (expand(both, found) * pairs.y + change))
        return found, jax.lax.stop_gradient(g), extras

    def losses(self, params: Params, pairs: FlowPairs, count: Any) -> tuple[Tangents, dict[str, Any], Any]:
        """Of each pair, `[B n]`, metrics, and what the network reported. count: losses so far."""
        own, r = params["params"] if self.learned else params, jnp.asarray(self.ramp(count), jnp.float32)
        found, g, extras = self.tangent(own, pairs, r)
        size = jnp.sqrt(jnp.square(g).reshape(len(g), -1).sum(axis=1))
        goal = jax.lax.stop_gradient(found) + g / expand(size + self.constant, g)
        ratio = timesteps.noise_ratio(self.circle.process, pairs.t)
        weighted = safe_inverse(ratio) * per_example(jnp.square(found - goal))
        metrics = {"tangent": jnp.mean(size), "weighted": jnp.mean(weighted), "r": r}
        if not self.learned:
            return Tangents(weighted, weighted), metrics, extras
        spread = log_variance_at(params["log_variance"], self.circle.angle(pairs.t))
        return Tangents(weighted, jnp.exp(-spread) * weighted + spread), metrics, extras


def log_variance_at(weights: Any, angle: Any) -> Any:
    """l of equation (4), a cosine series of the angle: `sum_k weights[k] cos(2 k a)`, of the shape of the angle."""
    return jnp.cos(2.0 * angle[..., None] * jnp.arange(len(weights))) @ weights


class ContinuousConsistency(NamedTuple):
    """teacher: parameters that do not learn. draw: the state of the draw. count: losses so far."""

    teacher: Frozen
    draw: Any
    count: Any


def continuous_consistency(
    network: Network,
    process: Any,
    draw: TimestepDraw | None = None,
    *,
    teacher: ScaledTeacher | None = None,
    teacher_params: Params = None,
    scales: Sequence[Number] = (),
    sigma_data: Number | None = None,
    ramp: TangentRamp | None = None,
    constant: Number = 0.1,
    log_variance: bool = False,
) -> Objective:
    """Equation (4) as an `Objective` on batches `{"x0"}`, optionally with "cond" and "index"; one time an example.

    network: of `process`, in a prediction for which x0 at t = 0 is x: velocity, v, `edm_v`, epsilon, not x0. Its
        derivatives by x and t are taken forwards, which fused attention kernels do not have, and its embedding of t
        should be smooth.
    draw: which t; log(sigma / alpha) ~ N(-1, 1.4^2), as published, by default. It should stay away from t = 0.
    teacher: any denoiser without a memory, guided if need be, of any Gaussian process (`denoisers.on_process`): the
        student then begins with its parameters, at which the loss at r = 0 has no gradient. None: the data make the
        flow (training from scratch).
    scales: of guidance, one of which is drawn for each example; `teacher` is then a function of the drawn `[B]`, such
        as `lambda scale: denoisers.guided(inner, denoisers.sample_scale(scale), null)`, and the network is told
        cond["guidance_scale"] (`models.guidance_scale`).
    sigma_data: s, in units of the data; by default that of the process.
    ramp: r; `tangent_ramp()` by default. constant: c.
    log_variance: learns l; parameters are then `{"params": those of the network, "log_variance": zeros [K]}`, K
        cosines of the angle, of which 8 suffice.

    Sample with `solvers.lcm` on a few times, or in one step. Metrics: `tangent`, the mean |g|, which tells how far the
    student is from consistent (the loss itself hardly moves, since g is normalised), `weighted`, the loss at l = 0, and
    `r`. Per example: `loss`, that at l = 0, and `t`.
    Raises InvalidInput for joint or discrete data, an x0 prediction, network times that are rounded, and scales that do
    not go with the teacher.
    """
    tangents = tangent_loss("continuous_consistency", network, process, sigma_data, ramp, constant, log_variance)
    circle = tangents.circle
    draw = timesteps.log_normal(process, -1.0, 1.4) if draw is None else draw
    check_scales(scales, teacher)

    def init(key, params, batch):
        refuse_weight(batch, "continuous_consistency")
        tangents.check(params)
        return ContinuousConsistency(
            Frozen(() if teacher_params is None else teacher_params), draw.init(), jnp.int32(0)
        )

    def prepare(state, batch, key):
        return with_scales(drawn(draw, state.draw, batch, key, 1), scales, key)

    def loss(params, state, batch, key):
        batch = prepare(state, batch, key)
        batch = {**batch, "x0": batch["x0"].astype(jnp.float32)}
        t = fill(batch["t"], batch["x0"])
        noise_key, network_key = split(example_keys(key, batch["index"]), 2)
        x_t, noise = corrupted(process, noise_key, batch, t)
        said_x0, said_eps = batch["x0"], noise
        if teacher is not None:
            asked, fixed = taught_by(teacher, process, batch), jax.lax.stop_gradient(state.teacher.value)
            carry = asked.init(fixed, x_t, batch.get("cond"))
            said, _ = asked.apply(fixed, carry, x_t, single_step(t), batch.get("cond"))
            said_x0, said_eps = said.x0, said.eps
        y, flow = x_t / expand(circle.length(t), x_t), circle.velocity(said_x0, said_eps, t)
        pairs = FlowPairs(y, jax.lax.stop_gradient(flow), t, told_scale(batch), network_key)
        found, metrics, extras = tangents.losses(params, pairs, state.count)
        draws = updated(draw, state.draw, batch["t"], found.weighted)
        told = {"loss": found.weighted, "t": batch["t"]}
        after = ContinuousConsistency(state.teacher, draws, state.count + 1)
        return batch["t_weight"] * found.total, Aux(after, metrics, told, extras)

    return Objective(init, loss, prepare)


def tangent_loss(
    what: str,
    network: Network,
    process: Any,
    sigma_data: Number | None,
    ramp: TangentRamp | None,
    constant: Number,
    log_variance: bool,
) -> TangentLoss:
    """The loss of the objective `what`, its arguments checked."""
    need_gaussian(what, process)
    if process.prediction == "x0":
        raise invalid("process.prediction", "x0", "one that gives back x at t = 0 is needed, such as velocity or v")
    if process.time.startswith(("nearest", "floor")):
        raise invalid("process.time", process.time, f"{what} differentiates by the time, which must not be rounded")
    deviation = process.sigma_data if sigma_data is None else sigma_data
    for name, value in (("sigma_data", deviation), ("constant", constant)):
        if not 0 < value < np.inf:
            raise invalid(name, value, "it must be positive")
    ramp = tangent_ramp() if ramp is None else ramp
    return TangentLoss(network, Circle(process, deviation), constant, ramp, log_variance)


def check_scales(scales: Sequence[Number], teacher: ScaledTeacher | None) -> None:
    """Raises InvalidInput for scales with a teacher that does not take them, and the other way round."""
    if bool(scales) != (teacher is not None and not isinstance(teacher, Denoiser)):
        told = "scales go with a teacher that is a function of them: lambda scale: denoisers.guided(...)"
        raise invalid("scales", tuple(scales), told)


def with_scales(batch: dict[str, Any], scales: Sequence[Number], key: Any) -> dict[str, Any]:
    """The batch with one of the scales for each example, if there are any."""
    if not scales or "scale" in batch:
        return batch
    keys = fold(example_keys(key, batch["index"]), 4)
    which = jax.vmap(lambda one: jax.random.randint(one, (), 0, len(scales)))(keys)
    return {**batch, "scale": jnp.asarray(scales, jnp.float32)[which]}


def told_scale(batch: dict[str, Any]) -> Any:
    """The condition that the student is given."""
    scale = {"guidance_scale": batch["scale"]} if "scale" in batch else {}
    return {**(batch.get("cond") or {}), **scale} or None


def taught_by(teacher: ScaledTeacher, process: Any, batch: dict[str, Any]) -> Denoiser:
    """The teacher at the drawn scales, as a denoiser of `process`."""
    made = teacher if isinstance(teacher, Denoiser) else teacher(batch["scale"])
    return on_process(made, process)
