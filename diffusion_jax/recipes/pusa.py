"""Pusa (Liu et al. 2025): a model that knows one time for a whole clip learns to go on from given frames.

Nothing is added to the network: a time for each frame modulates that frame by its own level, and equal levels are the
model as it was. A low-rank adapter is trained for a few updates, on clips of the model's own, at independent times
(vectorised timestep adaptation, VTA). Measured against the model itself, other draws of training times, and the usual
way: given frames and a mask as further input channels. The label of a clip names its shape and not its colour, so what
is kept of a given frame's colour comes from the frame.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import adapters, data, denoisers, metrics, objectives, pictures, solvers, timesteps
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage

CONCAT = "mask-and-concat"
TASKS = ("label", "first", "last", "middle")
"""Which frame is given: none, the first, the last, one in between."""


def study(s: Study) -> Results:
    config, base = s.config, s.stage("base", s.config.base)
    own = s.stage("own samples", config.own, base, make=own_samples)
    factors = {
        name: {seed: s.stage(name, arm, base, own, prepare=adapted, seed=seed) for seed in s.seeds}
        for name, arm in config.arms.items()
    }
    part, space = base.trained.held_out.take(range(config.clips)), base.trained.source.space
    given = given_frames(config.clips, base.trained.shape[0])
    arms = arms_of(s, base, factors, part["cond"]["label"], np.asarray(space.encode(part["x0"])), given)
    found = table(arms, s.seeds, measures(space, part["x0"], given), shape=base.trained.shape, count=config.clips)
    changes = [kinds_of_change(base.value, factors["VTA"][seed].value) for seed in s.seeds]
    drawn = {s.picture("strips"): STRIPS, s.picture("scales"): SCALES}
    draw_strips(s, found, space, part["x0"], given)
    draw_scales(s, found)
    return Results(rows(config, found, changes), drawn, "training of the adapters and noise, of one base")


def given_frames(clips: int, frames: int) -> dict[str, np.ndarray]:
    """Which frames of each clip `[clips, frames]` are given in each task."""
    index = np.broadcast_to(np.arange(frames), (clips, frames))
    middle = 1 + np.arange(clips)[:, None] % (frames - 2)
    return dict(zip(TASKS, (index < 0, index == 0, index == frames - 1, index == middle), strict=True))


def own_samples(config: Any, base: Stage) -> Mapping[str, Any]:
    """Clips of the base itself, every label equally often: what adaptations are trained on."""
    made, number = base.trained, 256
    denoiser, grid = denoisers.denoiser(made.network, made.process), build(config["grid"])
    label = np.arange(config["count"], dtype=np.int32) % config["labels"]

    @jax.jit
    def run(key, label):
        shape = (len(label), *made.shape)
        return sample(key, denoiser, base.value, solvers.flow_euler(), grid, shape=shape, cond={"label": label}).x

    cut = [label[start : start + number] for start in range(0, len(label), number)]
    x0 = [run(jax.random.fold_in(jax.random.key(1), i), labels) for i, labels in enumerate(cut)]
    return {"x0": np.concatenate(x0), "label": label}


def adapted(config: Any, base: Stage, own: Stage) -> Experiment:
    """The training of factors beside the base, on its own samples; of its entrance too where given frames are channels
    that join it."""
    config = ConfigDict(config)
    params, cond, network = base.value, {"label": np.asarray(own.value["label"])}, build(config.model)
    x0 = np.asarray(own.value["x0"])
    if len(network.module.conditions) > 1:
        cond["concat"] = np.asarray(adapters.masked_channels(x0, np.arange(x0.shape[1])[None] == 0))
        params = adapters.with_channels(base.trained.network, params, cond["concat"].shape[-1])
    source = data.ArraySource(x0, cond, "samples of the base")
    made = objectives.adaptation(
        build(config.lora, network=network),
        params,
        lambda network: build(config.objective, network=network, process=base.trained.process),
        source.take(np.arange(2)),
    )
    return prepare(config, source=source, network=made.network, objective=made.objective, begin=made.init)


def arms_of(
    s: Study, base: Stage, factors: Mapping[str, Mapping[int, Stage]], label: Any, known: Any, given: Mapping[str, Any]
) -> Callable[[int], dict[str, Arm]]:
    """Every adaptation at every task, and VTA at other scales: tasks are arrays of one program."""
    grid, solver, process = build(s.config.grid), solvers.flow_euler(), base.trained.process
    kinds = {CONCAT: CONCAT}.get
    made = {kinds(name, ""): one[s.seeds[0]].trained.network for name, one in factors.items()}
    denoiser = {kind: denoisers.denoiser(network, process) for kind, network in made.items()}
    wider = adapters.with_channels(base.trained.network, base.value, known.shape[-1] + 1)
    cond = {"label": jnp.asarray(label)}

    def filled(key, denoiser, params, solver, plan, *, shape, cond):
        start = timesteps.noised_start(key, process, plan, known)
        return sample(key, denoiser, params, solver, plan, x_init=start, cond=cond)

    def arm(name, seed, task, scale):
        concat, frames = name == CONCAT, given[task]
        told = cond | ({"concat": adapters.masked_channels(known, frames)} if concat else {})
        # One time for all frames where given ones are channels: they come back as the model sees them.
        plan = timesteps.multiplied(grid, np.where(frames & (not concat), 0.0, 1.0))
        params = adapters.at_scale(wider if concat else base.value, factors[name][seed].value, scale)
        return Arm(denoiser[kinds(name, "")], params, solver, plan, told, sampled=filled)

    def arms(seed):
        found = {f"{name}, {task}": arm(name, seed, task, s.config.scale) for name in factors for task in TASKS}
        found |= {f"base, {task}": arm("VTA", seed, task, 0.0) for task in TASKS}
        return found | {f"VTA at {scale:g}, first": arm("VTA", seed, "first", scale) for scale in s.config.scales}

    return arms


def measures(space: Any, true: Any, given: Mapping[str, Any]) -> Callable[[Drawn], Mapping[str, float]]:
    """What the frames that were not given show: whose object it is, how it moves, the distance from real clips."""
    real = np.asarray(space.decode(space.encode(true)))

    def measure(drawn):
        clips, frames = np.asarray(space.decode(drawn.x)), given[drawn.arm.rpartition(", ")[2]]
        read = data.moving.verify(clips, reference=true, where=~frames)
        second = data.moving.verify(clips, reference=true, where=np.arange(clips.shape[1]) == 1)
        distance = sum(metrics.clip_distances(clips, real).values())
        return read | {"second": second["position_error"], "distance": distance}

    return measure


def kinds_of_change(params: Any, factors: Any) -> dict[str, float]:
    """The mean relative change of the weights of each kind of branch."""
    changed = adapters.relative_change(params, factors)
    kinds = {kind: [change for path, change in changed.items() if f"/{kind}/" in path] for kind in ("attention", "mlp")}
    return {kind: float(np.mean(values)) for kind, values in kinds.items()}


def rows(config: ConfigDict, found: Tabulated, changes: list[dict[str, float]]) -> list[Row]:
    """What the paper says, a value for each seed of the adaptations."""
    colour, both = "frames in the given colour", "frames in the given shape and colour"
    compared = [
        ("one frame given: VTA keeps its colour", colour, "colour", "first", "base", "higher", 0.2, "qualitative"),
        ("and shape and colour", both, "identity", "first", "base", "higher", 0.1, "qualitative"),
        ("the second frame is where it should be", "error of the place, pixels", "second", "first", "base", "lower",
         -1.0, "qualitative"),
        ("learns faster than mask-and-concat", colour, "colour", "first", CONCAT, "higher", 0.1, "87.7 against 75.0"),
        ("better than independent times for 20 %", colour, "colour", "first", "mixed", "higher", 0.0,
         "87.7 against 84.7"),
        ("better than only first frames, at first frames", colour, "colour", "first", "first frames", "higher", 0.0,
         "87.7 against 73.3"),
        ("only first frames: fails at the last", colour, "colour", "last", "first frames", "higher", 0.1,
         "expected by the card"),
        ("only first frames: fails in the middle", colour, "colour", "middle", "first frames", "higher", 0.1,
         "expected by the card"),
    ]  # fmt: skip
    result = [
        found.row(title, measure, f"VTA, {task}", f"{other}, {task}", way, published, figure=figure, margin=margin)
        for title, figure, measure, task, other, way, margin, published in compared
        if f"{other}, {task}" in found.figures
    ]  # fmt: skip
    low, high = (f"VTA at {scale:g}, first" for scale in (min(config.scales), max(config.scales)))
    between = f"scale {max(config.scales):g} against {min(config.scales):g}"
    attention, rest = ([one[kind] for one in changes] for kind in ("attention", "mlp"))
    return [
        *result,
        found.row("from a label it is as good as the base", "distance", "VTA, label", "base, label", "lower",
                  "text to video survives", figure="Fréchet distances, up to 10 %", factor=1.1),
        found.row("a larger scale keeps the object more", "colour", high, low, "higher", "81.8 at 1, 87.7 at 1.4",
                  figure=f"{colour}, {between}"),
        found.row("a larger scale moves less", "motion_energy", high, low, "lower", "dynamic degree 60.7, 32.4",
                  figure=f"motion energy, {between}"),
        Row("self-attention changes most", "relative change; against feed-forward", attention, rest, "higher",
            "almost only self-attention"),
    ]  # fmt: skip


STRIPS = (
    "Of each task the given frame (the others grey) and what the base, VTA and mask-and-concat make of it: the object "
    "should have the given frame's colour in all frames and move steadily."
)
SCALES = "What the scale of the adapter does, given the first frame: colour kept, and motion energy."


def draw_strips(s: Study, found: Tabulated, space: Any, true: Any, given: Mapping[str, Any]) -> None:
    strips = {}
    for task in TASKS[1:]:
        strips[f"given: {task}"] = np.where(given[task][0][:, None, None, None], true[0], -0.6)
        for name in ("base", "VTA", CONCAT):
            if (arm := f"{name}, {task}") in found.samples:
                strips[arm] = np.asarray(space.decode(found.samples[arm][0]))
    pictures.save_strips(s.picture("strips"), strips)


def draw_scales(s: Study, found: Tabulated) -> None:
    scales = list(s.config.scales)
    curves = {}
    for name, (figure, by) in {"colour kept": ("colour", 1.0), "motion energy x 10": ("motion_energy", 10.0)}.items():
        curves[name] = (scales, [by * np.mean(found[f"VTA at {scale:g}, first"][figure]) for scale in scales])
    pictures.save_curves(s.picture("scales"), curves, x_label="scale of the adapter", y_label="", log=False)
