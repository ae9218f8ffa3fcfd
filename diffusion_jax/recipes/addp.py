"""ADDP (Pang et al. 2025): perception by diffusion, trained at the times that contribute to its answer, on answers as
late steps meet them.

Two worlds: predictors of a smooth function, whose error is known at every step of a run, and a generalist that paints
masks of what is referred to and maps of depth. Arms differ in their draw of times and in `base`; updates are equal.
"""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, pictures, solvers, timesteps
from diffusion_jax.data.referring import Referring, encoded_requests, wrongly_marked
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes.parts.predictors import error_program, trained_together
from diffusion_jax.recipes.study import Results, Study, by_seed
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage

TRAIN_STEPS = 1000


def study(s: Study) -> Results:
    curves = predictor_curves(s)
    rows, captions = predictor_rows(curves, s.config), draw_curves(s, curves)
    sets = answer_sets(s)
    stages = trained_generalists(s, real="stereo" in sets)
    found, shown = perception(s, stages, sets)
    rows += perception_rows(found, s.config.perception, sets)
    captions |= draw_answers(s, sets, shown)
    return Results(rows, captions, "training and noise")


def predictor_curves(s: Study) -> dict[str, Any]:
    """By arm: the root mean square error of the predicted x0 at each step of a run, and of answers in `few` steps."""
    found, programs = {}, {}
    full = timesteps.linspace(s.config.steps, num_train_steps=TRAIN_STEPS)
    grids = [timesteps.padded(timesteps.linspace(n, num_train_steps=TRAIN_STEPS), len(full) - 1) for n in s.config.few]
    for name, arm in s.config.predictors.items():
        params = s.stage(name, ConfigDict({"arm": arm, "seeds": s.seeds}), make=trained_together).value["params"]
        kind = arm.process.prediction
        programs[kind] = programs.get(kind) or error_program(arm, s.config.steps)
        ran = np.stack([np.asarray(programs[kind](params, jnp.asarray(s.seeds), grid)) for grid in (full, *grids)])
        few = [ran[i, :, n - 1] for i, n in enumerate(s.config.few, start=1)]
        found[name] = {"curve": ran[0], **dict(zip(s.config.few, few, strict=True)), s.config.steps: ran[0][:, -1]}
    return found


def predictor_rows(found: Mapping[str, Any], config: ConfigDict) -> list[Row]:
    rows, first, last = [], "RMSE of the answer in one step", f"RMSE at step {config.steps} against that of the best"
    better = (
        ("noise prediction: contributions", "noise, contributions", "noise, uniform", 0.9, "1.24 to 0.30"),
        ("noise prediction: contributions, half uniform", "noise, half", "noise, uniform", 0.9, "1.24 to 0.63"),
        ("noise prediction: degraded answers add to it", "noise, both", "noise, half", 1.0, "0.63 to 0.41"),
        ("v prediction: contributions", "v, contributions", "v, uniform", 0.9, "0.172 to 0.144"),
    )
    for title, ours, other, factor, published in better:
        if ours in found and other in found:
            rows.append(Row(title, first, list(found[ours][1]), list(found[other][1]), "lower", published, factor))
    for name, published in (("noise, contributions", "0.22 to 0.335"), ("v, contributions", "0.122 to 0.139")):
        if name in found:
            curve, title = found[name]["curve"], f"{name.partition(',')[0]}: quality drops in late steps"
            rows.append(Row(title, last, list(curve[:, -1]), list(curve.min(axis=1)), "higher", published))
    if "v, both" in found:
        best = list(1.0 + found["v, both"]["curve"].argmin(axis=1))
        title, figure = "v: with degraded answers it does not", f"the best step, of {config.steps}"
        rows.append(Row(title, figure, best, float(config.steps), "equal", "the last", margin=0.5))
    scarce = "v, contributions, few data", "v, uniform, few data"
    for steps in (*config.few, config.steps):
        if scarce[0] in found:
            ours, other = (list(found[name][steps]) for name in scarce)
            rows.append(Row(f"few data, {steps} steps: contributions", "RMSE", ours, other, "lower", "lower"))
    return rows


