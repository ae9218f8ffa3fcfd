"""Steps against quality: one guided teacher by its best solvers, and a student of it by every method.

The teacher is a class-conditional transformer on digits (or on the garments of Fashion-MNIST, where they are installed,
in 16 x 16 pixels), a linear flow, guided. Every student begins as its copy and
is trained for the same number of updates of the same batch size (progressive distillation shares them among its
rounds); what an update costs differs, and is told. All draw from the same noise, for the same classes. Distances,
precision, recall and the class are of a classifier that nothing was trained by.

    python -m benchmarks.students             # writes results/students_digits.json, a picture, a table of the page
    python -m benchmarks.students --data=fashion_mnist
    python -m benchmarks.students --smoke     # a few updates; its figures mean nothing

Rates, numbers of updates and the scale of guidance were chosen on seed 100.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.report import RESULTS, environment
from diffusion_jax import data, metrics, objectives, pictures, solvers, stages
from diffusion_jax.baselines import CLASSES, NULL, digit_transformer, tiny_digit_transformer
from diffusion_jax.config import call
from diffusion_jax.denoisers import denoiser, guided
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.metrics import manifold
from diffusion_jax.sampling import make_sampler
from diffusion_jax.stages import Stage
from diffusion_jax.students import METHODS, Student, Teacher, grid_of, student

PAGE, END = Path("docs/distil.md"), "<!-- end of table -->"
WORLDS = {"digits": {}, "fashion_mnist": {"size": 16}}
"""The data sets, and how they are read; each picture is 16 patches."""

STEPS, TEACHER_STEPS, SCALE = (1, 2, 4), (1, 2, 4, 8, 50), 1.25
SEEDS, FIRST_ROUND = (10, 11, 12), 16
SOLVERS = {"DDIM": solvers.ddim(), "DPM-Solver++ 2M": solvers.dpm_solver_pp(2)}
COLUMNS = ("distance", "precision", "recall", "accuracy")
RATES = {"consistency": 1e-3, "continuous_consistency": 3e-4, "kernel_matching": 3e-4, "mean_flow": 1e-3}
"""Peak rates of learning where they are not `RATE`."""

RATE = 5e-4


Figures = dict[str, dict[str, list[float]]]
"""By arm and column: one value a seed."""


class Sizes(NamedTuple):
    """updates: of each student. samples: of each arm and seed. runs: of the teacher for reflow. time,
    discretisation: what the teacher is told, and the steps whose neighbours consistency compares."""

    updates: int = 600
    samples: int = 500
    runs: int = 4096
    world: str = "digits"
    smoke: bool = False
    time: str = "t"
    discretisation: int = 18


def teacher_config(sizes: Sizes) -> ConfigDict:
    """The teacher: `baselines.digit_transformer`, half as deep, on the linear flow, whose time it is told as it is.

    Told 1000 t, as usual, its answers are rough in t: what learns from their derivative by t is then worse, above all
    in one step (seed 100: mean flows at 7.8 instead of 1.5, continuous consistency at 5.9 instead of 2.8).
    """
    config = tiny_digit_transformer(2) if sizes.smoke else digit_transformer(2000, depth=4)
    if sizes.world != "digits":
        config.model.preset = "S/4"
        for part, split in (("data", "train"), ("held_out", "test")):
            config[part] = call(f"data.{sizes.world}", split=split, **WORLDS[sizes.world])
    config.process = call("processes.rectified_flow", time=sizes.time)
    return config


def student_config(method: str, sizes: Sizes, seed: int, updates: int, **settings: Any) -> ConfigDict:
    """How a student is trained. settings: of the method."""
    config = teacher_config(sizes)
    config.train.steps, config.seed, config.method, config.settings = updates, seed, method, settings
    peak = RATES.get(method, RATE)
    rate = call(
        "training.optimizers.cosine", peak=peak, total_steps=max(updates, 2), warmup_steps=min(50, updates // 2)
    )
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.0)
    if method == "distribution_matching":
        parts = {"student": config.optimizer, "fake": config.optimizer}
        config.optimizer = call("training.optimizers.alternating", parts=parts, every={"student": 5})
    config.ema = {} if sizes.smoke else {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def taught_by(base: Stage, guide: bool = True) -> Teacher:
    """A trained stage as a teacher."""
    network, process = base.trained.network, base.trained.process
    plain = denoiser(network, process)
    return Teacher(network, process, base.value, guided(plain, SCALE, null=NULL) if guide else plain)


def made_by(config: ConfigDict, base: Stage, guide: bool) -> Student:
    """The student that a config describes, of `base`."""
    settings = dict(config.settings)
    source = base.trained.source
    if config.method in ("mean_flow", "shortcut"):
        settings["example"] = base.trained.example(2)
    if config.method == "kernel_matching":
        kernel = objectives.gaussian_kernel((0.5, 1.0, 2.0))
        space = objectives.convolution_space(kernel, source.shape, channels=(16, 32))
        space = objectives.standardised(space, np.asarray(source.x0))
        size = float(np.sqrt(len(objectives.banked(space, source.x0[:64]).bank[0])))
        space = space._replace(kernel=objectives.gaussian_kernel((0.5 * size, size, 2 * size)))
        settings["spaces"] = (objectives.paired(space, CLASSES, size),)
    return student(config.method, taught_by(base, guide), **settings)


def of_guided(config: ConfigDict, base: Stage) -> Experiment:
    """The training of a student of the guided teacher."""
    made = made_by(config, base, True)
    return prepare(config, network=made.network, objective=made.objective, begin=made.begin)


def of_student(config: ConfigDict, base: Stage) -> Experiment:
    """The training of a student of a student, which needs no guidance."""
    made = made_by(config, base, False)
    return prepare(config, network=made.network, objective=made.objective, begin=made.begin)


def runs_of_teacher(config: ConfigDict, base: Stage) -> data.Collection:
    """Where runs of the guided teacher begin and end."""
    teacher = taught_by(base)
    draw = data.trajectories(
        jax.random.key(config.seed),
        teacher.denoiser,
        teacher.params,
        SOLVERS["DPM-Solver++ 2M"],
        grid_of(teacher.process)(config.steps),
        shape=base.trained.shape,
        conditions=data.cycled_labels(CLASSES),
    )
    return data.Collection(draw, config.count, batch_size=min(256, config.count))


def on_runs(config: ConfigDict, runs: Stage, base: Stage) -> Experiment:
    """The training of a student on runs of its teacher."""
    made = made_by(config, base, True)
    return prepare(config, source=runs.value, network=made.network, objective=made.objective, begin=made.begin)


class Trained(NamedTuple):
    """params: as they are sampled. seconds: of the training, and of what it needed."""

    params: Any
    seconds: float


class Method(NamedTuple):
    """The students of one method. made: by number of steps; the same one where it is trained for all numbers.

    train: (seed) -> what was trained, by number of steps.
    """

    made: dict[int, Student]
    train: Any


def method_of(name: str, base: Stage, sizes: Sizes) -> Method:
    """A method, whose parts are made once for all seeds, so that they compile once."""

    def stage(what, config, *parents, **how):
        return stages.stage(what, config, *parents, keep=not sizes.smoke, **how)

    def config_of(seed, updates=sizes.updates, **settings):
        return student_config(name, sizes, seed, updates, **settings)

    if name == "progressive":
        counts = [FIRST_ROUND >> i for i in range(FIRST_ROUND.bit_length())]

        def halved(seed):
            found, before, seconds = {}, base, 0.0
            for number, steps in enumerate(counts):
                config = config_of(seed, max(1, sizes.updates // len(counts)), steps=steps)
                how = of_student if number else of_guided
                before = stage(f"progressive {seed}, {steps}", config, before, prepare=how)
                seconds += before.seconds
                found[steps] = Trained(before.value, seconds)
            return {steps: found[steps] for steps in STEPS}

        # How it is sampled depends on the number of steps alone.
        return Method(dict.fromkeys(STEPS, made_by(config_of(0, steps=1), base, True)), halved)

    if name == "reflow":
        made = made_by(config_of(0), base, True)

        def straightened(seed):
            runs = ConfigDict({"seed": seed, "steps": 2 if sizes.smoke else 25, "count": sizes.runs})
            collected = stage(f"runs {seed}", runs, base, collect=runs_of_teacher)
            done = stage(f"reflow {seed}", config_of(seed), collected, base, prepare=on_runs)
            return dict.fromkeys(STEPS, Trained(done.value, collected.seconds + done.seconds))

        return Method(dict.fromkeys(STEPS, made), straightened)

    fixed = name in ("distribution_matching", "kernel_matching")
    own = {"discretisation": sizes.discretisation} if name == "consistency" else {}
    each: list[dict[str, Any]] = [{"steps": steps} for steps in STEPS] if fixed else [own]
    made = [made_by(config_of(0, **settings), base, True) for settings in each]

    def trained(seed):
        done = [stage(f"{name} {seed}", config_of(seed, **settings), base, prepare=of_guided) for settings in each]
        found = [Trained(one.sampled(own.value), own.seconds) for one, own in zip(made, done, strict=True)]
        return dict(zip(STEPS, found * (len(STEPS) // len(found)), strict=True))

    return Method(dict(zip(STEPS, made * (len(STEPS) // len(made)), strict=True)), trained)


def compare(sizes: Sizes, methods: Sequence[str], seeds: Sequence[int]) -> Figures:
    """The figures of every arm: by name and column, one value a seed."""
    base = stages.stage("teacher of students", teacher_config(sizes), keep=not sizes.smoke)
    steps = {"steps": 10} if sizes.smoke else {}
    judge = metrics.trained_judge(base.trained.source, base.trained.held_out, **steps)
    label = np.arange(sizes.samples, dtype=np.int32) % CLASSES
    figures: Figures = {}

    def measure(name, sampler, params, grid, seed, seconds=0.0):
        found = sampler(jax.random.key(seed), params, grid, {"label": label})
        features, said = judge.features(found.x), metrics.judged(judge, found.x, label)
        near = manifold(judge.held_out, features, k=3)
        row = {"distance": said.distance, "precision": near.precision, "recall": near.recall}
        row |= {"accuracy": said.accuracy, "training": seconds, "evaluations": float(found.cost.evaluations)}
        for column, value in row.items():
            figures.setdefault(name, {}).setdefault(column, []).append(float(value))

    teacher = taught_by(base)
    for name, solver in SOLVERS.items():
        sampler = make_sampler(teacher.denoiser, solver, shape=base.trained.shape)
        for steps in TEACHER_STEPS:
            for seed in seeds:
                grid = grid_of(teacher.process)(steps)
                measure(f"teacher, {name}, {steps} steps", sampler, teacher.params, grid, seed)
    for name in methods:
        method = method_of(name, base, sizes)
        one = method.made[STEPS[0]]
        sampler = make_sampler(one.denoiser, one.solver, shape=base.trained.shape)
        for seed in seeds:
            for steps, trained in method.train(seed).items():
                grid = method.made[steps].grid(steps)
                measure(f"{name}, {steps} steps", sampler, trained.params, grid, seed, trained.seconds)
    return figures


def as_table(figures: Figures) -> list[str]:
    """Lines of Markdown: one row an arm, means and half the spread of the seeds."""
    lines = [
        "| | steps | network evaluations | Fréchet distance | precision | recall | right class | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        who, _, steps = name.rpartition(", ")
        told = [f"{np.mean(row[c]):.3g} ± {np.ptp(row[c]) / 2:.2g}" for c in COLUMNS]
        cost = f"{np.mean(row['training']):.0f}" if any(row["training"]) else ""
        evaluations = f"{np.mean(row['evaluations']):.0f}"
        lines.append(f"| {who.replace('_', ' ')} | {steps.split()[0]} | {evaluations} | {' | '.join(told)} | {cost} |")
    return lines


def draw(figures: Figures, path: Path, world: str) -> None:
    """Fréchet distance by network evaluations, one curve a method."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, row in figures.items():
        xs, ys = curves.setdefault(name.rpartition(", ")[0].replace("_", " "), ([], []))
        xs.append(np.mean(row["evaluations"]))
        ys.append(np.mean(row["distance"]))
    pictures.save_curves(
        path, curves, x_label="network evaluations of a sample (a guided step has two)", y_label="Fréchet distance",
        doublings=True, title=f"Steps against quality: a guided teacher of {world.replace('_', ' ')} and its students",
    )  # fmt: skip


