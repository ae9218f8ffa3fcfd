"""TBCM: continuous-time consistency on the states of the teacher's own runs, without data.

Students of one step and two, on a ring of Gaussians whose exact denoiser is the teacher and on digits, against the same
loss on as many noised data (sCM) and the teacher at few steps.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, objectives, pictures, solvers, timesteps
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.clock import single_step
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Arm, Results, Study, Tabulated, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.stages import Stage
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Network

TEACHER_STEPS = (1, 2, 16)
TIMES = {1: (1.0, 0.0), 2: (1.0, 2 / np.pi, 0.0)}
"""Of the students: the published second angle is 1."""


def ring_student(config: ConfigDict) -> Experiment:
    """A network beside the exact denoiser, whose answers it corrects; it begins as that."""
    process, inner = build(config.process), build(config.model)
    density, exact = build(config.mixture).density, denoisers.analytic(build(config.process))
    mixture = denoisers.gaussian_mixture(density.means, covariances=density.covariances)

    def apply(params, x, t, cond=None, train=False, key=None):
        # The network sees x_t over its length, and is told t itself.
        length = jnp.hypot(process.sigma(t), process.sigma_data * process.alpha(t))
        said, _ = exact.apply(mixture, (), expand(length, x) * x, single_step(t), None)
        return process.output(said, t) + inner.apply(params, x, t, None, train, key)[0], {}

    network = Network(lambda key, x, t, cond=None: inner.init(key, x, t, None), apply)
    parts = {"network": network, "process": process, "teacher": exact, "teacher_params": mixture}
    return prepare(config, network=network, process=process, objective=build(config.objective, **parts))


def digit_student(config: ConfigDict, base: Stage) -> Experiment:
    """A copy of the guided teacher that is told the scale of guidance."""
    network, process = build(config.model), base.trained.process
    inner = denoisers.denoiser(base.trained.network, process)

    def teacher(scale):
        return denoisers.guided(inner, denoisers.sample_scale(scale), NULL)

    def begin(key):
        example = base.trained.example()
        cond = {**example["cond"], "guidance_scale": np.ones(1, np.float32)}
        return extended(network.init(key, example["x0"], jnp.zeros(1), cond), base.value)

    parts = {"network": network, "process": process, "teacher": teacher, "teacher_params": base.value}
    return prepare(config, network=network, process=process, objective=build(config.objective, **parts), begin=begin)


def extended(fresh: Any, known: Any) -> Any:
    """Parameters `known`, with zeros for those of `fresh` that they lack."""
    if not isinstance(fresh, Mapping):
        return known
    return {
        name: extended(leaf, known[name]) if name in known else jax.tree.map(jnp.zeros_like, leaf)
        for name, leaf in fresh.items()
    }


def of_ring(s: Study) -> Tabulated:
    """Students of each seed in one step and two, and the teacher in few steps."""
    config = s.config.ring
    made = {
        name: {seed: s.stage(f"{name}, ring", one, seed=seed, prepare=ring_student) for seed in s.seeds}
        for name, one in config.students.items()
    }
    first = made["TBCM"][s.seeds[0]].trained
    density, exact = build(next(iter(config.students.values())).mixture).density, denoisers.analytic(first.process)
    mixture = denoisers.gaussian_mixture(density.means, covariances=density.covariances)
    student = denoisers.denoiser(first.network, first.process)

    def arms(seed):
        return taught_arms(exact, mixture, config.reference) | {
            f"{name}, {steps}": Arm(student, stages[seed].value, solvers.lcm(), np.asarray(grid, np.float32))
            for name, stages in made.items()
            for steps, grid in TIMES.items()
        }

    def measures(drawn):
        rng = np.random.default_rng(1000 + drawn.seed)
        data = density.sample(len(drawn.x), rng)[0]
        error = metrics.endpoint_error(drawn.x, drawn.reference)
        return {"distance": metrics.sliced_wasserstein(drawn.x, data), "error": error}

    return table(arms, s.seeds, measures, shape=(2,), count=config.count, reference="reference")


def taught_arms(teacher: Any, params: Any, reference: int, cond: Any = None) -> dict[str, Any]:
    """The teacher by DDIM in even steps: few, and so many that their ends stand for those of its flow."""
    grids = {f"teacher, {steps}": timesteps.linspace(steps) for steps in TEACHER_STEPS}
    grids["reference"] = timesteps.linspace(reference)
    return {name: Arm(teacher, params, solvers.ddim(), grid, cond) for name, grid in grids.items()}


def of_digits(s: Study) -> Tabulated:
    """The same of every class, guided at one scale."""
    config, judge = s.config.digits, metrics.feature_network(s.config.digits.world, size=8)
    base = s.stage("digits", config.base)
    network, process, cond = base.trained.network, base.trained.process, {"label": np.arange(config.count) % CLASSES}
    made = {n: s.stage(f"{n}, digits", one, base, prepare=digit_student) for n, one in config.students.items()}
    guided = denoisers.guided(denoisers.denoiser(network, process), config.guidance, NULL)
    student = denoisers.denoiser(made["TBCM"].trained.network, process)
    told = {**cond, "guidance_scale": np.full(config.count, config.guidance, np.float32)}
    arms = taught_arms(guided, base.value, config.reference, cond) | {
        f"{name}, {steps}": Arm(student, stage.value, solvers.lcm(), np.asarray(grid, np.float32), told)
        for name, stage in made.items()
        for steps, grid in TIMES.items()
    }

    def measures(drawn):
        error = metrics.endpoint_error(drawn.x, drawn.reference)
        return {**metrics.judged(judge, drawn.x, cond["label"])._asdict(), "error": error}

    return table(arms, s.seeds, measures, shape=base.trained.shape, count=config.count, reference="reference")


def discrepancies(s: Study) -> dict[str, list[float]]:
    """The correlation of coordinates of x0 with those of the noise in x_t that belongs to it, at half of the angle:
    along runs of the ring's teacher, and of noised data."""
    config = s.config.ring
    one = next(iter(config.students.values()))
    process, density = build(one.process), build(one.mixture).density
    mixture = denoisers.gaussian_mixture(density.means, covariances=density.covariances)
    circle, half = objectives.Circle(process, process.sigma_data), config.reference // 2
    grid = timesteps.linspace(2 * half)
    run = jax.jit(partial(objectives.teacher_trajectory, denoisers.analytic(process), mixture, circle, grid=grid,
                          shape=(config.count, 2), cond=None, index=np.arange(config.count)))  # fmt: skip

    def measured(seed):
        found, t = run(key=jax.random.key(seed)), grid[half]
        data, rng = found.x0, np.random.default_rng(seed)
        of_run = process.from_x0(data, circle.length(t) * found.y[half], t).eps
        fresh = rng.standard_normal(data.shape)
        return {
            name: abs(np.corrcoef(np.ravel(data), np.ravel(noise))[0, 1])
            for name, noise in (("runs", of_run), ("noised data", fresh))
        }

    return by_seed(s.seeds, measured)