def answer_sets(s: Study) -> dict[str, Any]:
    """Held-out sources: requests with one referent, with several, depth, and patches of the stereo pair if there is."""
    count = s.config.perception.count
    sets: dict[str, Any] = {
        "segment": data.referring_scenes("test", count, tasks=("segment",), ambiguous=0.0),
        "ambiguous": data.referring_scenes("test", count, tasks=("segment",), ambiguous=1.0, seed=1),
        "depth": data.referring_scenes("test", count, tasks=("depth",), seed=2),
    }
    try:
        sets["stereo"] = data.stereo_patches("test")
    except InvalidInput as missing:
        print(f"The rows of real depth are left out: {missing}", file=sys.stderr)
    return sets


def trained_generalists(s: Study, real: bool) -> dict[str, dict[int, Stage]]:
    arms = {name: ConfigDict(arm.to_dict()) for name, arm in s.config.generalists.items()}
    for arm in arms.values():
        arm.data.real = arm.data.real if real else 0.0
    return {name: {seed: s.stage(f"{name} {seed}", arm, seed=seed) for seed in s.seeds} for name, arm in arms.items()}


def perception(s: Study, stages: Mapping[str, Mapping[int, Stage]], sets: Mapping[str, Any]) -> tuple[Any, Any]:
    """Figures by name, one a seed, and the answers of the first seed by arm and set."""
    config = s.config.perception
    one = stages["uniform"][s.seeds[0]].trained
    plain, grid = denoisers.denoiser(one.network, one.process), timesteps.linspace(config.steps, TRAIN_STEPS)
    denoiser = denoisers.recorded(with_correction(plain, config.correction), config.steps)
    kept: dict[str, Any] = {}

    @jax.jit
    def run(key, params, cond):
        shape = (config.count, *one.shape)
        return sample(key, denoiser, params, solvers.ddim(), grid, cond=cond, shape=shape).run.carry.values[..., 0]

    def answers(seed, params, source, wrong=None):
        cond = source.take(spread(source, config.count))["cond"]
        cond = {**cond, "wrong": cond["tokens"] if wrong is None else wrong}
        return np.asarray(run(jax.random.key(seed), params, jax.tree.map(jnp.asarray, cond)))

    def measure(seed):
        found = {}
        for name, trained in stages.items():
            params = trained[seed].value
            for task, source in sets.items():
                made = answers(seed, params, source)
                kept.setdefault(f"{name}, {task}", made)
                curve = [quality(source, one) for one in made]
                found |= {f"{name}, {task}, {i + 1}": value for i, value in enumerate(curve)}
                if task == "ambiguous" and name == "addp":
                    wrong, again = correction(source, made[-1])
                    after = answers(seed, params, source, encoded_requests(again)["tokens"])[-1]
                    kept.setdefault("corrected", after)
                    found |= corrected_overlap(source, made[-1], after, wrong)
        return found

    return by_seed(s.seeds, measure), kept


def with_correction(plain: Any, scale: float) -> Any:
    """The prediction under what is asked, moved away from that under `cond["wrong"]`; equal tokens change nothing."""

    def asked(cond):
        return {name: value for name, value in cond.items() if name != "wrong"}

    def wrong(cond):
        return {**asked(cond), "tokens": cond["wrong"], "tokens_mask": cond["wrong"] != 0}

    return denoisers.composed(plain, {"asked": asked, "wrong": wrong}, "asked", [("asked", "wrong", scale)])


def quality(source: Any, answer: np.ndarray) -> float:
    """Overlap of the mask with the true one, or the error of depth after an affine map."""
    rows = spread(source, len(answer))
    true = source.x0[rows, ..., 0]
    if isinstance(source, Referring) and source.requests[0] != "depth":
        return float(metrics.mask_overlap(answer > 0, true > 0).mean())
    disparity = 0.5 * (true + 1.0) if isinstance(source, Referring) else source.disparity[rows]
    return float(metrics.affine_depth_error(answer, disparity).mean())


