"""VideoScene (Wang et al. 2025): a clip along the path of a camera from two views of a scene, in one evaluation.

A reconstruction in 3-D from the two views is rendered along the path; the student begins with that clip, noised to a
time that a policy chooses for it. Arms: the rendering alone, one step from it and from noise, the teacher in fifty.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, objectives, pictures, rendering
from diffusion_jax.config import build
from diffusion_jax.data.splat_scenes import Filmed
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.parts.gaussian_bandit import bandit
from diffusion_jax.recipes.study import Results, Study
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import ddim
from diffusion_jax.stages import Stage
from diffusion_jax.timesteps import noised_start

contradiction = jax.jit(rendering.reprojection_error)

VARIED = "training of the students and noise; reconstructor and teacher are trained once"


def reconstruction(config: ConfigDict) -> Experiment:
    """The training of the reconstructor by what its Gaussians look like."""
    network, first = build(config.reconstructor), build(config.data).take([0])
    cameras = rendering.Camera(**{name: leaf[:, [0, -1]] for name, leaf in first["cond"].items()})

    def begin(key):
        return network.init(key, first["x0"][:, [0, -1]], cameras)

    return prepare(config, network=network, objective=build(config.objective, reconstructor=network), begin=begin)


def rendered_clips(config: ConfigDict, reconstructor: Stage) -> dict[str, Any]:
    """The coarse clips of the scenes of training and of the test."""
    draw = jax.jit(partial(objectives.coarse_clips, reconstructor.trained.network))

    def of(source):
        parts = [source.take(range(i, min(i + config.batch, len(source)))) for i in range(0, len(source), config.batch)]
        cameras = [rendering.Camera(**part["cond"]) for part in parts]
        drawn = [draw(reconstructor.value, part["x0"], at) for part, at in zip(parts, cameras)]
        return np.concatenate(jax.device_get(drawn))

    return {"train": of(build(config.data)), "test": of(build(config.held_out))}


class Clips(NamedTuple):
    """Latents of true and of coarse clips, the condition of the network, and what was filmed."""

    x0: Any
    base: Any
    cond: dict[str, Any]
    filmed: Filmed


def test_clips(s: Study, rendered: Stage) -> Clips:
    """The test set: both ends of each clip are given."""
    config = s.config.teacher
    space, source = latents(config).space, build(s.config.rendered.held_out)
    filmed = source.filmed(range(len(source)))
    x0 = space.encode(filmed.clip.colour)
    concat = np.concatenate([objectives.end_frames(x0), camera_channels(filmed.cameras)], axis=-1)
    return Clips(np.asarray(x0), np.asarray(space.encode(rendered.value["test"])), {"concat": concat}, filmed)


def latents(config: ConfigDict) -> data.PrincipalLatents:
    return data.principal_latents(build(config.data), config.components, first=config.data.length)


def camera_channels(cameras: Any) -> np.ndarray:
    """`[B, F, 1, 1, 12]`: where each camera is, as the first of its clip sees it."""
    return np.asarray(rendering.camera_numbers(rendering.Camera(*cameras)))[:, :, None, None]


def clip_training(config: ConfigDict, *parents: Stage) -> Experiment:
    """The training of the teacher, or with it as the first parent of a student: on its states, or on those of the clips
    that the second parent rendered."""
    whole = latents(config)
    cond = {"concat": camera_channels([whole.cond[name] for name in rendering.Camera._fields])}
    network, process, beside, extra = build(config.model), build(config.process), {}, {}
    told = {"network": network, "process": process}
    if parents:
        base = whole.x0 if len(parents) < 2 else np.asarray(whole.space.encode(parents[1].value["train"]))
        beside, extra = {"base": base}, {"student": parents[0].value}  # pyright: ignore
        told |= {"teacher": denoisers.denoiser(network, process), "teacher_params": parents[0].value}  # pyright: ignore
    inner = build(config.objective, **told)
    if "policy" in config:
        policy, times = build(config.policy), np.asarray(config.times, np.float32)
        chosen = objectives.time_policy(policy, times, objectives.leap_reward(network, process), **config.choosing)
        inner = objectives.with_time_policy(inner, chosen, config.until)
    source = data.ArraySource(whole.x0, cond, "clips", beside=beside)
    example = source.take(np.arange(2))

    def begin(key):
        ends = objectives.end_frames(example["x0"])
        told = {"concat": jnp.concatenate([ends, example["cond"]["concat"]], axis=-1)}
        if not extra:
            return network.init(key, example["x0"], jnp.zeros(2), told)
        return {**extra, "policy": policy.init(key, example["base"])} if "policy" in config else extra["student"]

    objective = objectives.conditioned_on_ends(inner)
    return prepare(config, source=source, network=network, process=process, objective=objective, begin=begin)


def study(s: Study) -> Results:
    config = s.config
    first = s.stage("reconstructor", config.reconstruction, prepare=reconstruction)
    rendered = s.stage("rendered clips", config.rendered, first, make=rendered_clips)
    teacher = s.stage("teacher", config.teacher, prepare=clip_training)
    clips, space = test_clips(s, rendered), latents(config.teacher).space
    found: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, Any] = {}
    some = jax.tree.map(lambda leaf: leaf[: config.fit_scenes], clips.filmed)
    for seed in s.seeds:
        leap = s.stage("leap", config.leap, teacher, rendered, seed=seed, prepare=clip_training).value
        plain = s.stage("from noise", config.plain, teacher, seed=seed, prepare=clip_training).value
        answers = leaps(config, teacher, jax.random.key(seed), clips, leap, plain)
        for name, x in answers.items():
            pixels = np.asarray(space.decode(x))
            figures = measured(x, pixels, clips)
            if config.fit_scenes and name in ("leap", "render"):
                start = first.trained.network.apply(first.value, *views_of(some, [0, -1]))
                figures["psnr"] = float(fitted(start, pixels[: config.fit_scenes], some, config.fit_steps))
            for measure, value in figures.items():
                found.setdefault(name, {}).setdefault(measure, []).append(value)
        shown = shown or {name: answers[name] for name in ("render", "leap", "noise", "teacher")}
    rows = clip_rows(found, config.leap.times) + (bandit_rows(config.bandit, s.seeds) if config.bandit else [])
    return Results(rows, drawn(s, space, clips, shown, found), VARIED)


def leaps(config: Any, teacher: Stage, key: Any, clips: Clips, leap: Any, plain: Any) -> dict[str, np.ndarray]:
    """Latents by arm; the student also at each time that the policy could have chosen for all."""
    process, base = teacher.trained.process, jnp.asarray(clips.base)
    denoiser = denoisers.denoiser(teacher.trained.network, process)

    @partial(jax.jit, static_argnames="steps")
    def run(params, t, steps=1):
        grid = objectives.leap_grid(t, steps)
        begin = noised_start(key, process, grid, base)
        return sample(key, denoiser, params, ddim(), grid, x_init=begin, cond=clips.cond).x

    def at(t):
        return np.full(len(base), t, np.float32)

    student, times = leap["student"], np.asarray(config.leap.times, np.float32)
    chosen = objectives.chosen_times(build(config.leap.policy), leap["policy"], times, base)
    answers = {"true": clips.x0, "render": clips.base, "leap": run(student, chosen), "noise": run(plain, at(1.0))}
    answers |= {"clean states": run(plain, chosen), "teacher": run(teacher.value, chosen, config.steps)}
    answers |= {f"at {t:g}": run(student, at(t)) for t in config.leap.times}
    return jax.device_get(answers)


def views_of(filmed: Filmed, which: Any) -> tuple[Any, Any]:
    return filmed.clip.colour[:, which], jax.tree.map(lambda leaf: leaf[:, which], filmed.cameras)


@partial(jax.jit, static_argnames="steps")
def fitted(start: Any, pixels: Any, filmed: Filmed, steps: int) -> Any:
    """Mean PSNR of true frames with odd numbers, as shown by Gaussians fitted to the even ones of `pixels`."""
    even, odd = (views_of(filmed, slice(k, None, 2)) for k in (0, 1))
    splats, _ = rendering.fit_splats(start, pixels[:, ::2], even[1], steps)
    return jnp.mean(rendering.view_psnr(splats, *odd))


def measured(x: np.ndarray, pixels: np.ndarray, clips: Clips) -> dict[str, float]:
    """The error of latents, the distance of the two sets (of the same scenes, so biased is less noisy), and how much
    frames contradict each other in space."""
    flat, real = (np.asarray(one).reshape(len(x), -1) for one in (x, clips.x0))
    clip = clips.filmed.clip
    error = contradiction(pixels, clip.depth, clip.opacity, clips.filmed.cameras)
    distance = metrics.mmd2(flat, real, bandwidth=float(np.sqrt(real.shape[1])), unbiased=False)
    return {"error": float(np.square(x - clips.x0).mean()), "mmd": distance, "geometry": float(np.mean(error))}


def clip_rows(found: dict[str, dict[str, list[float]]], times: Any) -> list[Row]:
    def row(title, measure, against, published, figure, direction="lower", **bound):
        other = found[against][measure] if isinstance(against, str) else against
        return Row(title, figure, found["leap"][measure], other, direction, published, **bound)

    error, sets = "mean square error of latents", "squared MMD to true clips"
    best = list(np.min([found[f"at {t:g}"]["error"] for t in times], axis=0))
    rows = [
        row("one step repairs the rendering", "error", "render", "FVD 98 against 171", error, factor=0.8),
        row("and starts better than from noise", "error", "noise", "FVD 98 against 543", error, factor=0.5),
        row("clips are distributed as true ones, not as renderings", "mmd", "render", "FVD 98 against 171", sets),
        row("nor as one step from noise", "mmd", "noise", "FVD 98 against 543", sets),
        row("as good as the teacher in fifty steps from there", "error", "teacher", "FVD 103 against 99", error,
            factor=1.15),
        row("frames agree in space, better than from noise", "geometry", "noise", "not compared",
            "squared difference of a point between frames"),
        row("states of renderings teach it, not those of true clips", "error", "clean states", "FVD 98 against 543",
            error),
        row("the policy beats every single time", "error", best, "FVD 98 against 106", error),
    ]  # fmt: skip
    if "psnr" in found["leap"]:
        figure = "PSNR of frames that were not fitted, dB; against the rendering's"
        rows.append(row("Gaussians of its frames show other views better", "psnr", "render", "none", figure, "higher"))
    return rows


def bandit_rows(config: Any, seeds: Any) -> list[Row]:
    """Coarse samples of two qualities, of exact Gaussians, for which the best times are known."""
    learn = jax.jit(partial(bandit, config.to_dict()))
    found = [jax.device_get(learn(jax.random.key(seed))) for seed in seeds]
    columns = [[float(one[i]) for one in found] for i in range(3)]
    figure, published = "share of the policy on the best time", "by theory"
    return [
        Row("a good prior is kept: no noise", figure, columns[0], 0.8, "higher", published),
        Row("a poor one is noised as much as is best", figure, columns[1], 0.8, "higher", published),
        Row("a time for each beats the best one for all", "share of the gap to the best times", columns[2], 0.5,
            "higher", published),
    ]  # fmt: skip


def drawn(s: Study, space: Any, clips: Clips, shown: Any, found: Any) -> dict[Any, str]:
    strips = {"true": clips.filmed.clip.colour[:2]}
    strips |= {name: np.asarray(space.decode(x[:2])) for name, x in shown.items()}
    pictures.save_strips(s.picture("clips"), strips, title="Two scenes of the test set", along="time")
    times = s.config.leap.times
    named = {"student": [f"at {t:g}" for t in times], "rendering": ["render"] * len(times)}
    curves = {name: (times, [float(np.mean(found[one]["error"])) for one in of]) for name, of in named.items()}
    title = "One step from a rendering that was noised to t"
    pictures.save_curves(s.picture("times"), curves, x_label="t", y_label="error of latents", title=title, log=False)
    return {
        s.picture("clips"): "Between two given views: the rendering is blurred, and one step from noise loses objects.",
        s.picture("times"): "The error of the student by the time to which the rendering is noised.",
    }
