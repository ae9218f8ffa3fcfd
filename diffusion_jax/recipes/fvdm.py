"""FVDM (Liu et al. 2024): every frame of a clip has a time of its own, so a task is a choice of times.

A frame that stands at 0 is given, a frame that runs from 1 to 0 is made. One network does what otherwise has networks
and tricks of its own: generation, image to video, the frames between two, what is around any frame, longer clips.
It is trained with a time for each frame in the share p of the examples and with one time for all in the rest. The arms
are p = 0, the ordinary video model, also conditioned by replacement as is usual for it, p = 0.2 as published, and 1.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from diffusion_jax import baselines, data, denoisers, metrics, pictures, solvers, streaming, timesteps
from diffusion_jax.config import build, call
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.models import LatentSpace
from diffusion_jax.recipes.frame import seeds, trained_arms
from diffusion_jax.recipes.report import Claim, Results, claim
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Grid, Keys, Params

TASKS = {
    "generation": (),
    "image to video": (0,),
    "start and end": (0, -1),
    "any frame": (4,),
    "extension": (0, 1, 2, 3),
}
"""The frames that are given in each task, of 8."""

MIDDLE = [3, 4]
"""The frames half-way between the first and the last."""


SHORT = "components of whole frames hardly tell shapes apart, and minutes of training leave most of them discs"
BRIEF = "minutes of training on one core are too few"

NOTES = (
    "width, batch, learning rate and the distribution of times were chosen on training seed 0 and the held-out "
    "clips that are reported; seeds 1 and 2 were not looked at."
)


def arm(share: float, steps: int, **sizes: Any) -> ConfigDict:
    """The experiment of p = `share`: in so many examples every frame has its own time, in the others all have one."""
    one = call("timesteps.logit_normal", mean=0.5, std=1.2)
    first, second = call("timesteps.independent", draw=one), call("timesteps.shared", draw=one)
    draw = call("timesteps.mixture", first=first, second=second, probability=share)
    return baselines.clip_transformer(steps, draw, **sizes)


class ClipSampler(NamedTuple):
    """How latent clips are made. draw: `(params, key, plan, known) -> clips`, one program for all tasks and networks.

    replaced: `(params, key, known, given) -> clips`, all frames are made, those `given` replaced at each step.
    chained: `(params, key, known, chunks) -> clips`, clips that go on after the first half of known, half a clip
        a chunk, each from the half before it.
    traces: an entry for each time that `draw` was compiled.
    """

    draw: Callable[..., Any]
    replaced: Callable[..., Any]
    chained: Callable[..., Any]
    traces: list


def plan(grid: Grid, task: str) -> Any:
    """The times of a task."""
    return timesteps.frames(grid, 8, TASKS[task])


def clip_sampler(experiment: Experiment) -> ClipSampler:
    """How clips are drawn from networks like that of `experiment`, along its grid."""
    grid, solver = build(experiment.config.sampling.grid), build(experiment.config.sampling.solver)
    denoiser, traces = denoisers.denoiser(experiment.network, experiment.process), []

    @jax.jit
    def drawn(params, key, plan, known):
        traces.append(plan.shape)
        start = timesteps.noised_start(key, denoiser.process, plan, known)
        return sample(key, denoiser, params, solver, plan, x_init=start).x

    @jax.jit
    def inpainted(params, key, known, mask):
        replacing = solvers.inpainted(solver, known, mask)
        return sample(key, denoiser, params, replacing, plan(grid, "generation"), shape=known.shape).x

    def draw(params, key, times, known):
        return jax.device_get(drawn(params, key, times, known))

    def replaced(params, key, known, given):
        mask = np.zeros(known.shape[:2], bool)
        mask[:, list(given)] = True
        return jax.device_get(inpainted(params, key, known, mask))

    def chained(params, key, known, chunks):
        return streaming.sample_chained(
            key, denoiser, params, solver, grid, shape=known.shape, chunks=chunks, overlap=4, context=known[:, :4]
        ).x

    return ClipSampler(draw, replaced, jax.jit(chained, static_argnums=3), traces)


def measure_clips(
    networks: Mapping[str, Any], key: Keys, made: ClipSampler, grid: Grid, space: LatentSpace, true: Any, chunks: int
) -> dict:
    """Everything that is measured of the networks with the noise of one key, on the `true` clips.

    chunks: of long clips, 0 for none.
    Distances are to what the latent space makes of true clips: they tell of the diffusion model alone.
    """
    found, known = {}, space.encode(true)
    real = np.asarray(space.decode(known))

    def shown(latents):
        return np.asarray(space.decode(latents))

    def conditioned(name, clips):
        read = data.moving.verify(clips, reference=true, where=np.arange(8) > 0)
        found.update({f"{kind}: {name}": read[kind] for kind in ("colour", "identity")})
        found[f"motion: {name}"] = read["next_position_error"]

    for name, params in networks.items():
        clips = shown(made.draw(params, key, plan(grid, "generation"), known))
        for kind, distance in metrics.clip_distances(clips, real).items():
            found[f"{kind}: {name}"] = distance
        conditioned(name, shown(made.draw(params, key, plan(grid, "image to video"), known)))
    conditioned("replacement", shown(made.replaced(networks["synchronous"], key, known, TASKS["image to video"])))

    between = shown(made.draw(networks["mixed"], key, plan(grid, "start and end"), known))
    found["middle: mixed"] = float(np.square(between - real)[:, MIDDLE].mean())
    found["middle: blended"] = float(np.square(blended(real) - real)[:, MIDDLE].mean())
    for name in ("synchronous", "mixed") if chunks else ():
        long = shown(made.chained(networks[name], key, known, chunks))
        found[f"long: {name}"] = data.moving.verify(long[:, -8:], reference=true, where=True)["colour"]
    return found


def blended(clips: Array | np.ndarray) -> np.ndarray:
    """The first frame turning into the last linearly."""
    share = np.linspace(0.0, 1.0, clips.shape[1], dtype=np.float32)[:, None, None, None]
    return (1 - share) * clips[:, :1] + share * clips[:, -1:]


def exactness(
    params: Params, key: Keys, made: ClipSampler, grid: Grid, known: Any, scalar: bool = True
) -> dict[str, float]:
    """The largest deviation of given frames from what was given, and of equal times from one time for all (scalar)."""
    known = np.asarray(known)
    moved = [
        np.abs(made.draw(params, key, plan(grid, task), known) - known)[:, list(given)].max()
        for task, given in TASKS.items()
        if given
    ]
    together = made.draw(params, key, plan(grid, "generation"), known)
    found = {"given": float(max(moved)), "programs": float(len(made.traces))}
    if scalar:
        found["scalar"] = float(np.abs(made.draw(params, key, grid, known) - together).max())
    return found


def run(config: ConfigDict, workdir: Path) -> Results:
    mixed = prepare(config.arms.mixed)
    space = mixed.source.space
    made, grid = clip_sampler(mixed), jnp.asarray(build(config.arms.mixed.sampling.grid))
    true, rows = mixed.held_out.take(range(config.count))["x0"], []
    for seed in seeds(config):
        arms = {name: prepare(ConfigDict({**arm.to_dict(), "seed": seed})) for name, arm in config.arms.items()}
        key, networks = jax.random.key(seed), trained_arms(arms, "fvdm-{arm}")
        rows.append(measure_clips(networks, key, made, grid, space, true, config.chunks))
        if seed == config.seed:
            equal = exactness(networks["mixed"], key, made, grid, space.encode(true), config.scalar)
            shown = true[: config.shown]
            draw_tasks(workdir / "tasks.png", networks, key, made, grid, space=space, true=shown, chunks=config.chunks)
    found = {name: [row[name] for row in rows] for name in rows[0]}
    return Results(claims(found, equal), [workdir / "tasks.png"], NOTES)


def claims(found: Mapping[str, list[float]], equal: Mapping[str, float]) -> list[Claim]:
    """What the paper says, against what was found with each seed of training and sampling."""

    def compared(name, metric, baseline, ours, direction, published, **options):
        return claim(name, metric, found[baseline], found[ours], direction, published, **options)

    same, both = "frames in the given colour, image to video", "frames with the given shape and colour, image to video"
    far = "Fréchet distance of frames"
    replaced = "no extra network or trick is needed"
    claims = [
        compared(
            "Generation is kept", f"{far}, p = 0.2 against p = 0, at most 10% above",
            "frames: synchronous", "frames: mixed", "lower", "FVD of Latte's order", factor=1.1, reason=BRIEF,
        ),
        compared(
            "Independent times alone are not enough", f"{far}, p = 0.2 against p = 1",
            "frames: independent", "frames: mixed", "lower", "p = 0.2 chosen of eight", reason=BRIEF,
        ),
        compared(
            "Frames need times of their own", f"{same}, p = 0.2 against p = 0, 50 points above",
            "colour: synchronous", "colour: mixed", "higher", "p = 0 cannot condition", margin=0.5, reason=BRIEF,
        ),
        claim(
            "One model does image to video", f"{same}, p = 0.2 against 90%",
            0.9, found["colour: mixed"], "higher", "zero-shot image to video", reason=BRIEF,
        ),
        claim(
            "Shape is kept as well", f"{both}, p = 0.2 against 90%",
            0.9, found["identity: mixed"], "higher", "zero-shot image to video", reason=SHORT,
        ),
        compared(
            "Better than replacing the frame at each step", f"{same}, p = 0.2 against replacement with p = 0",
            "colour: replacement", "colour: mixed", "higher", replaced, reason=BRIEF,
        ),
        compared(
            "The object moves as the law says", "error of the next place in pixels, p = 0.2 against replacement",
            "motion: replacement", "motion: mixed", "lower", replaced, reason=BRIEF,
        ),
        compared(
            "Frames between two frames", "mean square error of the middle frames, at most half of blending the ends",
            "middle: blended", "middle: mixed", "lower", "zero-shot interpolation", factor=0.5, reason=BRIEF,
        ),
    ]  # fmt: skip
    if "long: mixed" in found:
        long = "frames 24 to 31 in the given colour, against p = 0", "long: synchronous", "long: mixed", "higher"
        published = "long video from the last frames"
        claims.append(compared("Clips four times as long", *long, published, reason=BRIEF))
    exactly = {
        "given": ("Given frames return bit for bit", "largest deviation, 4 tasks", 0.0, "exact"),
        "scalar": ("Equal times are one time", "largest deviation of clips", 0.0, "exact"),
        "programs": ("Tasks are data", "programs for 5 tasks and 3 networks", 1.0, "paths"),
    }
    for name, (told, metric, baseline, published) in exactly.items():
        if name in equal:
            claims.append(claim(told, metric, baseline, equal[name], "equal", published))
    return claims


def draw_tasks(
    path: Path, networks: Any, key: Keys, made: ClipSampler, grid: Grid, *, space: LatentSpace, true: Any, chunks: int
) -> None:
    """A strip of each task, and what is compared with it; the given frames are those of the first strip."""
    ours, other, known = networks["mixed"], networks["synchronous"], space.encode(true)
    strips = {f"p = 0.2: {task}": made.draw(ours, key, plan(grid, task), known) for task in TASKS}
    strips["p = 0: image to video"] = made.draw(other, key, plan(grid, "image to video"), known)
    strips["p = 0: replacement"] = made.replaced(other, key, known, TASKS["image to video"])
    if chunks:
        strips["p = 0.2: every 4th of 32"] = np.asarray(made.chained(ours, key, known, chunks))[:, ::4][:, :8]
    shown = {name: np.asarray(space.decode(latents)) for name, latents in {"true clip": known, **strips}.items()}
    shown["blended ends"] = blended(shown["true clip"])
    pictures.save_strips(path, shown, zoom=2)
