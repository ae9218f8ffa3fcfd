"""AR-Diffusion (Sun et al. 2025): clips in which earlier frames are never noisier than later ones.

A causal network is trained at times that never fall along the frames, t_1 <= t_2 <= ... <= t_F, anchored at a random
frame and level (FoPP), and samples along a staircase in which each frame runs s steps behind the one before it.
Measured against the same network at independent times, against an ordinary model that sees all frames and has one time
a clip, with as many evaluations, and against going on with that chunk by chunk.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, denoisers, metrics, models, pictures, processes, solvers, streaming, timesteps
from diffusion_jax.config import ConfigDict
from diffusion_jax.experiment import Experiment
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row


def study(s: Study) -> Results:
    config, first = s.config, s.stage("anchored", s.config.arms.anchored, seed=s.seeds[0]).trained
    space = first.source.space
    clips = data.moving_shapes("test", config.clips, frames=config.frames, classes=()).take(range(config.clips))["x0"]
    real = np.asarray(space.decode(space.encode(clips)))
    arms = staircase_arms(s, first)
    found = table(arms, s.seeds, clip_measures(space, real), shape=first.shape, count=config.clips)
    drawn = draw_long(s, found, space, real) | draw_widths(s, found, first.shape[0])
    return Results(
        [*quality_rows(config, found), *kept_rows(found), *oracle_rows(config.oracle)], drawn, "training and noise"
    )


def staircase_arms(s: Study, one: Experiment) -> Callable[[int], dict[str, Arm]]:
    """The arms at a seed, of networks trained with it. one: an experiment of the causal network."""
    config, window, ddim = s.config, one.shape[0], solvers.ddim()
    grid, steps = timesteps.linspace(config.steps), config.steps
    whole = s.stage("synchronous", config.arms.synchronous, seed=s.seeds[0]).trained
    causal, together = (denoisers.denoiser(e.network, e.process) for e in (one, whole))
    plan = timesteps.staircase(grid, config.frames, config.width)
    sliding = partial(slid, window, timesteps.windows(plan, window))
    keeping = partial(kept_keys, models.incremental(one.network, window=window - 1))
    nothing, longer = (np.zeros((config.clips, frames, *one.shape[1:])) for frames in (window, config.frames))
    # As many evaluations as the staircases, for all frames at once, and shared out among the chunks.
    chunks = 1 + -(-(config.frames - window) // (window - config.overlap))
    finer = timesteps.linspace(steps + (window - 1) * config.width)
    by_chunk = timesteps.linspace((steps + (config.frames - 1) * config.width) // chunks)
    going_on = partial(in_chunks, chunks, config.overlap)

    def arms(seed):
        params = {name: s.stage(name, arm, seed=seed).value for name, arm in config.arms.items()}

        def stairs(name, width):
            return Arm(causal, params[name], ddim, timesteps.staircase(grid, window, width))

        found = {f"anchored, s = {width}": stairs("anchored", width) for width in config.widths}
        found["independent"] = stairs("independent", config.width)
        found["all at once"] = Arm(causal, params["anchored"], ddim, timesteps.synchronous(finer, window))
        found["synchronous"] = Arm(together, params["synchronous"], ddim, finer)
        for name in ("anchored", "independent"):
            found[f"{name}, long"] = Arm(causal, params[name], ddim, plan, sampled=sliding, known=longer)
        found["in chunks, long"] = Arm(together, params["synchronous"], ddim, by_chunk, sampled=going_on)
        found["kept keys"] = Arm(causal, params["anchored"], ddim, grid, sampled=keeping, known=nothing)
        return found

    return arms


def slid(window, starts, key, denoiser, params, solver, plan, *, x_init, cond):
    """More frames than the network sees, along a staircase."""
    return streaming.sample_windowed(key, denoiser, params, solver, plan, window, x_init=x_init, starts=starts)


def in_chunks(chunks, overlap, key, denoiser, params, solver, grid, *, shape, cond):
    """All frames of a chunk together; the last ones of the chunk before stand in place of the first, noised."""
    options = {"shape": shape, "chunks": chunks, "overlap": overlap, "replaced": True}
    return streaming.sample_chained(key, denoiser, params, solver, grid, **options)


def kept_keys(incremental, key, denoiser, params, solver, grid, *, x_init, cond):
    """The staircase of full width, frame by frame from the kept keys of what is clean."""
    process = denoiser.process
    return streaming.sample_autoregressive(key, incremental, process, params, solver, grid, x_init=x_init)


def clip_measures(space: Any, real: Any) -> Callable[[Drawn], Mapping[str, float]]:
    """Distances to what the latent space makes of true clips, which tell of the diffusion model alone, and of long
    clips by which share size and speed have changed at the end."""

    def measure(drawn):
        clips = np.asarray(space.decode(drawn.x[:, : real.shape[1]]))
        found = metrics.clip_distances(clips, real[:, : clips.shape[1]])
        if clips.shape[1] < real.shape[1]:
            return found
        changed = data.moving.drift(data.moving.read(clips))
        return found | {name: float(values[-1]) for name, values in changed.items()}

    return measure


def quality_rows(config: ConfigDict, found: Tabulated) -> list[Row]:
    """The claims about trained models, one value a seed of training."""
    s, steps, long = config.width, config.steps, config.frames
    figures = {
        "frames": "Fréchet distance of frames",
        "motion": "Fréchet distance of motion",
        "size": "relative change of size",
    }
    ours, far = f"anchored, s = {s}", "anchored, long"
    compared = [
        ("anchored beats independent", "motion", ours, "independent", "FVD-16 66 against 202 (Taichi)"),
        ("anchored beats independent", "frames", ours, "independent", "FVD-16 66 against 202 (Taichi)"),
        ("anchored beats synchronous, equal calls", "motion", ours, "synchronous", "FVD-16 66 against 160 (Taichi)"),
        ("anchored beats synchronous, equal calls", "frames", ours, "synchronous", "FVD-16 66 against 160 (Taichi)"),
        (f"s = {s} beats s = 0 at equal calls", "motion", ours, "all at once", "a minimum between expected"),
        (f"s = {s} beats s = {steps}", "motion", ours, f"anchored, s = {steps}", "a minimum between expected"),
        (f"{long} frames: better than chunk by chunk", "frames", far, "in chunks, long", "expected"),
        (f"{long} frames: better than chunk by chunk", "motion", far, "in chunks, long", "expected"),
        (f"{long} frames: drifts less than chunk by chunk", "size", far, "in chunks, long", "expected"),
        (f"{long} frames: better than independent", "frames", far, "independent, long", "FVD-128 376 against 738"),
        (f"{long} frames: better than independent", "motion", far, "independent, long", "FVD-128 376 against 738"),
    ]
    return [
        found.row(f"{title}: {figure}", figure, a, b, "lower", published, figure=figures[figure])
        for title, figure, a, b, published in compared
        if b in found.figures and figure in found[a]
    ]


def kept_rows(found: Tabulated) -> list[Row]:
    """What decoding from kept keys costs against the staircase of full width, which makes the same clips."""
    widest = max((name for name in found.figures if "s = " in name), key=lambda name: int(name.rpartition(" ")[2]))
    title, figure = "kept keys save what is finished", "seconds for all clips"
    return [found.row(title, "seconds", "kept keys", widest, "lower", "exact, no figure", figure=figure)]


def oracle_rows(oracle: ConfigDict) -> list[Row]:
    """The bias of a causal denoiser that is otherwise exact, as computed for the paper's card."""
    return [
        Row(f"bias of causality at s = {width} of {oracle.steps}", "largest error of a covariance, Gaussian clip",
            causal_error(oracle.steps, width), error, "equal", f"{error} (computed)", margin=0.02)
        for width, error in zip(oracle.widths, oracle.errors, strict=True)
    ]  # fmt: skip


