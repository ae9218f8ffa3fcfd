"""FVDM (Liu et al. 2024): every frame of a clip has a time of its own, so a task is a choice of times.

One network is trained with a time for each frame in the share p of the examples and with one time for all in the rest.
The arms are p = 0, the ordinary video model, also conditioned by replacement as is usual for it, p = 0.2 as published,
and p = 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, denoisers, metrics, pictures, solvers, streaming, timesteps
from diffusion_jax.config import build
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row

FRAMES = 8
TASKS = {
    "generation": (),
    "image to video": (0,),
    "start and end": (0, FRAMES - 1),
    "any frame": (4,),
    "extension": (0, 1, 2, 3),
}
"""The frames that are given in each task."""

MIDDLE = [3, 4]
"""The frames half-way between the first and the last."""


def study(s: Study) -> Results:
    config = s.config
    first = s.stage("fvdm, p = 0.2", config.arms.mixed, seed=s.seeds[0]).trained
    space = first.source.space
    true = first.held_out.take(range(config.count))["x0"]
    known = space.encode(true)
    arms = task_arms(s, known)
    found = table(arms, s.seeds, follow_measures(space, true), shape=first.shape, count=config.count)
    path = draw_tasks(s, found, space, true)
    return Results(task_rows(found), {path: CAPTION}, "training and noise")


def task_arms(s: Study, known: Any) -> Callable[[int], dict[str, Any]]:
    """The arms at a seed, of networks trained with it: tasks are arrays of one program."""
    config, one = s.config, s.stage("fvdm, p = 0.2", s.config.arms.mixed, seed=s.seeds[0]).trained
    grid, denoiser, ddim = build(config.grid), denoisers.denoiser(one.network, one.process), solvers.ddim()
    given = np.arange(FRAMES) == 0
    replacing = solvers.inpainted(ddim, known, np.broadcast_to(given, known.shape[:2]))

    def going_on(key, denoiser, params, solver, grid, *, shape, cond):
        kept = {"overlap": FRAMES // 2, "context": known[:, : FRAMES // 2]}
        return streaming.sample_chained(key, denoiser, params, solver, grid, shape=shape, chunks=config.chunks, **kept)

    def arms(seed):
        made = {name: s.stage(f"fvdm, {name}", arm, seed=seed).value for name, arm in config.arms.items()}

        def arm(name, task, solver=ddim):
            return Arm(denoiser, made[name], solver, timesteps.frames(grid, FRAMES, TASKS[task]), known=known)

        found: dict[str, Any] = {f"{name}, {task}": arm(name, task) for name in made for task in config.tasks}
        found |= {f"mixed, {task}": arm("mixed", task) for task in TASKS}
        found["replacement"] = arm("synchronous", "generation", replacing)
        found |= {
            f"{name}, long": Arm(denoiser, made[name], ddim, grid, sampled=going_on) for name in made if config.chunks
        }
        return found

    return arms


def follow_measures(space: Any, true: Any) -> Callable[[Drawn], Mapping[str, float]]:
    """What is read in the frames that follow the first one (of long clips: in the last ones), and distances to what
    the latent space makes of true clips: they tell of the diffusion model alone."""
    real = np.asarray(space.decode(space.encode(true)))

    def measure(drawn):
        clips = np.asarray(space.decode(drawn.x))[:, -FRAMES:]
        read = data.moving.verify(clips, reference=true, where=np.arange(FRAMES) > 0)
        middle = float(np.square(clips - real)[:, MIDDLE].mean())
        return read | metrics.clip_distances(clips, real) | {"middle": middle, "blended": blended_error(real)}

    return measure


def blended(clips: Any) -> np.ndarray:
    """The first frame turning into the last linearly."""
    share = np.linspace(0.0, 1.0, clips.shape[1], dtype=np.float32)[:, None, None, None]
    return (1 - share) * clips[:, :1] + share * clips[:, -1:]


def blended_error(clips: Any) -> float:
    """The mean square error of the middle frames where the ends are blended."""
    return float(np.square(blended(clips) - clips)[:, MIDDLE].mean())


def task_rows(found: Tabulated) -> list[Row]:
    """What the paper says, with a value for each seed of training and sampling."""
    colour, both = "frames in the given colour", "frames in the given shape and colour"
    far, eight = "Fréchet distance of frames", "p = 0.2 of eight"
    ours, alone, together = (f"{name}, image to video" for name in ("mixed", "independent", "synchronous"))
    made = [f"{name}, generation" for name in ("mixed", "independent", "synchronous")]
    zero_shot, trick = "zero-shot image to video", "no extra network or trick"
    middle = found["mixed, start and end"]
    result = [
        found.row("image to video: p = 0.2, not p = 0", "colour", ours, together, "higher", "p = 0 cannot condition",
                  figure=colour, margin=0.3),
        found.row("image to video: the colour is kept", "colour", ours, 0.9, "higher", zero_shot, figure=colour),
        found.row("image to video: the shape is kept", "identity", ours, 0.9, "higher", zero_shot, figure=both),
        found.row("better than replacing the frame", "colour", ours, "replacement", "higher", trick, figure=colour),
        found.row("moves as the law says", "next_position_error", ours, "replacement", "lower", trick,
                  figure="error of the next place, pixels"),
        Row("frames between two: half the error of blending", "mean square error", middle["middle"],
            middle["blended"], "lower", "zero-shot interpolation", factor=0.5),
        found.row("generation as good as with p = 0", "frames", made[0], made[2], "lower", "FVD of Latte's order",
                  figure=f"{far}, up to 10 %", factor=1.1),
        found.row("generation: p = 0.2 beats p = 1", "frames", made[0], made[1], "lower", eight, figure=far),
        found.row("image to video: p = 0.2 beats p = 1", "colour", ours, alone, "higher", eight, figure=colour),
    ]  # fmt: skip
    if "mixed, long" in found.figures:
        title, long = "four times as long: better than p = 0", ("mixed, long", "synchronous, long")
        row = found.row(title, "colour", *long, "higher", "from the last frames", figure=f"{colour}, 24 to 31")
        result.append(row)
    return result


CAPTION = (
    "A clip of the test set and what is made of its frames at each choice of times, by p = 0.2 and, below, by p = 0. "
    "Given frames are those of the first strip; in between an object of the given colour should move steadily."
)


def draw_tasks(s: Study, found: Tabulated, space: Any, true: Any) -> Any:
    """A strip of each task of the first seed; the given frames are those of the first strip."""
    shown = {"true clip": space.encode(true)[: s.config.shown]}
    shown |= {f"p = 0.2: {task}": found.samples[f"mixed, {task}"][: s.config.shown] for task in TASKS}
    shown |= {f"p = 0: {task}": found.samples[f"synchronous, {task}"][: s.config.shown] for task in s.config.tasks}
    shown["p = 0: replacement"] = found.samples["replacement"][: s.config.shown]
    if s.config.chunks:
        shown["p = 0.2: every 4th of 32"] = found.samples["mixed, long"][: s.config.shown, ::4]
    strips = {name: np.asarray(space.decode(jnp.asarray(x))) for name, x in shown.items()}
    strips["blended ends"] = blended(strips["true clip"])
    pictures.save_strips(s.picture("tasks"), strips, title="One network, many tasks", along="time")
    return s.picture("tasks")
