"""Adversarial losses of few-step students: at every level their runs are told from those of the teacher.

A student that makes m steps on key times t_0 > ... > t_m, and the teacher's runs stored at these times, are compared
at the end of each step j, at time t_(j + 1), by a discriminator of features of a frozen network, usually the teacher,
which is told that time; each level has a head of its own (Zhang et al. 2025, AccVideo):

    logits = H_j(features(x, t_(j + 1), c)),        fake = student's step from x_j,    real = stored x_(j + 1),
    critic:   softplus(-logits(real)) + softplus(logits(fake)) + r1 / 2 |d logits(real) / d real|^2,              (1)
    student:  weight softplus(-logits(fake)),                                                                    (2)

or the hinge losses. Nothing is noised. The x_j of a student are where its own runs pass through, which would take a run
from noise for every update. Instead a run for each example of the batch is carried from update to update, and makes one
step in each:

    x <- stopgrad(fake),        j <- j + 1, and from j = m on a new run from noise, at the batch's condition        (3)

so what is at level j has made j steps, with the parameters of the last j updates. The runs begin one after the other,
so that every batch holds all levels. (AccVideo keeps queues of batches, one for each level, and trains the levels in
turn: the same with one batch in the place of m.)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.clock import network_inputs, single_step
from diffusion_jax.errors import InvalidInput, invalid, need, unknown
from diffusion_jax.models import intercepted, taps
from diffusion_jax.models.anatomy import required
from diffusion_jax.models.stages import main_block, of_blocks
from diffusion_jax.objectives.batches import batch_size, example_keys, refuse_gradient
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.objectives.trajectories import key_times, stored_states
from diffusion_jax.randomness import fold
from diffusion_jax.time_axes import where
from diffusion_jax.typing import Denoiser, Frozen, Network, Objective, Params, Process, Times

PARTS = ("heads", "student")


class GanLoss(NamedTuple):
    """The two sides of a game, of logits that are high for what is taken for real; entry by entry.

    critic: (real, fake) -> loss. student: (fake) -> loss.
    """

    critic: Callable[[Any, Any], Any]
    student: Callable[[Any], Any]


def non_saturating() -> GanLoss:
    """`-log s(real) - log(1 - s(fake))`, and `-log s(fake)` of the student, s the sigmoid (Goodfellow et al. 2014)."""
    softplus = jax.nn.softplus
    return GanLoss(lambda real, fake: softplus(-real) + softplus(fake), lambda fake: softplus(-fake))


def hinge() -> GanLoss:
    """`max(0, 1 - real) + max(0, 1 + fake)`, and `-fake` of the student (Lim & Ye 2017)."""
    return GanLoss(lambda real, fake: jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + fake), lambda fake: -fake)


class Discriminator(NamedTuple):
    """Heads on features of a frozen network, one for each level 0 .. m - 1.

    init: (key, params, x, cond) -> heads               params: of the frozen network; x `[B, ...]` for its shape
    features: (params, x, level [B], cond) -> [B, N, C]         differentiable with respect to x
    judge: (heads, features, level [B]) -> logits [B, N]        of every token, by the head of its level
    grid: the key times `[m + 1]`; level j is at `grid[j + 1]`
    """

    init: Callable[..., Params]
    features: Callable[..., Float[Array, "B N C"]]
    judge: Callable[..., Float[Array, "B N"]]
    grid: Any


def feature_discriminator(
    network: Network,
    process: Process,
    grid: Times,
    width: int = 64,
    blocks: Sequence[int] | None = None,
) -> Discriminator:
    """A `Discriminator` of what `network`, of `process`, has in its residual stream at the time of each level.

    Features are normalised over the channels; a head is a layer of `width` and a logit for each token (convolutions of
    1 x 1: the network itself has looked around). The heads' parameters are stacked over the levels.

    grid: key times `[m + 1]`. blocks: behind which block the features of each level are taken, m numbers from 0; by
        default the last one, and for a level at t = 0 the one at two thirds of the depth (40 of 60 in AccVideo).
    Raises InvalidInput for networks without one stack of blocks, for grids that pause, and for blocks that there are
    not.
    """
    times = key_times(grid)
    depth, levels = required(network, "depth", "feature_discriminator"), len(times) - 1
    required(network, "stack", "feature_discriminator")
    if width < 1:
        raise invalid("width", width, "it must be positive")
    if blocks is None:
        blocks = [depth - 1 if t > 0 else max(round(2 * depth / 3) - 1, 0) for t in np.asarray(times[1:])]
    if len(blocks) != levels or not all(0 <= block < depth for block in blocks):
        expected = f"{levels} numbers of blocks are needed, one for each level, from 0 to {depth - 1}"
        raise invalid("blocks", tuple(blocks), expected)
    behind = jnp.asarray(blocks)
    opened = intercepted(network, taps(main_block))

    def features(params, x, level, cond=None):
        _, extras, _ = opened.apply(params, {}, *network_inputs(process, x, times[level + 1]), cond)
        (every,) = jax.tree.leaves(of_blocks(network, extras["taps"]))
        stream = every[behind[level], jnp.arange(x.shape[0])].astype(jnp.float32)
        stream = stream.reshape(x.shape[0], -1, stream.shape[-1])
        return jax.nn.standardize(stream, axis=-1, epsilon=1e-6)

    def init(key, params, x, cond=None):
        level = jnp.zeros(x.shape[0], jnp.int32)
        channels = jax.eval_shape(features, params, x, level, cond).shape[-1]
        hidden, out = jax.random.split(key)
        return {
            "hidden": {
                "kernel": jax.random.normal(hidden, (levels, channels, width)) / channels**0.5,
                "bias": jnp.zeros((levels, width)),
            },
            "out": {"kernel": jax.random.normal(out, (levels, width)) / width**0.5, "bias": jnp.zeros(levels)},
        }

    def judge(heads, features, level):
        own: Any = jax.tree.map(lambda leaf: leaf[level], heads)
        hidden = jnp.einsum("bnc,bcw->bnw", features, own["hidden"]["kernel"]) + own["hidden"]["bias"][:, None]
        return jnp.einsum("bnw,bw->bn", jax.nn.silu(hidden), own["out"]["kernel"]) + own["out"]["bias"][:, None]

    return Discriminator(init, features, judge, times)


class CarriedRuns(NamedTuple):
    """The state of `adversarial`. teacher: the discriminator's frozen parameters. inner: the state of the other loss.

    x `[B, ...]`, cond: the student's runs, equation (3), and their conditions. count: updates so far; run i has made
    (count + i) mod m steps, where it has begun.
    """

    teacher: Frozen
    inner: Any
    x: Any
    cond: Any
    count: Any


def adversarial(
    objective: Objective,
    student: Denoiser,
    discriminator: Discriminator,
    teacher_params: Params,
    loss: GanLoss | None = None,
    weight: float | int = 0.1,
    r1: float | int = 0.0,
) -> Objective:
    """`objective` of the student and equations (1) to (3), on parameters `{"student", "heads"}`.

    objective: any loss of the student's parameters, such as `on_trajectories`. student: its denoiser, without a memory,
        to be sampled by `solvers.ddim()` on `discriminator.grid`. teacher_params: of the discriminator's network; they
        do not learn (`typing.Frozen`).
    loss: `non_saturating()` by default. weight: of (2). r1: of the penalty in (1), 0 for none; it costs another
        evaluation of the network and its derivative.

    Batches hold "states" `[B, m + 1, ...]`, stored runs (`on_trajectories`), of which the reals are at the batch's own
    conditions. The heads begin as `discriminator.init(...)`. Train with `training.optimizers.alternating({"student":
    ..., "heads": ...})`: both losses are differentiated at once and neither reaches what the other trains, so their
    optimisers may differ. Metrics: those of `objective`, and the means of `critic`, (1), and of `student`, (2) without
    its weight.

    Raises InvalidInput for negative weights and for an objective with a gradient of its own; at `init` for other
    parameters than the two, a student with a memory, and batches without states; and for gradient accumulation, which
    would cut the carried runs.
    """
    loss = non_saturating() if loss is None else loss
    need("loss", loss, GanLoss, "non_saturating(), hinge() or another GanLoss is needed")
    need("discriminator", discriminator, Discriminator, "one such as feature_discriminator(...) is needed")
    for name, value in (("weight", weight), ("r1", r1)):
        if not value >= 0:
            raise invalid(name, value, "it must not be negative")
    refuse_gradient(objective, "adversarial")
    times, steps, game = discriminator.grid, len(discriminator.grid) - 1, loss

    def init(key, params, batch):
        for name in PARTS:
            if name not in params:
                raise unknown("an entry of the parameters", name, params)
        stored_states(batch, times)
        x, cond = jnp.zeros_like(batch["x0"]), jax.tree.map(jnp.zeros_like, batch.get("cond"))
        if jax.tree.leaves(jax.eval_shape(student.init, params["student"], x, cond)):
            raise InvalidInput("The student remembers its last step, but its runs are cut into single steps.")
        inner = objective.init(key, params["student"], batch)
        return CarriedRuns(Frozen(teacher_params), inner, x, cond, jnp.int32(0))

    def logits(heads, fixed, x, level, cond):
        return discriminator.judge(heads, discriminator.features(fixed, x, level, cond), level)

    def penalty(heads, fixed, real, level, cond):
        slope = jax.grad(lambda x: logits(heads, fixed, x, level, cond).mean(axis=1).sum())(real)
        return 0.5 * r1 * jnp.square(slope).reshape(len(slope), -1).sum(axis=1)

    def total(params, state, batch, key):
        size = batch_size(batch)
        if size != len(state.x):
            raise invalid("the batch's size", size, f"{len(state.x)} runs are carried; train without accumulation")
        losses, aux = objective.loss(params["student"], state.inner, batch, key)

        # Run i begins in the first update in which its number of steps is a multiple of m.
        run = jnp.arange(size)
        level = (state.count + run) % steps
        begun = (state.count >= -run % steps).astype(jnp.float32)
        index = batch.get("index", run)
        noise = student.process.prior(example_keys(fold(key, 3), index), batch["x0"].shape)
        x = where(level == 0, noise, state.x)
        cond = jax.tree.map(lambda new, old: where(level == 0, new, old), batch.get("cond"), state.cond)
        now, then = times[level], times[level + 1]
        said, _ = student.apply(params["student"], (), x, single_step(now, then), cond)
        fake = student.process.marginal(said.x0, said.eps, then)

        fixed = jax.lax.stop_gradient(state.teacher.value)
        real = jax.lax.stop_gradient(stored_states(batch, times)[run, level + 1])
        # One evaluation for both.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (fake, cond), (real, batch.get("cond")))
        twice = jnp.concatenate([level, level])
        seen = discriminator.features(fixed, both[0], twice, both[1])
        critical = discriminator.judge(params["heads"], jax.lax.stop_gradient(seen), twice)
        critic = per_example(game.critic(critical[size:], critical[:size]))
        if r1:
            critic += penalty(params["heads"], fixed, real, level, batch.get("cond"))
        heads = jax.lax.stop_gradient(params["heads"])
        fooled = per_example(game.student(discriminator.judge(heads, seen[:size], level)))

        share = jnp.maximum(begun.mean(), 1.0 / size)
        metrics = {**aux.metrics, "critic": (begun * critic).mean() / share, "student": (begun * fooled).mean() / share}
        after = CarriedRuns(state.teacher, aux.state, jax.lax.stop_gradient(fake), cond, state.count + 1)
        return losses + begun * (critic + weight * fooled), aux._replace(state=after, metrics=metrics)

    prepare = objective.prepare
    return Objective(init, total, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))
