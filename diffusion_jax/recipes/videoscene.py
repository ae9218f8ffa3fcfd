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

from diffusion_jax import data, denoisers, objectives, rendering
from diffusion_jax.config import build
from diffusion_jax.data.splat_scenes import Filmed
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Study
from diffusion_jax.stages import Stage

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
    cameras = rendering.Camera(*map(jnp.asarray, cameras))
    origin = jax.tree.map(lambda leaf: leaf[:, :1], cameras)
    return np.asarray(rendering.camera_numbers(cameras, origin))[:, :, None, None]


def clip_training(config: ConfigDict, *parents: Stage) -> Experiment:
    """The training of the teacher, or with it as the first parent of a student: on its states, or on those of the clips
    that the second parent rendered."""
    whole = latents(config)
    cond = {"concat": camera_channels([whole.cond[name] for name in rendering.Camera._fields])}
    network, process, beside, extra = build(config.model), build(config.process), {}, {}
    told = {"network": network, "process": process}
    if parents:
        base = whole.x0 if len(parents) < 2 else np.asarray(whole.space.encode(parents[1].value["train"]))
        beside, extra = {"base": base}, {"student": parents[0].value}
        told |= {"teacher": denoisers.denoiser(network, process), "teacher_params": parents[0].value}
    inner = build(config.objective, **told)
    if "policy" in config:
        policy, times = build(config.policy), np.asarray(config.times, np.float32)
        reward = objectives.leap_reward(network, process)
        inner = objectives.with_time_policy(inner, policy, times, reward, **config.choosing)
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
    found: dict[str, list[dict[str, float]]] = {}
    shown, curves = {}, []
    for seed in s.seeds:
        leap = s.stage("leap", config.leap, teacher, rendered, seed=seed, prepare=clip_training).value
        plain = s.stage("from noise", config.plain, teacher, seed=seed, prepare=clip_training).value
        answers, curve = leaps(config, teacher.trained, seed, clips, teacher.value, leap, plain)
        curves.append(curve)
        for name, x in answers.items():
            figures = measured(x, np.asarray(space.decode(x)), clips)
            found.setdefault(name, []).append(figures)
        shown = shown or answers
    views = [held_out_views(config.fit, first, clips, space, shown, name) for name in ("leap", "render")]
    bandit = [run_bandit(config.bandit, seed) for seed in s.seeds]
    rows = [*clip_rows(found), *bandit_rows(bandit), *time_rows(config, found, curves)]
    if config.fit.scenes:
        title, figure = "Gaussians of held-out views: better than the rendering's", "PSNR of frames not fitted to, dB"
        rows.append(Row(title, figure, views[0], views[1], "higher", "not compared"))
    return Results(rows, drawn(s, space, clips, shown, curves), VARIED)


def leaps(config: Any, experiment: Experiment, seed: int, clips: Clips, teacher: Any, leap: Any, plain: Any) -> Any:
    """Latents by arm, and the mean square error of the student at each time that the policy could choose."""
    key, count, process = jax.random.key(seed), len(clips.x0), experiment.process
    denoiser = denoisers.denoiser(experiment.network, process)

    @partial(jax.jit, static_argnames="steps")
    def run(params, t, steps=1):
        grid = objectives.leap_grid(t, steps)
        begin = timesteps.noised_start(key, process, grid, jnp.asarray(clips.base))
        return sample(key, denoiser, params, solvers.ddim(), grid, x_init=begin, cond=clips.cond).x

    def at(t):
        return np.full(count, t, np.float32)

    student, policy = leap["student"], build(config.leap.policy)
    chosen = np.asarray(objectives.chosen_times(policy, leap["policy"], config.leap.times, clips.base))
    answers = {"render": clips.base, "leap": run(student, chosen), "noise": run(plain, at(1.0))}
    answers |= {"clean states": run(plain, chosen), "teacher": run(teacher, chosen, config.steps)}
    answers |= {"teacher, one step": run(teacher, chosen), "latest": run(student, at(max(config.leap.times)))}
    curve = {t: float(np.square(run(student, at(t)) - clips.x0).mean()) for t in config.leap.times}
    return {name: np.asarray(x) for name, x in answers.items()}, {**curve, "chosen": chosen}


def measured(x: np.ndarray, pixels: np.ndarray, clips: Clips) -> dict[str, float]:
    """The error of latents, the distance of the two sets, and how much frames contradict each other in space."""
    flat, real = (np.asarray(one).reshape(len(x), -1) for one in (x, clips.x0))
    clip = clips.filmed.clip
    error = rendering.reprojection_error(pixels, clip.depth, clip.opacity, clips.filmed.cameras)
    distance = metrics.mmd2(flat, real, bandwidth=float(np.sqrt(real.shape[1])))
    return {"error": float(np.square(x - clips.x0).mean()), "mmd": distance, "geometry": float(np.mean(error))}
