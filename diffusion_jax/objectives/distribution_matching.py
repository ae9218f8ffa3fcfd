"""Distribution matching distillation: a fast generator learns from the difference of two scores (Yin et al. 2024).

A student makes samples X in a few steps. A frozen teacher knows the score of noisy data; a third network, the fake, is
trained all along on X alone and knows the score of noisy samples. With x_t = alpha X + sigma eps,

    D = (x0_fake(x_t, t) - x0_teacher(x_t, t)) / mean |X - x0_teacher(x_t, t)|,                                    (1)
    loss = mean 0.5 (X - stopgrad(X - D))^2,        so that  d loss / d X  =  D / (number of entries)              (2)

moves samples away from where they are denser than the data: the gradient of KL(samples || data), averaged over noise
levels. The student's samples are not paired with samples of the teacher, and it may be another kind of network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.clock import as_grid, clock, num_steps, single_step
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.objectives.batches import batch_size, drawn, example_keys, refuse_weight
from diffusion_jax.objectives.denoising import denoising
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.randomness import fold, split
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Aux, Denoiser, Frozen, Network, Objective, Params, Times, TimestepDraw

PARTS = ("fake", "student")


class Matching(NamedTuple):
    """teacher: parameters that do not learn. fake: the state of the fake's own loss. count: steps so far."""

    teacher: Frozen
    fake: Any
    count: Any


def distribution_matching(
    generate: Callable[..., Any],
    teacher: Denoiser,
    teacher_params: Params,
    fake: Network,
    draw: TimestepDraw | None = None,
    every: int = 5,
) -> Objective:
    """The loss (2) of the student and the denoising loss of the fake, on parameters `{"student", "fake"}`.

    generate: `(params, batch, key) -> X [B, ...]`, differentiable: samples for the batch's `cond` and `index`; what
        else the batch holds (its x0) is at its disposal, and may be left alone. Whatever the key drives may be shared
        by the batch.
    teacher: any denoiser, guided if need be, of the process in which scores are compared; `teacher_params` do not
        learn (`typing.Frozen`). fake: a network of the same process, which usually begins as a copy of the teacher's.
    draw: times of the comparison and of the fake's training; uniform on [0.02, 0.98] by default.
    every: the student has a loss in steps 0, k, 2k, ...; in the others it is not differentiated. Train with
        `training.optimizers.alternating({"student": ..., "fake": ...}, {"student": k})`, which leaves it alone there.

    One training step, one batch, two losses: neither reaches the other's parameters, so their sum is differentiated.
    Metrics: `fake`, the fake's mean square error, to be watched (the student fails where it lags), and `distance`,
    mean |x0_fake - x0_teacher|, 0 in steps without the student. Per example: `loss`, the fake's.

    Raises InvalidInput for `every` below 1, and at `init` for other parameters than the two.
    """
    if isinstance(every, bool) or every < 1:
        raise invalid("every", every, "a whole number of at least 1 is needed")
    process = teacher.process
    draw = timesteps.uniform(0.02, 0.98) if draw is None else draw
    own, judge = denoising(fake, process, draw), denoiser(fake, process)

    def init(key, params, batch):
        refuse_weight(batch, "distribution_matching")
        for name in PARTS:
            if name not in params:
                raise unknown("an entry of the parameters", name, params)
        return Matching(Frozen(teacher_params), own.init(key, params["fake"], batch), jnp.int32(0))

    def direction(params, state, x, batch, key):
        """D of equation (1), and |x0_fake - x0_teacher|, each `[B]` in mean."""
        batch = drawn(draw, state.fake, {**batch, "x0": x}, fold(key, 0), 1)
        t, cond = batch["t"], batch.get("cond")
        x_t, _ = process.corrupt(example_keys(fold(key, 1), batch["index"]), x, t)
        at = single_step(t)
        fixed = state.teacher.value
        real, _ = teacher.apply(fixed, teacher.init(fixed, x_t, cond), x_t, at, cond)
        made, _ = judge.apply(params["fake"], (), x_t, at, cond)
        size = jnp.maximum(per_example(jnp.abs(x - real.x0)), 1e-3)
        difference = made.x0 - real.x0
        return difference / expand(size, x), per_example(jnp.abs(difference))

    def loss(params, state, batch, key):
        batch = {"index": jnp.arange(batch_size(batch)), **batch}
        make_key, match_key, own_key = split(key, 3)
        frozen = jax.lax.stop_gradient(params)

        def with_student():
            x = generate(params["student"], batch, make_key)
            fixed = jax.lax.stop_gradient(x)
            towards, distance = direction(frozen, state, fixed, _told(batch), match_key)
            return 0.5 * per_example(jnp.square(x - (fixed - towards))), distance, fixed

        def without_student():
            x = generate(frozen["student"], batch, make_key)
            nothing = jnp.zeros(x.shape[0], x.dtype)
            return nothing, nothing, x

        matched, distance, x = jax.lax.cond(state.count % every == 0, with_student, without_student)
        followed, aux = own.loss(params["fake"], state.fake, {**_told(batch), "x0": x}, own_key)
        metrics = {"fake": jnp.mean(aux.per_example["loss"]), "distance": jnp.mean(distance)}
        return matched + followed, Aux(Matching(state.teacher, aux.state, state.count + 1), metrics, aux.per_example)

    return Objective(init, loss)


def few_step_answers(denoiser: Denoiser, grid: Times, first: float = 0.5) -> Callable[..., Any]:
    """`generate` of `distribution_matching`: the prediction of a student of one or few steps at one random step of its
    grid.

    It sees data that are noised to the time of that step, and pure noise in the first one, where runs begin (Yin et al.
    2024, DMD2, with noised data in the place of the student's own samples). The step is shared by the batch.

    denoiser: the student on its process. grid: `[S + 1]`, from its first time down to 0; with S = 1 the student sees
        noise alone (Yin et al. 2024, DMD, without its regression loss). first: how often it is the first step, which
        has the most to learn; the others are equally frequent.
    Raises InvalidInput for `first` outside of (0, 1).
    """
    times: Any = as_grid(grid)
    steps = num_steps(times)
    if not 0 < first < 1:
        raise invalid("first", first, "a share between 0 and 1 was expected")
    shares = jnp.asarray([1.0] if steps == 1 else [first] + [(1.0 - first) / (steps - 1)] * (steps - 1))

    def generate(params, batch, key):
        step_key, noise_key = split(key, 2)
        index = jax.random.choice(step_key, steps, p=shares)
        x0, t = batch["x0"], times[index]
        x, noise = denoiser.process.corrupt(example_keys(noise_key, batch["index"]), x0, t)
        x = jnp.where(index == 0, noise, x)
        step, cond = clock(times).step(index), batch.get("cond")
        return denoiser.apply(params, denoiser.init(params, x, cond), x, step, cond)[0].x0

    return generate


def _told(batch):
    """What networks are told about an example: its condition, and to whom its randomness belongs."""
    return {name: batch[name] for name in ("cond", "index") if name in batch}