def correction(source: Referring, answer: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which masks the judge finds wrong, and for each answer what it should not have marked (else the request)."""
    scenes: Any = source.scenes
    said = [wrongly_marked(mask > 0, scenes[i], source.meant[i]) for i, mask in enumerate(answer)]
    again = [source.requests[i] if one is None else f"segment {one}" for i, one in enumerate(said)]
    return np.asarray([one is not None for one in said]), again


def corrected_overlap(source: Referring, before: Any, after: Any, wrong: np.ndarray) -> dict[str, float]:
    true = source.x0[: len(before), ..., 0] > 0
    overlap = {"before": metrics.mask_overlap(before > 0, true), "after": metrics.mask_overlap(after > 0, true)}
    parts = {"wrong": wrong, "right": ~wrong}
    told = {f"{part}, {when}": float(np.mean(value[of])) if of.any() else np.nan
            for part, of in parts.items() for when, value in overlap.items()}  # fmt: skip
    return told | {"wrong": float(wrong.mean())}


def constant_error(source: Any, count: int) -> float:
    """The error of the best constant for each of `count` patches of real depth."""
    true = source.disparity[spread(source, count)]
    return float(metrics.affine_depth_error(np.zeros_like(true), true).mean())


def spread(source: Any, count: int) -> np.ndarray:
    """`count` examples from all of a source."""
    return np.arange(count) * len(source) // count


def perception_rows(found: Mapping[str, list[float]], config: ConfigDict, sets: Mapping[str, Any]) -> list[Row]:
    steps, rows = config.steps, []

    def row(title, figure, task, at, direction, published):
        ours, other = (found[f"{name}, {task}, {at}"] for name in ("addp", "uniform"))
        rows.append(Row(title, figure, ours, other, direction, published))

    for at in (1, steps):
        told = f"{at} step{'s' * (at > 1)}"
        row(f"what is referred to, {told}", "overlap with the true mask", "segment", at, "higher", "higher cIoU")
        row(f"depth, {told}", "AbsRel", "depth", at, "lower", "lower")
    if "stereo" in sets:
        row(f"real depth, {steps} steps", "AbsRel, stereo pair", "stereo", steps, "lower", "lower, NYU and others")
        flat = constant_error(sets["stereo"], config.count)
        ours, figure = found[f"addp, stereo, {steps}"], "AbsRel, stereo pair"
        rows.append(Row("real depth: it sees more than a plane", figure, ours, flat, "lower", "not reported"))
    half = (steps + 1) // 2
    curve = np.asarray([found[f"uniform, segment, {at}"] for at in (1, half, steps)])
    title, figure = "early steps contribute most", f"overlap gained from step 1 to {half} and to {steps}"
    rows.append(Row(title, figure, list(curve[1] - curve[0]), list(curve[2] - curve[1]), "higher", "figure 3"))
    if np.isfinite([found["wrong, after"], found["right, after"]]).all():
        title, figure = "one correction mends wrong answers", "overlap of wrong answers, after and before"
        rows.append(Row(title, figure, found["wrong, after"], found["wrong, before"], "higher", "by hand", margin=0.2))
        title, figure = "and leaves right ones alone", "overlap of right answers"
        right = found["right, after"], found["right, before"]
        rows.append(Row(title, figure, *right, "equal", "unchanged", margin=0.02))
    return rows


def draw_curves(s: Study, found: Mapping[str, Any]) -> dict[Any, str]:
    steps = list(range(1, s.config.steps + 1))
    curves = {name: (steps, one["curve"].mean(axis=0).tolist()) for name, one in found.items() if "few" not in name}
    label: dict[str, Any] = {"x_label": "step of a run", "y_label": "RMSE of the predicted x0"}
    pictures.save_curves(s.picture("curves"), curves, **label, title="What a run knows at each of its steps")
    told = "The error of the predicted x0 along a run: times drawn by contribution make it small early and let it rise "
    return {s.picture("curves"): told + "late; degraded answers are meant to keep it falling."}


def draw_answers(s: Study, sets: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[Any, str]:
    """Pictures, true answers and those of both arms, of requests and of depth; the ambiguous ones before and after."""
    strips: dict[str, np.ndarray] = {}
    for task in ("ambiguous", "depth", "stereo"):
        if task in sets:
            count = s.config.perception.count
            rows = spread(range(count), min(10, count))
            own = spread(sets[task], count)[rows]
            grey = {"true": sets[task].x0[own, ..., 0]}
            grey |= {name: shown[f"{name}, {task}"][-1][rows] for name in ("uniform", "addp")}
            grey |= {"corrected": shown["corrected"][rows]} if task == "ambiguous" else {}
            strips[f"{task}: picture"] = sets[task].cond["concat"][own]
            strips |= {f"{task}: {name}": np.repeat(one[..., None], 3, axis=-1) for name, one in grey.items()}
    pictures.save_strips(s.picture("answers"), strips, title="Answers painted by one network")
    return {s.picture("answers"): "Masks of what was meant by an expression that fits two things, and maps of depth."}
