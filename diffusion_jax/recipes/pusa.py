"""Pusa (Liu et al. 2025): a model that knows one time for a whole clip learns to go on from given frames.

Nothing is added to the network: a time for each frame modulates that frame by its own level, and equal levels are the
model as it was. A low-rank adapter is trained for a few updates, on clips of the model's own, at independent times
(vectorised timestep adaptation, VTA). Measured against the model itself, other draws of training times, and the usual
way: given frames and a mask as further input channels. The label of a clip names its shape and not its colour, so what
is kept of a given frame's colour comes from the frame.
"""

from collections.abc import Callable, Mapping
from functools import partial
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
    arms = adapted_arms(s, base, factors, part["cond"]["label"], np.asarray(space.encode(part["x0"])), given)
    found = table(arms, s.seeds, free_measures(space, part["x0"], given), shape=base.trained.shape, count=config.clips)
    trees = [one.value for one in factors["VTA"].values()]
    changes = [[mean_change(base.value, tree, kind) for tree in trees] for kind in ("attention", "mlp")]
    drawn = draw(s, found, space, part["x0"], given)
    return Results(adaptation_rows(config, found, changes), drawn, "training of the adapters and noise, of one base")


def given_frames(clips: int, frames: int) -> dict[str, np.ndarray]:
    """Which frames of each clip `[clips, frames]` are given in each task."""
    index = np.broadcast_to(np.arange(frames), (clips, frames))
    middle = 1 + np.arange(clips)[:, None] % (frames - 2)
    return dict(zip(TASKS, (index < 0, index == 0, index == frames - 1, index == middle), strict=True))


def own_samples(config: Any, base: Stage) -> Mapping[str, Any]:
    """Clips of the base itself, every label equally often: what adaptations are trained on."""
    made, grid = base.trained, build(config["grid"])
    denoiser, label = denoisers.denoiser(made.network, made.process), np.arange(config["count"], dtype=np.int32)
    label, shape = label % made.source.num_classes, (config["count"], *made.shape)
    key, solver = jax.random.key(1), solvers.flow_euler()
    x0 = sample(key, denoiser, base.value, solver, grid, shape=shape, cond={"label": label}).x
    return {"x0": np.asarray(x0), "label": label}


def adapted(config: Any, base: Stage, own: Stage) -> Experiment:
    """The training of factors beside the base, on its own samples; in an arm of channels of its entrance too."""
    config = ConfigDict(config)
    params, cond, network = base.value, {"label": np.asarray(own.value["label"])}, build(config.model)
    x0 = np.asarray(own.value["x0"])
    if len(network.module.conditions) > 1:
        cond["concat"] = np.asarray(adapters.masked_channels(x0, np.arange(x0.shape[1])[None] == 0))
        params = adapters.with_channels(base.trained.network, params, cond["concat"].shape[-1])
    source = data.ArraySource(x0, cond, "samples of the base")
    loss = partial(build, config.objective, process=base.trained.process)
    lora, batch = build(config.lora, network=network), source.take(np.arange(2))
    made = objectives.adaptation(lora, params, lambda network: loss(network=network), batch)
    return prepare(config, source=source, network=made.network, objective=made.objective, begin=made.init)


def adapted_arms(
    s: Study, base: Stage, factors: Mapping[str, Mapping[int, Stage]], label: Any, known: Any, given: Mapping[str, Any]
) -> Callable[[int], dict[str, Arm]]:
    """Every adaptation at every task, and VTA at other scales: tasks are arrays of one program."""
    grid, solver, process = build(s.config.grid), solvers.flow_euler(), base.trained.process
    made = {name == CONCAT: one[s.seeds[0]].trained.network for name, one in factors.items()}
    denoiser = {concat: denoisers.denoiser(network, process) for concat, network in made.items()}
    wider = adapters.with_channels(base.trained.network, base.value, known.shape[-1] + 1)
    cond = {"label": jnp.asarray(label)}

    def arm(name, seed, task, scale):
        concat, frames = name == CONCAT, given[task]
        told = cond | ({"concat": adapters.masked_channels(known, frames)} if concat else {})
        # One time for all frames where given ones are channels: they come back as the model sees them.
        plan = timesteps.multiplied(grid, np.where(frames & (not concat), 0.0, 1.0))
        params = adapters.at_scale(wider if concat else base.value, factors[name][seed].value, scale)
        return Arm(denoiser[concat], params, solver, plan, told, known=known)

    def arms(seed):
        found = {f"{name}, {task}": arm(name, seed, task, s.config.scale) for name in factors for task in TASKS}
        found |= {f"base, {task}": arm("VTA", seed, task, 0.0) for task in TASKS}
        return found | {f"VTA at {scale:g}, first": arm("VTA", seed, "first", scale) for scale in s.config.scales}

    return arms