def causal_error(steps: int, width: int, frames: int = 6) -> float:
    """The largest error of the covariance that the causal oracle of a Gaussian AR(1) clip makes along a staircase."""
    clip, oracle = denoisers.gaussian_clip(frames), denoisers.analytic(processes.rectified_flow(), causal=True)
    plan = timesteps.staircase(timesteps.linspace(steps), frames, width)
    made = jax.jit(lambda plan: metrics.run_covariance(oracle, clip, solvers.ddim(), plan, (frames, 1)))(plan)
    return float(jnp.abs(made - clip.covariances[0]).max())


def draw_long(s: Study, found: Tabulated, space: Any, real: Any) -> dict[Any, str]:
    """Two clips of every way to make long ones."""
    long = {name: x[:2, : real.shape[1]] for name, x in found.samples.items() if name.endswith("long")}
    strips = {name: np.asarray(space.decode(x)) for name, x in long.items()}
    pictures.save_strips(s.picture("strips"), {"true clips": real[:2], **strips}, title="Long clips", along="time")
    told = "An object should keep its look and move steadily to the end; continued in chunks it changes or fades."
    return {s.picture("strips"): f"Clips three times as long as those of training, two a row. {told}"}


def draw_widths(s: Study, found: Tabulated, frames: int) -> dict[Any, str]:
    """Quality over the width of the staircase."""
    widths = list(s.config.widths)
    swept = [found[f"anchored, s = {width}"] for width in widths]
    curves = {kind: (widths, [float(np.mean(one[kind])) for one in swept]) for kind in ("frames", "motion")}
    label = f"width s of the staircase ({s.config.steps} + {frames - 1} s calls)"
    title = "Quality by the width of the staircase"
    pictures.save_curves(s.picture("widths"), curves, x_label=label, y_label="Fréchet distance", title=title)
    told = "Fréchet distances of 8 frames over the width of the staircase: s = 0 makes all frames together, s = S one "
    return {s.picture("widths"): f"{told}after the other; the best lies between."}