def put_into_page(lines: Sequence[str], world: str, page: Path = PAGE) -> None:
    """Replaces the table of the page."""
    text, begin = page.read_text(encoding="utf-8"), f"<!-- table: {command(world)} -->"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
    assert found.search(text), f"{page} has no place for the table"
    made = "\n".join((begin, *lines, END))
    page.write_text(found.sub(lambda _: made, text), encoding="utf-8")


def command(world: str) -> str:
    """What makes the table of a data set."""
    return f"python -m benchmarks.students --data={world}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates: only to see that everything runs")
    parser.add_argument("--data", default="digits", choices=WORLDS, help="of the teacher (default: digits)")
    parser.add_argument("--time", default="t", help="what the teacher is told of its time: t (default), or 1000t")
    parser.add_argument("--discretisation", type=int, default=18, help="steps of consistency (default: 18)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of training and noise (default: 10,11,12)")
    arguments = parser.parse_args(argv)
    world = arguments.data
    sizes = Sizes(2, 30, 64, world, True) if arguments.smoke else Sizes(world=world)
    sizes = sizes._replace(time=arguments.time, discretisation=arguments.discretisation)
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    begun = stages.spent()
    figures = compare(sizes, methods, seeds)
    lines = as_table(figures)
    print("\n".join(lines))
    usual = (sizes.time, sizes.discretisation) == (Sizes().time, Sizes().discretisation)
    if arguments.smoke or methods != list(METHODS) or seeds != list(SEEDS) or not usual:
        print("Nothing is written but of all methods and seeds, with the usual settings.")
        return 0
    told = {
        "command": command(world), "seconds": round(stages.spent() - begun, 1), "seeds": seeds,
        "tuned_on": [100], "environment": environment(jax.devices()[0].device_kind), "figures": figures,
    }  # fmt: skip
    (RESULTS / f"students_{world}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    draw(figures, Path(f"docs/images/students_{world}.png"), world)
    put_into_page(lines, world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
