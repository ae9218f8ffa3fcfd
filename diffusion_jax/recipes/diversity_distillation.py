"""Diversity distillation: the base model makes the first of its distilled student's few steps.

A world whose exact denoiser is known, with a student that is collapsed in its first step alone; and the transformer on
digits with a student that distribution matching made of it, between which sliders of the area of strokes move.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, objectives, pictures, processes, solvers, timesteps
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Arm, Arms, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage

WITHIN, MODES = {"figure": "distance of features within a class"}, {"figure": "effective modes of 8"}
DIGITS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (("One base step restores diversity", "variety", "k = 1", "base", "higher", "0.350, 0.337", 0.95), WITHIN),
    (("The student is collapsed", "variety", "k = 0", "base", "lower", "0.264, 0.337", 0.85), WITHIN),
    (("Not in the reverse order", "variety", "student first", "k = 1", "lower", "it does not come back", 0.95), WITHIN),
    (("A grid of the base's own restores it too", "variety", "own grid", "base", "higher", "20 steps", 0.95), WITHIN),
    (("At no loss of accuracy, up to a point", "accuracy", "k = 1", "k = 0", "higher", "pictures", 1.0, -0.01), {}),
    (("Nearer to the data than the student", "distance", "k = 1", "k = 0", "lower", "FID 10.8, 15.5"), {}),
)
PATTERNS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (("patterns: a collapsed first step", "modes", "student", "base", "lower", "5.39, 7.97", 0.8), MODES),
    (("patterns: one base step restores it", "modes", "base first", "base", "higher", "7.96, 7.97", 0.98), MODES),
    (("patterns: more varied than the base", "spread", "base first", "base", "higher", "1.329, 1.322"), {}),
    (("patterns: not in the reverse order", "modes", "student first", "student", "lower", "5.40, 5.39", 1.1), MODES),
)
"""Claims, as arguments of `Tabulated.row`."""


def distilled(config: ConfigDict, base: Stage) -> Experiment:
    """The student: the base, trained to answer as the guided base samples at each time of `config.grid`."""
    network, inner = base.trained.network, denoisers.denoiser(base.trained.network, base.trained.process)
    objective = objectives.distribution_matching(
        objectives.few_step_answers(inner, build(config.grid), config.first),
        denoisers.guided(inner, config.guidance, NULL),
        base.value,
        network,
        draw=build(config.compared),
        every=config.optimizer.every.student,
    )
    return prepare(
        config, network=network, objective=objective, begin=lambda key: dict.fromkeys(("student", "fake"), base.value)
    )


def ink(prediction: Any, t: Any, cond: Any) -> Any:
    """Minus the mean brightness of what is predicted: an energy whose descent adds ink."""
    return -jnp.mean((prediction.x0 + 1) / 2, axis=(1, 2, 3))


def stroke_area(drawn: Drawn) -> float:
    """The share of pixels brighter than half."""
    return float((np.asarray(drawn.x) > 0).mean())


def with_slider(config: ConfigDict, base: Stage, *student: Stage) -> Experiment:
    """Factors that add ink, beside the base or beside its student."""
    network, process = base.trained.network, base.trained.process
    params = student[0].value["student"] if student else base.value
    steered = denoisers.energy_guided(denoisers.denoiser(network, process), ink, config.strength)
    adapted, batch = build(config.lora, network=network), base.trained.example()
    objective = objectives.slider(adapted.network, process, steered, params, build(config.draw))

    def begin(key):
        return adapted.init(key, params, batch["x0"], jnp.zeros(1), batch["cond"])

    return prepare(config, network=network, objective=objective, begin=begin)


def patterns_of(seed: int, config: ConfigDict) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1.0, 1.0], (config.patterns, config.dimensions))


def patterns(s: Study) -> Tabulated:
    """Random patterns of +-1. The student is the exact denoiser of a mixture in which one of them weighs e^3 times as
    much for t > 0.9, and the base's flow map at all later times: whatever it lacks was lost in the first step."""
    config, exact = s.config.patterns, denoisers.analytic(processes.vp_scaled_linear())
    student = denoisers.switched((exact, denoisers.flow_map(exact)), (0.9,))
    handed, solver = partial(denoisers.switched, (exact, student)), solvers.ddim()
    grid = timesteps.from_indices([999, 749, 499, 249])

    def arms(seed):
        means = patterns_of(seed, config)
        mixture = denoisers.gaussian_mixture(means, 0.3)
        seeking = denoisers.gaussian_mixture(means, 0.3, weights=np.exp(3.0 * (np.arange(len(means)) == 0)))
        orders = {"student": [1, 1, 1, 1], "base first": [0, 1, 1, 1], "student first": [1, 0, 0, 0]}
        params = mixture, (seeking, mixture)
        found = {name: Arm(handed, params, solver, grid, None, (np.array(order),)) for name, order in orders.items()}
        return {"base": Arm(exact, mixture, solver, timesteps.linspace(config.base_steps)), **found}

    def modes(drawn):
        distances = ((drawn.x[:, None] - patterns_of(drawn.seed, config)) ** 2).sum(axis=-1)
        return metrics.effective_modes(np.argmin(distances, axis=1))

    measures = {"modes": modes, "spread": lambda drawn: metrics.pairwise_distance(drawn.x) / config.dimensions**0.5}
    return table(arms, s.seeds, measures, shape=(config.dimensions,), count=config.samples)