def free_measures(space: Any, true: Any, given: Mapping[str, Any]) -> Callable[[Drawn], Mapping[str, float]]:
    """What the frames that were not given show: whose object it is, how it moves, the distance from real clips."""
    real = np.asarray(space.decode(space.encode(true)))

    def measure(drawn):
        clips, frames = np.asarray(space.decode(drawn.x)), given[drawn.arm.rpartition(", ")[2]]
        read = data.moving.verify(clips, reference=true, where=~frames)
        second = data.moving.verify(clips, reference=true, where=np.arange(clips.shape[1]) == 1)
        distance = sum(metrics.clip_distances(clips, real).values())
        return read | {"second": second["position_error"], "distance": distance}

    return measure


def mean_change(params: Any, factors: Any, kind: str) -> float:
    """The mean relative change of the weights in one kind of branch, "attention" or "mlp"."""
    changed = adapters.relative_change(params, factors)
    return float(np.mean([change for path, change in changed.items() if f"/{kind}/" in path]))


def adaptation_rows(config: ConfigDict, found: Tabulated, changes: Any) -> list[Row]:
    """What the paper says, a value for each seed of the adaptations."""
    colour, both = "frames in the given colour", "frames in the given shape and colour"
    place, seen, ours = "error of the place, pixels", "qualitative", "87.7 against"
    compared = [
        ("one frame given: VTA keeps its colour", "first", "base", "colour", colour, "higher", 0.2, seen),
        ("and shape and colour", "first", "base", "identity", both, "higher", 0.1, seen),
        ("the second frame is where it should be", "first", "base", "second", place, "lower", -1.0, seen),
        ("learns faster than mask-and-concat", "first", CONCAT, "colour", colour, "higher", 0.1, f"{ours} 75.0"),
        ("better than independent times for 20 %", "first", "mixed", "colour", colour, "higher", 0.0, f"{ours} 84.7"),
        ("better than first frames, there", "first", "first frames", "colour", colour, "higher", 0.0, f"{ours} 73.3"),
        ("only first frames: fails at the last", "last", "first frames", "colour", colour, "higher", 0.1, "expected"),
        ("only first frames: fails inside", "middle", "first frames", "colour", colour, "higher", 0.1, "expected"),
    ]
    result = [
        found.row(title, measure, f"VTA, {task}", f"{other}, {task}", way, published, figure=figure, margin=margin)
        for title, task, other, measure, figure, way, margin, published in compared
        if f"{other}, {task}" in found.figures
    ]
    low, high = (f"VTA at {scale:g}, first" for scale in (min(config.scales), max(config.scales)))
    between = f"scale {max(config.scales):g} against {min(config.scales):g}"
    told, far = "relative change; against feed-forward", "Fréchet distances, up to 10 %"
    return [
        *result,
        found.row("from a label it is as good as the base", "distance", "VTA, label", "base, label", "lower",
                  "text to video survives", figure=far, factor=1.1),
        found.row("a larger scale keeps the object more", "colour", high, low, "higher", "81.8 at 1, 87.7 at 1.4",
                  figure=f"{colour}, {between}"),
        found.row("a larger scale moves less", "motion_energy", high, low, "lower", "dynamic degree 60.7, 32.4",
                  figure=f"motion energy, {between}"),
        Row("self-attention changes most", told, changes[0], changes[1], "higher", "almost only self-attention"),
    ]  # fmt: skip


def draw(s: Study, found: Tabulated, space: Any, true: Any, given: Mapping[str, Any]) -> dict[Any, str]:
    """A strip of each task, and what the scale of the adapter does."""
    strips, curves, scales = {}, {}, list(s.config.scales)
    for task in TASKS[1:]:
        strips[f"given: {task}"] = np.where(given[task][0][:, None, None, None], true[0], -0.6)
        arms = (f"{name}, {task}" for name in ("base", "VTA", CONCAT))
        strips |= {arm: np.asarray(space.decode(found.samples[arm][0])) for arm in arms if arm in found.samples}
    pictures.save_strips(s.picture("strips"), strips, title="One frame is given (grey: unknown)", along="time")
    for name, measure, by in (("colour kept", "colour", 1.0), ("motion energy x 10", "motion_energy", 10.0)):
        curves[name] = (scales, [by * np.mean(found[f"VTA at {scale:g}, first"][measure]) for scale in scales])
    labels: dict[str, Any] = {"x_label": "scale of the adapter", "y_label": "share kept; motion energy x 10"}
    pictures.save_curves(s.picture("scales"), curves, **labels, title="What the adapter's scale trades", log=False)
    seen = (
        "Of each task the given frame (the others grey) and what is made of it: the given colour in all frames, moving."
    )
    return {s.picture("strips"): seen, s.picture("scales"): "What the scale of the adapter does to the first task."}
