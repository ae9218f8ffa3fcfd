"""Continuous-time consistency on the states that a sampler really visits, without any data (TBCM).

Noised data are not what a student meets when it samples: along a run the noise (x_t - alpha x0) / sigma that belongs to
its own endpoint x0 depends on x0. So the pairs of equation (3) of `continuous_consistency` are taken from runs of the
teacher. A route through random angles, one in each interval of a grid,

    a_0 = pi / 2,        a_i ~ U(knot_i, knot_(i - 1)),  i = 1 .. S,        a_(S + 1) = 0,                           (1)

is run by DDIM, an exact step on the circle at a fixed velocity G: y' = cos(a - a') y - sin(a - a') G(y, a). All its
states but the first, where the weight is 0, become pairs, with the velocities that the teacher gave there: S pairs for
S + 1 evaluations, and neither data nor an encoder. Published as hustvl/TBCM, whose code is followed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.denoisers import recorded
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import batch_size, example_keys, refuse_weight
from diffusion_jax.objectives.continuous_consistency import (
    Circle,
    FlowPairs,
    ScaledTeacher,
    TangentRamp,
    check_scales,
    tangent_loss,
    taught_by,
    told_scale,
    with_scales,
)
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.objectives.trajectories import key_times
from diffusion_jax.randomness import fold, split, uniform
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import ddim
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Aux, Condition, Denoiser, Frozen, Network, Number, Numbers, Objective, Params, Times

EndpointFilter = Callable[[Any, Any], Any]
"""`(x0 [B, ...], keys [B]) -> [B]`: 1 for runs that are learned from, 0 for others."""


def away_from(example: Numbers, threshold: Number = 1.0) -> EndpointFilter:
    """Drops degenerate endpoints, such as black images: a run is kept with probability m / threshold, m being the mean
    square difference of its endpoint from `example`. Raises InvalidInput for a threshold that is not positive."""
    if not threshold > 0:
        raise invalid("threshold", threshold, "it must be positive")
    example = jnp.asarray(example, jnp.float32)

    def keep(x0, keys):
        return (uniform(keys, (len(x0),)) * threshold < per_example(jnp.square(x0 - example))).astype(jnp.float32)

    return keep


class Trajectory(NamedTuple):
    """A run of a teacher. y, flow: points on the circle and velocities there, `[N, B, ...]`. x0: where it ended."""

    y: Any
    flow: Any
    x0: Any


def teacher_trajectory(
    teacher: Denoiser, params: Params, circle: Circle, key: Any, grid: Any, shape: Any, cond: Condition, index: Any
) -> Trajectory:
    """A run from noise through `grid [N + 1]`, or `[N + 1, B]`: `sampling.sample` with DDIM, each step recorded.

    teacher: of the process of `circle`. shape: with the batch. index: `[B]`, of the examples.
    """

    def read(said, x, step):
        return x / expand(circle.length(step.t), x), circle.velocity(said.x0, said.eps, step.t)

    seen = recorded(teacher, len(grid) - 1, read)
    run = sample(key, seen, params, ddim(), grid, shape=shape, cond=cond, index=index)
    y, flow = run.run.carry.values
    return Trajectory(y, flow, run.x)


class TrajectoryBackward(NamedTuple):
    """teacher: parameters that do not learn. count: losses so far."""

    teacher: Frozen
    count: Any


def trajectory_backward(
    network: Network,
    process: Any,
    teacher: ScaledTeacher,
    teacher_params: Params,
    grid: Times,
    *,
    scales: Sequence[Number] = (),
    sigma_data: Number | None = None,
    ramp: TangentRamp | None = None,
    constant: Number = 0.1,
    log_variance: bool = False,
    keep: EndpointFilter | None = None,
) -> Objective:
    """The loss of `continuous_consistency` on pairs of the teacher's runs along random routes (1), an `Objective`.

    Of a batch it reads "cond" and "index"; of x0 only the shape, so zeros will do where there are no data.

    grid: `[S + 1]` from 1 to 0, times of `process`, whose angles are the knots of (1); such as
        `timesteps.shift(timesteps.linspace(15), 2.5)` of a linear flow. One route a step, shared by the batch.
    keep: which runs count by where they ended, such as `away_from`; the others have no loss.
    The other arguments, and the parameters, are those of `continuous_consistency`. Its teacher must be given here.

    One step asks the teacher S + 1 times an example, twice that with guidance, and the student at S pairs; where these
    do not fit into memory, let the step accumulate over smaller batches. An example that brings its time "t", as in
    validation, has one pair: S + 1 steps end there.

    Metrics: `tangent`, `weighted`, `r` as there, and `kept`, the share of runs. Per example: `loss`, `t [B, S]` and
    `loss_at_t`. Raises InvalidInput as there, and for a grid that does not fall to 0 or pauses.
    """
    tangents = tangent_loss("trajectory_backward", network, process, sigma_data, ramp, constant, log_variance)
    circle = tangents.circle
    if teacher is None:
        raise InvalidInput("trajectory_backward learns from runs of a teacher, but teacher is None.")
    check_scales(scales, teacher)
    times = key_times(grid)
    if times[-1] != 0:
        raise invalid("grid", times.tolist(), "key times that fall to 0 are needed")
    knots = circle.angle(times)

    def init(key, params, batch):
        refuse_weight(batch, "trajectory_backward")
        tangents.check(params)
        return TrajectoryBackward(Frozen(teacher_params), jnp.int32(0))

    def prepare(state, batch, key):
        size = batch_size(batch)
        batch = with_scales({"index": jnp.arange(size), **batch}, scales, key)
        if "route" in batch:
            return batch
        if "t" in batch:
            last = circle.angle(batch["t"])
            angles = jnp.pad(jnp.linspace(knots[0], last, len(knots), axis=1), ((0, 0), (0, 1)))
        else:
            angles = jnp.broadcast_to(timesteps.stratified_route(fold(key, 0), knots), (size, len(knots) + 1))
        route = circle.time(angles)
        return {**batch, "route": route.at[:, 0].set(times[0]).at[:, -1].set(0.0)}

    def loss(params, state, batch, key):
        single = "t" in batch
        batch = prepare(state, batch, key)
        size, cond = batch_size(batch), batch.get("cond")
        run_key, keys = fold(key, 2), example_keys(key, batch["index"])
        network_key, keep_key = split(keys, 2)
        # A route that all share is one grid, at which guidance and caches of the teacher may decide for all.
        route = batch["route"].T if single else batch["route"][0]
        asked, fixed = taught_by(teacher, process, batch), state.teacher.value
        shape = batch["x0"].shape
        run = teacher_trajectory(asked, fixed, circle, run_key, route, shape, cond, batch["index"])
        run = jax.lax.stop_gradient(run)
        some = slice(-1, None) if single else slice(1, None)
        t = batch["route"][:, :-1][:, some]
        n = t.shape[1]

        def by_example(values):
            # FlowPairs of an example stand together, so that a mesh splits them as it splits examples.
            return jnp.moveaxis(values[some], 0, 1).reshape(size * n, *shape[1:])

        told = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), n, axis=0), told_scale(batch))
        own = jnp.stack([fold(network_key, i) for i in range(n)], axis=1).reshape(size * n)
        pairs = FlowPairs(by_example(run.y), by_example(run.flow), t.reshape(size * n), told, own)
        found, metrics, extras = tangents.losses(params, pairs, state.count)
        kept = jnp.ones(size) if keep is None else keep(run.x0, keep_key)
        weighted, total = (values.reshape(size, n) * kept[:, None] for values in found)
        after = TrajectoryBackward(state.teacher, state.count + 1)
        per = {"loss": weighted.mean(axis=1), "t": t, "loss_at_t": weighted}
        return total.mean(axis=1), Aux(after, {**metrics, "kept": jnp.mean(kept)}, per, extras)

    return Objective(init, loss, prepare)
