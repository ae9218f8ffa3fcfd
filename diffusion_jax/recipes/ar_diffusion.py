"""AR-Diffusion: clips in which earlier frames are never noisier than later ones, in training as in sampling.

A causal network is trained on times that never fall along the frames, `t_1 <= t_2 <= ... <= t_F`, anchored at a random
frame and level (FoPP). It samples along a staircase: each frame runs s steps behind the one before it,

    n_i(r) = clip(r - s i, 0, S),        S + (F - 1) s evaluations                                                 (1)

from all together (s = 0) to one after the other (s = S), and so on for as many frames as one likes. A causal network
cannot look ahead, so frames that are no longer noise are missed where s is small: s buys fidelity. Measured against the
same network trained with one time a clip and with independent times, and against continuing chunk by chunk (Sun et al.
2025).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax import data, denoisers, metrics, models, pictures, processes, solvers, timesteps
from diffusion_jax.config import ConfigDict, build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.frame import seeds, trained_arms
from diffusion_jax.recipes.parts.latents import principal_space
from diffusion_jax.recipes.report import Claim, Results, claim
from diffusion_jax.sampling import Samples
from diffusion_jax.streaming import sample_autoregressive, sample_chained, sample_windowed
from diffusion_jax.typing import Grid, Keys, Params

INDEPENDENT = (
    "FVD-16 1.5 to 6 times lower (Taichi-HD 66 against 202)",
    "single frames are learned as well from independent times at this size; what the order helps is how they follow",
)
SYNCHRONOUS = (
    "FVD-16 66 against 160 of Latte (Taichi-HD)",
    "800 updates are shared out among many patterns of times, and a single pattern learns its own faster",
)
TOGETHER = ("a minimum at intermediate s is expected", "a frame's neighbours say little in these short clips")
ALONE = (
    "a minimum at intermediate s is expected",
    "8 frames are too short for a causal model to suffer from its own past: s = S costs calls and nothing else",
)
CHUNKS = ("expected; no figure", "half a chunk of context at each level is enough for so slow a world")
LONGER = (
    "FVD-128 376 against 738 (Taichi-HD)",
    "after independent times, in which the past is as noisy as the present, a frame relies on it less: objects change "
    "more from frame to frame, but fade less often over a long run",
)
"""Of each comparison what is published, and why it may fail at this size."""


def staircase_bias(steps: int, widths: tuple[int, ...], frames: int = 6) -> dict[int, tuple[float, float]]:
    """The largest error of a covariance when exact denoisers sample a Gaussian AR(1) clip along staircases.

    For each width, that of the denoiser that sees all frames, and that of the causal one.
    """
    process, clip = processes.rectified_flow(), denoisers.gaussian_clip(frames)

    @partial(jax.jit, static_argnames="causal")
    def error(plan, causal):
        oracle = denoisers.analytic(process, causal)
        return jnp.abs(
            metrics.run_covariance(oracle, clip, solvers.ddim(), plan, (frames, 1)) - clip.covariances[0]
        ).max()

    def padded(width):
        """One program for all widths: at the end nothing moves any more."""
        plan = timesteps.staircase(timesteps.linspace(steps), frames, width)
        return np.pad(plan, [(0, steps * frames + 1 - len(plan)), (0, 0), (0, 0)], mode="edge")

    plans = {width: padded(width) for width in widths}
    return {width: (float(error(plan, False)), float(error(plan, True))) for width, plan in plans.items()}


class Ways(NamedTuple):
    """The ways to sample clips, compiled, each a function of `(params, key, ...)`.

    staircase: (params, key, frames, width) -> Samples, through a window of the frames of training.
    continued: (params, key, chunks, overlap) -> Samples, all frames of a chunk together; the last frames of the chunk
        before stand in place of the first ones, at their noise level (replacement).
    autoregressive: (params, key, frames) -> Samples: the staircase of full width from kept keys.
    """

    staircase: Callable[..., Samples]
    continued: Callable[..., Samples]
    autoregressive: Callable[..., Samples]


def ways(experiment: Experiment, grid: Grid, clips: int) -> Ways:
    """How the network of `experiment` samples so many clips along `grid [S + 1]`."""
    process, solver = experiment.process, solvers.ddim()
    denoiser = denoisers.denoiser(experiment.network, process)
    window, *frame = experiment.shape

    def noise(key, frames):
        plan = timesteps.synchronous(grid, frames)
        return timesteps.noised_start(key, process, plan, jnp.zeros((clips, frames, *frame)))

    @jax.jit
    def along(params, key, plan, starts):
        x = noise(key, plan.shape[2])
        return sample_windowed(key, denoiser, params, solver, plan, window, x_init=x, starts=starts)

    def staircase(params, key, frames, width):
        plan = timesteps.staircase(grid, frames, width)
        return along(params, key, plan, timesteps.windows(plan, window))

    @partial(jax.jit, static_argnames=("chunks", "overlap"))
    def continued(params, key, chunks, overlap):
        shape = (clips, window, *frame)
        options = {"shape": shape, "chunks": chunks, "overlap": overlap, "replaced": True}
        return sample_chained(key, denoiser, params, solver, grid, **options)

    @partial(jax.jit, static_argnames="frames")
    def autoregressive(params, key, frames):
        kept = models.incremental(experiment.network, window=window - 1)
        return sample_autoregressive(key, kept, process, params, solver, grid, x_init=noise(key, frames))

    return Ways(staircase, continued, autoregressive)


def long_clip_measures(clips: Array | np.ndarray, real: Array | np.ndarray) -> dict[str, float]:
    """Distances to `real`, and by which share size and speed have changed at the end of a long clip."""
    changed = data.moving.drift(data.moving.read(clips))
    return metrics.clip_distances(clips, real) | {name: float(values[-1]) for name, values in changed.items()}


def run(config: ConfigDict, workdir: Path) -> Results:
    """Three draws of times for one causal network, over seeds of training, along staircases of all widths."""
    steps, width, long = config.steps, config.width, config.frames
    source = build(config.arms.anchored.data)
    space = principal_space(np.concatenate(source.take(range(config.coded))["x0"]), config.components)
    latents = data.encoded(source, space.encode)
    arms = {name: prepare(entry)._replace(source=latents, shape=latents.shape) for name, entry in config.arms.items()}
    way = ways(arms["anchored"], timesteps.linspace(steps), config.clips)
    short = latents.shape[0]
    chunks = 1 + -(-(long - short) // (short - config.overlap))
    # What the autoencoder makes of real clips: distances tell of the diffusion model alone.
    longest = data.moving_shapes("test", config.clips, frames=long, classes=()).take(range(config.clips))["x0"]
    real = {n: np.asarray(space.decode(space.encode(longest[:, :n]))) for n in (short, long)}
    found, strips, counted = {}, {"data": real[long][:2]}, {}

    def keep(name, latents):
        made = np.asarray(space.decode(latents[:, :long]))
        found.setdefault(name, []).append(long_clip_measures(made, real[made.shape[1]]))
        if made.shape[1] == long:
            strips.setdefault(name, made[:2])

    for seed in seeds(config):
        key, given = jax.random.key(seed), [config.components, config.coded]
        entries = {name: ConfigDict({**arm.config.to_dict(), "seed": seed}) for name, arm in arms.items()}
        seeded = {name: arm._replace(config=entries[name]) for name, arm in arms.items()}
        params = trained_arms(seeded, "ar-diffusion-{arm}", given=given)
        for name in ("anchored", "independent"):
            for s in config.widths:
                made = way.staircase(params[name], key, short, s)
                keep(f"{name} {s}", made.x)
                counted[s] = made
            keep(f"{name}, staircase", way.staircase(params[name], key, long, width).x)
        if 0 in config.widths:
            keep("synchronous 0", way.staircase(params["synchronous"], key, short, 0).x)
        if config.compared:
            keep("synchronous, in chunks", way.continued(params["synchronous"], key, chunks, config.overlap).x)

    claims = [
        *quality_claims(config, found),
        claim(
            "a staircase costs S + (F - 1) s",
            f"network calls, sum over s = {config.widths}",
            float(sum(steps + (short - 1) * s for s in config.widths)),
            sum(float(made.cost.evaluations) for made in counted.values()),
            "equal",
            "S + (F - 1) s, verified",
        ),
        *(kept_claims(way, params["anchored"], key, short, steps) if config.compared else ()),
        *oracle_claims(config.oracle),
    ]
    strips_path, curve_path = workdir / "strips.png", workdir / "widths.png"
    pictures.save_strips(strips_path, strips, zoom=2)
    curves = {
        f"{name}, {metric}": (config.widths, [mean(found, f"{name} {s}", metric) for s in config.widths])
        for name in ("anchored", "independent")
        for metric in ("frames", "motion")
    }
    label = f"width s of the staircase: S + {short - 1} s calls, S = {steps}"
    pictures.save_curves(curve_path, curves, x_label=label, y_label="Fréchet distance, 8 frames")
    return Results(claims, [strips_path, curve_path])


def kept_claims(way: Ways, params: Params, key: Keys, frames: int, steps: int) -> list[Claim]:
    """What decoding from kept keys makes and saves, against the staircase of full width."""
    last, kept = way.staircase(params, key, frames, steps), way.autoregressive(params, key, frames)
    return [
        claim(
            "s = S is autoregressive decoding from kept keys",
            "largest difference of latents, against the largest latent",
            0.0,
            float(jnp.abs(kept.x - last.x).max() / jnp.abs(last.x).max()),
            "equal",
            "exact",
            margin=1e-3,
        ),
        claim(
            "kept keys save what is finished",
            "frames that the network evaluates for a clip at s = S",
            float(last.cost.evaluations) * frames,
            float(kept.cost.evaluations),
            "lower",
            "follows from causality; no figure",
            factor=0.5,
        ),
    ]


def mean(found: dict, name: str, metric: str) -> float:
    """Over seeds."""
    return float(np.mean([row[metric] for row in found[name]]))


def quality_claims(config: ConfigDict, found: dict) -> list[Claim]:
    """The claims about trained models, one value a seed of training."""
    s, steps = config.width, config.steps
    best, chunks, long = f"anchored {s}", "synchronous, in chunks", "anchored, staircase"
    distance = {"frames": "Fréchet distance of frames", "motion": "Fréchet distance of motion"}
    change = {"size": "relative change of size", "speed": "relative change of speed"}
    rows = [
        (f"anchored times beat independent ones at s = {s}", f"independent {s}", best, distance, *INDEPENDENT),
        (f"anchored times at s = {s} beat synchronous ones", "synchronous 0", best, distance, *SYNCHRONOUS),
        (f"s = {s} beats s = 0", "anchored 0", best, distance, *TOGETHER),
        (f"s = {s} beats s = {steps}", f"anchored {steps}", best, distance, *ALONE),
        (f"{config.frames} frames: better than chunk by chunk", chunks, long, distance | change, *CHUNKS),
        (f"{config.frames} frames: better than independent", "independent, staircase", long, distance, *LONGER),
    ]

    def values(name, metric):
        return [row[metric] for row in found[name]]

    return [
        claim(name, told, values(other, metric), values(ours, metric), "lower", published, reason=reason)
        for name, other, ours, metrics, published, reason in rows
        if other in found
        for metric, told in metrics.items()
    ]


def oracle_claims(oracle: Any) -> list[Claim]:
    """What a causal network must miss along each staircase, from exact denoisers."""
    bias = staircase_bias(oracle.steps, oracle.widths)
    published = ("0.46", "0.32", "0.07", "0")
    return [
        claim(
            f"bias of causality at s = {width} of S = {oracle.steps}",
            "largest error of the covariance of a Gaussian clip; baseline: seeing all frames",
            both,
            causal,
            "equal" if width == oracle.steps else "higher",
            f"{figure} (computed)",
            margin=0.02,
            reason="so few steps that their own error hides it",
        )
        for (width, (both, causal)), figure in zip(bias.items(), published, strict=True)
    ]