def of_digits(s: Study, base: Stage, student: Stage) -> Tabulated:
    """Digits of every class: by the base, guided, in many steps, and by the student's solver on its grid, where the
    base makes the first `k` steps, or all but the first, or steps of its own down to the student's second time."""
    config, inner = s.config, denoisers.denoiser(base.trained.network, base.trained.process)
    cond, params = {"label": np.repeat(np.arange(CLASSES), config.each)}, (base.value, student.value["student"])
    solver, first, grid, long = (build(config[name]) for name in ("solver", "base_solver", "grid", "long"))
    handed, steps, judge = partial(denoisers.switched, (inner, inner)), len(grid) - 1, metrics.feature_network("digits")
    orders = {f"k = {k}": timesteps.spliced(grid, grid, k).which for k in range(steps)}
    orders["student first"] = (jnp.arange(steps) == 0).astype(jnp.int32)
    own, guided = timesteps.spliced(build(config.own), grid, 1), denoisers.guided(inner, config.student.guidance, NULL)
    arms = {name: Arm(handed, params, solver, grid, cond, (which,)) for name, which in orders.items()}
    arms["own grid"] = Arm(handed, params, solvers.switched((first, solver), own.which), own.grid, cond, (own.which,))
    arms["base"] = Arm(guided, base.value, first, long, cond)
    measures = {
        "variety": lambda drawn: metrics.pairwise_distance(judge.features(drawn.x), cond["label"]),
        "accuracy": lambda drawn: metrics.judged(judge, drawn.x, cond["label"]).accuracy,
        "distance": lambda drawn: metrics.judged(judge, drawn.x).distance,
    }
    return table(arms, s.seeds, measures, shape=base.trained.shape, count=len(cond["label"]))


def decided(s: Study, base: Stage, student: Stage) -> dict[str, list[np.ndarray]]:
    """How far predictions of x0 are from the sample that they become, by step, a run of either model a seed."""
    config, inner = s.config, denoisers.denoiser(base.trained.network, base.trained.process)
    cond = {"label": jnp.arange(5 * CLASSES) % CLASSES}
    shape, found = (5 * CLASSES, *base.trained.shape), {}
    for name, params, solver, grid in (
        ("base", base.value, config.base_solver, config.long),
        ("student", student.value["student"], config.solver, config.grid),
    ):
        grid = build(grid)
        seen = denoisers.recorded(inner, len(grid) - 1)
        run = jax.jit(
            partial(sample, denoiser=seen, params=params, solver=build(solver), grid=grid, shape=shape, cond=cond)
        )
        runs = [run(jax.random.key(seed)) for seed in s.seeds]
        found[name] = [metrics.undecided(one.run.carry.values, one.x) for one in runs]
    return found