def study(s: Study) -> Results:
    ring, digits, apart = of_ring(s), of_digits(s) if "digits" in s.config else None, discrepancies(s)
    figure = "|correlation| of x0 with its noise, half-way"
    rows = [*ring_rows(ring), Row("ring: a run's noise depends on its end", figure, apart["runs"], 0.1, "higher")]
    shown = {name: ring.samples[name] for name in ("reference", "teacher, 1", *students(ring))}
    pictures.save_scatter(s.picture("ring"), shown, title="Samples by number of evaluations")
    captions = {s.picture("ring"): "The ring by its teacher's flow, in one step of the teacher, and by students."}
    if digits is not None:
        rows += digit_rows(digits)
        strips = {name: digits.samples[name][:10] for name in ("reference", "teacher, 1", *students(digits))}
        pictures.save_strips(s.picture("digits"), strips, title="From the same noise, by number of evaluations")
        captions[s.picture("digits")] = "Digits 0 to 9 from the same noise, by students of one step and two."
    return Results(rows, captions, "the noise; on the ring also the training of the students")


def students(found: Tabulated) -> list[str]:
    return [name for name in found.figures if not name.startswith(("teacher", "reference"))]


def ring_rows(found: Tabulated) -> list[Row]:
    """Published figures are those of the card's prototype, in the same units."""
    row = partial(found.row, figure="sliced Wasserstein distance to data")
    return [
        row("ring: a quarter of the teacher's distance", "distance", "TBCM, 1", "teacher, 1", "lower",
            "0.081, 0.499", factor=0.25),
        row("ring: one step beats two of the teacher", "distance", "TBCM, 1", "teacher, 2", "lower", "0.081, 0.201"),
        row("ring: a second step helps", "distance", "TBCM, 2", "TBCM, 1", "lower", "0.052, 0.081"),
        row("ring: without data within 15 % of sCM", "distance", "TBCM, 1", "sCM, 1", "lower", "0.081, 0.080",
            factor=1.15),
        row("ring: in two steps too", "distance", "TBCM, 2", "sCM, 2", "lower", "0.052, 0.051", factor=1.15),
        found.row("ring: nearer to the teacher's ends than sCM", "error", "TBCM, 1", "sCM, 1", "lower",
                  "0.162, 0.181", figure="root mean square to the ends of its flow"),
        row("ring: sCM suffers from other data", "distance", "sCM, other data, 1", "sCM, 1", "higher", "expected"),
        row("ring: TBCM reads none", "distance", "TBCM, 1", "sCM, other data, 1", "lower", "expected"),
    ]  # fmt: skip


def digit_rows(found: Tabulated) -> list[Row]:
    row = partial(found.row, figure="Fréchet distance")
    return [
        row("digits: one step beats two of the teacher", "distance", "TBCM, 1", "teacher, 2", "lower"),
        row("digits: a second step helps", "distance", "TBCM, 2", "TBCM, 1", "lower"),
        row("digits: better than sCM", "distance", "TBCM, 1", "sCM, 1", "lower", "FID 6.52, 7.46"),
        row("digits: in two steps too", "distance", "TBCM, 2", "sCM, 2", "lower"),
        found.row("digits: prompts are kept", "accuracy", "TBCM, 1", "sCM, 1", "higher", "CLIP 28.08, 27.74",
                  figure="accuracy, up to 2 points less", margin=-0.02),
        found.row("digits: nearer to the teacher's ends than sCM", "error", "TBCM, 1", "sCM, 1", "lower",
                  figure="root mean square to the ends of its flow"),
    ]  # fmt: skip
