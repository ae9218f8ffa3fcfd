"""Diversity distillation (Gandikota & Bau 2025): the base makes the first step of its distilled student's few.

A student that was distilled to four steps gives nearly one picture a class: it fixes the composition in its first step,
which is seen in what it predicts of x0 through time. So the base makes that step and the student the others, at the
student's cost. The student still knows the base's concepts: low-rank sliders move from one to the other as they are.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, pictures, timesteps
from diffusion_jax.baselines import CLASSES
from diffusion_jax.config import build
from diffusion_jax.experiment import prepare
from diffusion_jax.metrics import feature_network, pairwise_distance, undecided
from diffusion_jax.recipes.frame import seeds, trained
from diffusion_jax.recipes.parts.digits import judged
from diffusion_jax.recipes.parts.few_steps import Drawn, distilled, relay
from diffusion_jax.recipes.parts.patterns import collapsed, of_patterns
from diffusion_jax.recipes.parts.sliders import areas, of_sliders, trained_slider
from diffusion_jax.recipes.report import Claim, Results, claim

NOTES = (
    "the seeds of digits are of sampling, of one training of the student and of each slider. The student's grid and "
    "training were chosen on seeds from 100 on. The row of the base's longer grid was added, and the reasons were "
    "written, after these seeds had been seen. Fréchet distance to held-out digits: base in many steps {base:.2f}, "
    "student {student:.2f}; so the student is blurred and not only collapsed: it has lost variance as regressions do."
)


ARMS = {"base": "base", "student": "k = 0", "base, then student": "k = 1"}
"""What is shown, by name, and which of `World.arms` it is."""


class Measured(NamedTuple):
    """diversity: mean distance of the judge's features between samples of one class. The others: see `digits.Judged`
    and `metrics.undecided`."""

    diversity: float
    accuracy: float
    distance: float
    undecided: list[float]


class World(NamedTuple):
    """The two models, and how runs are made.

    few, many, apart: by the solver of the student, of the base, and by each model's own. grid: of the student; long: of
    the base alone; own: of the base before the student, by name.
    """

    params: tuple[Any, Any]
    few: Any
    many: Any
    apart: Any
    grid: Any
    long: Any
    own: Any

    def base(self, key, params, cond) -> Drawn:
        """The base in many steps."""
        steps = len(self.long) - 1
        return self.many(key, (params, params), np.zeros(steps, np.int32), self.long, len(cond["label"]), cond)

    def handed(self, key, which, grid, cond, params=None) -> Drawn:
        """A run by the student's solver, of whom the table names at each step."""
        return self.few(key, params or self.params, which, grid, len(cond["label"]), cond)

    def arms(self, key, cond) -> dict[str, Drawn]:
        """All ways to sample that are compared, from the same noise."""
        steps = len(self.grid) - 1
        found = {"base": self.base(key, self.params[0], cond)}
        for k in range(steps + 1):
            found[f"k = {k}"] = self.handed(key, timesteps.spliced(self.grid, self.grid, k).which, self.grid, cond)
        found["student first"] = self.handed(key, (np.arange(steps) == 0).astype(np.int32), self.grid, cond)
        for name, own in self.own.items():
            spliced = timesteps.spliced(own, self.grid, 1)
            found[name] = self.apart(key, self.params, spliced.which, spliced.grid, len(cond["label"]), cond)
        return found

    def moments(self) -> list[int]:
        """The steps of the base's own run that are at the times of the student's."""
        return [int(np.argmin(np.abs(np.asarray(self.long)[:-1] - t))) for t in np.asarray(self.grid)[:-1]]


def labels_by_class(each: int) -> dict[str, Any]:
    """`each` conditions of every class, one class after the other."""
    return {"label": jnp.repeat(jnp.arange(CLASSES), each)}


def variety_of(drawn: Drawn, cond: Mapping[str, Any]) -> Measured:
    features, label = feature_network("digits").features(drawn.x), np.asarray(cond["label"])
    judgement = judged(drawn.x, label)
    return Measured(pairwise_distance(features, label), *judgement, undecided(drawn.predictions, drawn.x).tolist())


