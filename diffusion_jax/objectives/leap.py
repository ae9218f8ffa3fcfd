"""Leap distillation: a student that goes in one step from a noised coarse sample to the clean one (Wang et al. 2025).

Where a cheap prior of the sample is known (a render, a low resolution, a warped frame), a run may begin with it at an
intermediate time t <= T' in place of noise. The student is a consistency model whose states are made of it,

    x_t = alpha_t base + sigma_t eps,        loss = distance(f(x_t, t) - stopgrad f'(x_s, s)),                       (1)

x_s by one step of the teacher. So it is trained on the states that it meets, and at no others. How far to go back is
a choice by itself: `time_policy`.

`end_frames` is the condition of the paper's video model, `conditioned_on_ends` gives it to any objective.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from diffusion_jax import timesteps
from diffusion_jax.clock import single_step
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.objectives.batches import example_keys, refuse_gradient
from diffusion_jax.objectives.consistency import consistency, neighbour, pseudo_huber
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.randomness import fold, normal
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser, Network, Number, Objective, Params


def leap_distillation(
    network: Network,
    process: Any,
    teacher: Denoiser,
    teacher_params: Params,
    *,
    latest: Number = 0.6,
    levels: int = 50,
    c: Number = 1e-3,
    decay: Number = 0.95,
) -> Objective:
    """Equation (1) as an `Objective` on batches with "x0" and "base": `consistency` on a grid of `levels` times from
    `latest` (T') to 0, with the distance `pseudo_huber(c)` and an average of the student as its target.

    teacher: any denoiser of `process`, guided if need be. decay: of the average. x0 is not read by the loss.
    Sample one step from t: `sample(..., grid=leap_grid(t), x_init=timesteps.noised_start(key, process, grid, base))`.
    Raises InvalidInput for a batch without "base", and a time T' outside of (0, 1].
    """
    if not 0 < latest <= 1 or levels < 1:
        raise invalid("latest, levels", (latest, levels), "a time in (0, 1] and at least one level are needed")
    grid = latest * timesteps.linspace(levels)
    inner = consistency(
        network,
        process,
        neighbour(grid),
        timesteps.on_grid(grid),
        teacher=teacher,
        teacher_params=teacher_params,
        distance=pseudo_huber(c),
        decay=decay,
    )

    def loss(params, state, batch, key):
        if "base" not in batch:
            raise InvalidInput("leap_distillation noises the coarse samples 'base' of the batch, which it lacks.")
        return inner.loss(params, state, batch, key)

    return inner._replace(loss=loss)


def leap_grid(t: Any, steps: int = 1) -> Any:
    """The grid `[steps + 1, B]` that begins at each sample's own `t [B]` and falls to 0 evenly; `[steps + 1]` of one t.

    It is a vector time over the batch, so one program serves all choices of t.
    """
    if steps < 1:
        raise invalid("steps", steps, "at least one is needed")
    t = jnp.asarray(t, jnp.float32)
    share = jnp.linspace(1.0, 0.0, steps + 1).reshape(-1, *(1,) * t.ndim)
    return share * t


def expected_leap_error(noise: Any, error: Any) -> Any:
    """What one step from a coarse sample is worth where all is Gaussian: of x0 ~ N(0, s^2), a coarse sample that is off
    by an independent error of variance `error` s^2, noised to `noise` = sigma^2 / (alpha^2 s^2), and answered by the
    posterior mean, the mean square error in units of s^2,

        (u^2 + u + d) / (1 + u)^2,         u = noise, d = error,       least at u = max(0, 2 d - 1).

    So a sample with less than half of the variance of the data as its error is best left as it is.
    """
    return (noise**2 + noise + error) / (1 + noise) ** 2


def leap_reward(network: Network, process: Any) -> Callable[..., Any]:
    """`(params, batch, t [B], key) -> [B]`: minus the mean square error of x0 as `network` says it, in one evaluation,
    of `alpha base + sigma eps`. It compares with the true data: compared with `base`, t = 0 would be best."""
    inner = denoiser(network, process)

    def reward(params, batch, t, key):
        if "base" not in batch:
            raise InvalidInput("leap_reward noises the coarse samples 'base' of the batch, which it lacks.")
        x_t, _ = process.corrupt(example_keys(key, batch["index"]), batch["base"], t)
        said, _ = inner.apply(params, (), x_t, single_step(t), batch.get("cond"))
        return -per_example(jnp.square(said.x0 - batch["x0"]))

    return reward


def end_frames(clips: Any, keys: Any = None, mean: Number = -3.0, std: Number = 0.5) -> Any:
    """`[B, F, H, W, C + 1]`: first and last frame of `clips [B, F, H, W, C]` at their places, zeros between, and a
    channel that is 1 where a frame is given; for `models.concat()`.

    keys: one per clip, to noise the two frames lightly by a sigma of exp(N(mean, std^2)), one for each clip, so that a
        network does not trust every pixel of them; None leaves them as they are.
    """
    clips = jnp.asarray(clips)
    if clips.ndim != 5 or clips.shape[1] < 2:
        raise invalid("clips.shape", clips.shape, "clips [B, F, H, W, C] of at least two frames were expected")
    ends = (jnp.arange(clips.shape[1]) % (clips.shape[1] - 1) == 0).astype(clips.dtype)[:, None, None, None]
    shown = clips
    if keys is not None:
        sigma = jnp.exp(mean + std * normal(fold(keys, 0), (clips.shape[0],)))
        shown = clips + expand(sigma, clips) * normal(fold(keys, 1), clips.shape)
    return jnp.concatenate([shown * ends, jnp.broadcast_to(ends, (*clips.shape[:-1], 1))], axis=-1)


def conditioned_on_ends(objective: Objective, mean: Number = -3.0, std: Number = 0.5) -> Objective:
    """`objective` on clips whose first and last frame are given: cond["concat"] is `end_frames` of x0, freshly noised,
    and behind it what the batch has there (numbers of cameras, ...).

    Raises InvalidInput for an objective with a rule for its gradient.
    """
    refuse_gradient(objective, "conditioned_on_ends")

    def conditioned(batch, key):
        given = batch.get("cond") or {}
        index = batch.get("index", jnp.arange(batch["x0"].shape[0]))
        ends = end_frames(batch["x0"], fold(example_keys(key, index), 4), mean, std)
        parts = [ends, given["concat"]] if "concat" in given else [ends]
        return {**batch, "cond": {**given, "concat": jnp.concatenate(parts, axis=-1)}}

    def init(key, params, batch):
        return objective.init(key, params, conditioned(batch, key))

    def loss(params, state, batch, key):
        return objective.loss(params, state, conditioned(batch, key), key)

    return Objective(init, loss, objective.prepare)