def slid(s: Study, base: Stage, student: Stage) -> Tabulated:
    """The area of strokes with a slider of either model at every strength, beside either model."""
    config, inner = s.config, denoisers.denoiser(base.trained.network, base.trained.process)
    adapted = build(config.slider.lora, network=base.trained.network)
    factors = {
        "base": s.stage("slider of the base", config.slider, base, prepare=with_slider).value,
        "student": s.stage("slider of the student", config.slider, base, student, prepare=with_slider).value,
    }
    label = np.arange(8 * CLASSES) % CLASSES
    runs = {
        "base": Arm(inner, base.value, build(config.base_solver), build(config.short), {"label": label}),
        "student": Arm(inner, student.value["student"], build(config.solver), build(config.grid), {"label": label}),
    }
    merge = jax.jit(adapted.merge)
    arms: Arms = {
        f"{own}, {used}, {strength:g}": arm._replace(params=merge(arm.params, factors[own], strength))
        for own in factors
        for used, arm in runs.items()
        for strength in config.strengths
    }
    return table(arms, s.seeds, {"area": stroke_area}, shape=base.trained.shape, count=len(label))


def study(s: Study) -> Results:
    config = s.config
    base = s.stage("digits", config.base)
    student = s.stage("student", config.student, base, prepare=distilled)
    found, rows = of_digits(s, base, student) if config.each else None, []
    rows += [found.row(*claim, **bounds) for claim, bounds in DIGITS] if found else []
    made = patterns(s)
    rows += [made.row(*claim, **bounds) for claim, bounds in PATTERNS]
    captions: dict[Any, str] = {}
    if found:
        said, times = (
            decided(s, base, student),
            {name: np.asarray(build(config[name]))[:-1] for name in ("long", "grid")},
        )
        at = int(np.argmin(np.abs(times["long"] - times["grid"][0])))
        first = [float(one[0]) for one in said["student"]], [float(one[at]) for one in said["base"]]
        figure, published = "|predicted x0 - x| / |x| at its first time", "fixed after one step"
        rows.append(Row("The student decides at once", figure, *first, "lower", published, 0.5))
        curves = {
            name: (1 - grid, np.mean(said[name], axis=0))
            for name, grid in zip(("base", "student"), times.values(), strict=True)
        }
        label, title = "relative distance of predicted x0 to the sample", "When the sample is decided"
        pictures.save_curves(s.picture("decided"), curves, x_label="1 - t", y_label=label, title=title, log=False)
        captions[s.picture("decided")] = "When a sample is decided: a collapsed student is at its first step."
        arms = {"base": "base", "student": "k = 0", "one base step": "k = 1", "the base's own grid": "own grid"}
        shown = {name: found.samples[arm][2 * config.each :][:10] for name, arm in arms.items()}
        pictures.save_strips(s.picture("samples"), shown, title="Ten samples of one class")
        captions[s.picture("samples")] = "Ten samples of one class: their variety is what the student lacks."
    areas = slid(s, base, student)
    rows += slider_rows(areas, config)
    curves = {
        f"slider of the {own}, on the {used}": (config.strengths, areas_of(areas, own, used, config).mean(axis=1))
        for own, used in itertools.product(("base", "student"), repeat=2)
    }
    labels: dict[str, Any] = {"x_label": "strength of the slider", "y_label": "share of the image that is stroke"}
    pictures.save_curves(s.picture("sliders"), curves, **labels, title="What a slider changes", log=False)
    captions[s.picture("sliders")] = "Stroke area by strength of a slider, beside its own model and the other one."
    return Results(rows, captions, "the noise, and the patterns; student and sliders are trained once")


def areas_of(found: Tabulated, own: str, used: str, config: ConfigDict) -> np.ndarray:
    """`[strength, seed]`"""
    return np.array([found[f"{own}, {used}, {strength:g}"]["area"] for strength in config.strengths])


def slider_rows(found: Tabulated, config: ConfigDict) -> list[Row]:
    """Control distillation: what a slider does where it was not trained, against what it does at home."""
    rows, published = [], "sliders work unchanged"
    for own, other in (("base", "student"), ("student", "base")):
        away, home = (areas_of(found, own, used, config) for used in (other, own))
        there, here = (np.polyfit(config.strengths, areas, 1)[0].tolist() for areas in (away, home))
        title, figure = f"A slider of the {own} moves the {other} half as much", "rise of stroke area per strength"
        rows.append(Row(title, figure, there, here, "higher", published, 0.5))
        smallest = np.diff(away, axis=0).min(axis=0).tolist()
        figure = "smallest rise of stroke area"
        rows.append(Row(f"It moves the {other} monotonically", figure, smallest, 0.0, "higher", published))
    return rows