def of_variety(found: Sequence[dict[str, Measured]], arms: dict[str, Drawn], begins: int) -> list[Claim]:
    """What the paper says of diversity, against `found[seed][arm]`.

    begins: the step of the base's own run that is at the time at which the student's begins.
    """
    steps = arms["k = 0"].evaluations

    def over(arm, measure):
        return [getattr(one[arm], measure) for one in found]

    def against(name, metric, measure, baseline, ours, direction, published, **bounds):
        return claim(name, metric, over(baseline, measure), over(ours, measure), direction, published, **bounds)

    within = "distance of the judge's features within a class"
    first = [one["base"].undecided[begins] for one in found], [one["k = 0"].undecided[0] for one in found]
    one_step = (
        "in 64 dimensions the base's first x0 is nearly the mean of its class; from there, the noise that is added at "
        "the second time brings back a part of the variety only. It holds in 256 dimensions, see the patterns"
    )
    return [
        against("The student is collapsed", f"{within}, under 85 % of the base's", "diversity", "base", "k = 0",
                "lower", "0.264 against 0.337", factor=0.85,
                reason="fresh noise at its later times makes up for what the first step has lost"),
        against("One step of the base restores diversity", f"{within}, over 95 % of the base's", "diversity", "base",
                "k = 1", "higher", "0.350 against 0.337", factor=0.95, reason=one_step),
        *(against(f"So does the base on a grid of its own: {arms[name].evaluations:g} evaluations",
                  f"{within}, over 95 % of the base's", "diversity", "base", name, "higher",
                  "20 base steps in the released command", factor=0.95,
                  reason="of so few steps by DDIM the variety of the base is itself less")
          for name in ("short", "long") if name in arms),
        against("At no loss of accuracy", "class accuracy, at most a point under the student's", "accuracy", "k = 0",
                "k = 1", "higher", "shown in pictures", margin=-0.01,
                reason="the student did not learn from means that are re-noised, which is what the base hands it"),
        against("And nearer to the data", "Fréchet distance to held-out digits; baseline: the student", "distance",
                "k = 0", "k = 1", "lower", "FID 10.79 against 15.52",
                reason="the distance weighs a shift of all samples more than their variety"),
        claim("At the student's cost", "network evaluations", steps, arms["k = 1"].evaluations, "equal",
              "0.64 s against 0.64 s"),
        against("Not in the reverse order", f"{within}: the student first, then the base; baseline: the base first",
                "diversity", "k = 1", "student first", "lower", "diversity does not come back", factor=0.95,
                reason="the first step is re-noised so strongly that the base decides anew"),
        claim("The student decides at once", "|predicted x0 - x| / |x| at the first time, under half of the base's",
              *first, "lower", "composition fixed after one step", factor=0.5,
              reason="distilled in minutes, the student's first answer is still blurred, and later steps sharpen it"),
    ]  # fmt: skip


def run(config: ConfigDict, workdir: Path) -> Results:
    base, numbers = prepare(config.base), list(seeds(config))
    params = trained(base, "digits-transformer")
    student = distilled(config, base, params, "diversity-student")
    denoiser = denoisers.denoiser(base.network, base.process)
    pair, both = (denoiser, denoiser), (build(config.base_solver), build(config.solver))
    few = relay(pair, both[1], base.shape)
    many = few if config.base_solver == config.solver else relay(pair, both[0], base.shape)
    apart = relay(pair, both, base.shape)
    world = World((params, student), few, many, apart, *(build(config[name]) for name in ("grid", "long", "own")))

    cond = labels_by_class(config.each)
    drawn = [world.arms(jax.random.key(seed), cond) for seed in numbers]
    found = [{name: variety_of(arm, cond) for name, arm in arms.items()} for arms in drawn]
    config.slider.seed = config.seed
    slider = partial(trained_slider, config.slider, base)
    before = [config[name].to_dict() for name in ("base", "student", "grid", "compared")] + [config.first]
    sliders = {
        "base": slider(params=params, name="slider-base", given=before[:1]),
        "student": slider(params=student, name="slider-student", given=before),
    }
    few_labels, ones = labels_by_class(config.sliding.each), np.ones(len(world.grid) - 1, np.int32)
    models = {
        "base": (params, lambda key, p: world.base(key, p, few_labels).x),
        "student": (student, lambda key, p: world.handed(key, ones, world.grid, few_labels, (p, p)).x),
    }
    slid = areas(sliders, models, config.sliding.strengths, numbers)
    claims = [
        *of_variety(found, drawn[0], world.moments()[0]),
        *of_patterns([collapsed(seed, **config.patterns) for seed in numbers]),
        *of_sliders(slid, config.sliding.strengths),
    ]
    distances = {name: float(np.mean([one[arm].distance for one in found])) for name, arm in ARMS.items()}
    return Results(claims, draw_pictures(world, drawn[0], found, slid, config, workdir), NOTES.format(**distances))


def draw_pictures(
    world: World, drawn: dict, found: Sequence[dict], slid: dict, config: ConfigDict, workdir: Path
) -> list[Path]:
    """The pictures: x0 through time, when it is decided, how varied runs are, and what sliders do."""
    files = [workdir / f"{name}.png" for name in ("predictions", "decided", "diversity", "sliders")]
    some = config.each * config.shown + np.arange(4)
    strips = {}
    for name, arm in ARMS.items():
        said = drawn[arm].predictions[world.moments() if arm == "base" else slice(None)]
        strips[name] = np.concatenate([said[:, some], drawn[arm].x[None, some]]).swapaxes(0, 1)
    pictures.save_strips(files[0], strips, zoom=5)
    times = {arm: np.asarray(world.long if arm == "base" else world.grid)[:-1] for arm in ARMS.values()}
    curves = {name: (1 - times[arm], np.maximum(found[0][arm].undecided, 1e-3)) for name, arm in ARMS.items()}
    pictures.save_curves(files[1], curves, x_label="1 - t", y_label="distance of predicted x0 to the sample")
    steps = range(len(world.grid))
    lost = [np.mean([1 - one[f"k = {k}"].diversity / one["base"].diversity for one in found]) for k in steps]
    lines = {"base first, then student": (steps, lost), "base in many steps": (steps, [0.0] * len(steps))}
    pictures.save_curves(files[2], lines, x_label="steps made by the base", y_label="share of diversity that is lost")
    middle = config.sliding.strengths.index(0.0)
    lines = {
        f"of the {own}, on the {used}": (config.sliding.strengths, (area - area[:, middle, None]).mean(axis=0))
        for (own, used), area in slid.items()
    }
    pictures.save_curves(files[3], lines, x_label="strength of the slider", y_label="change of the stroke area")
    return files
