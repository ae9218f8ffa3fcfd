"""Steps against quality: one guided teacher by its best solvers, and a student of it by every method.

The teacher is a class-conditional transformer on digits, a linear flow, guided. Every student begins as its copy and
is trained for the same number of updates of the same batch size (progressive distillation shares them among its
rounds); what an update costs differs, and is told. All draw from the same noise, for the same classes. Distances,
precision, recall and the class are of a classifier that nothing was trained by.

    python -m benchmarks.students             # writes results/students.json, docs/distil.md (the table) and its picture
    python -m benchmarks.students --smoke     # a few updates; its figures mean nothing

Rates, numbers of updates and the scale of guidance were chosen on seed 100.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
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
from diffusion_jax.recipes.study import Arm, Drawn, table
from diffusion_jax.stages import Stage
from diffusion_jax.students import METHODS, Student, Teacher, grid_of, student

PAGE, PICTURE = Path("docs/distil.md"), Path("docs/images/students.png")
BEGIN, END = "<!-- table: python -m benchmarks.students -->", "<!-- end of table -->"
STEPS, TEACHER_STEPS, SCALE = (1, 2, 4), (1, 2, 4, 8, 50), 2.0
SEEDS, FIRST_ROUND = (10, 11, 12), 16
SOLVERS = {"DDIM": solvers.ddim(), "DPM-Solver++ 2M": solvers.dpm_solver_pp(2)}
COLUMNS = ("distance", "precision", "recall", "accuracy")
RATES = {"continuous_consistency": 3e-4, "distribution_matching": 3e-4, "kernel_matching": 3e-4}
"""Peak rates of learning where they are not `RATE`."""

RATE = 5e-4


class Sizes(NamedTuple):
    """updates: of each student. samples: of each arm and seed. runs: of the teacher for reflow."""

    updates: int = 600
    samples: int = 500
    runs: int = 4096
    smoke: bool = False


def teacher_config(sizes: Sizes) -> ConfigDict:
    """The teacher: `baselines.digit_transformer`, half as deep, on the linear flow."""
    config = tiny_digit_transformer(2) if sizes.smoke else digit_transformer(2000, depth=4)
    config.process = call("processes.rectified_flow")
    return config


def student_config(method: str, sizes: Sizes, seed: int, updates: int, **settings: Any) -> ConfigDict:
    """How a student is trained. settings: of the method."""
    config = teacher_config(sizes)
    config.train.steps, config.seed, config.method, config.settings = updates, seed, method, settings
    peak = RATES.get(method, RATE)
    rate = call("training.optimizers.cosine", peak=peak, total_steps=max(updates, 2), warmup_steps=min(50, updates // 2))
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
        settings["spaces"] = (space._replace(condition=objectives.one_hot(CLASSES, size)),)
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
    """A student that was trained, for one number of steps or for all. seconds: of its training, and what it needed."""

    student: Student
    params: Any
    seconds: float


def train(method: str, base: Stage, sizes: Sizes, seed: int) -> dict[int, Trained]:
    """The students of a method, by number of steps: one for all of them, or one each."""
    keep = not sizes.smoke

    def stage(name, config, *parents, **how):
        return stages.stage(name, config, *parents, keep=keep, **how)

    def single(**settings):
        config = student_config(method, sizes, seed, sizes.updates, **settings)
        done = stage(f"{method} {seed}", config, base, prepare=of_guided)
        made = made_by(config, base, True)
        return Trained(made, made.sampled(done.value), done.seconds)

    if method == "progressive":
        found, before, seconds = {}, base, 0.0
        rounds = [FIRST_ROUND >> i for i in range(FIRST_ROUND.bit_length())]
        for number, steps in enumerate(rounds):
            config = student_config(method, sizes, seed, max(1, sizes.updates // len(rounds)), steps=steps)
            done = stage(f"progressive {seed}, {steps}", config, before, prepare=of_student if number else of_guided)
            made = made_by(config, before, not number)
            before, seconds = done, seconds + done.seconds
            found[steps] = Trained(made, done.value, seconds)
        return {steps: found[steps] for steps in STEPS}
    if method == "reflow":
        runs = ConfigDict({"seed": seed, "steps": 2 if sizes.smoke else 25, "count": sizes.runs})
        collected = stage(f"runs {seed}", runs, base, collect=runs_of_teacher)
        config = student_config(method, sizes, seed, sizes.updates)
        done = stage(f"reflow {seed}", config, collected, base, prepare=on_runs)
        made = made_by(config, base, True)
        return dict.fromkeys(STEPS, Trained(made, done.value, collected.seconds + done.seconds))
    if method == "kernel_matching":
        return {steps: single(steps=steps) for steps in STEPS}
    return dict.fromkeys(STEPS, single())


def compare(sizes: Sizes, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """The figures of every arm: by name and column, one value a seed."""
    base = stages.stage("teacher of students", teacher_config(sizes), keep=not sizes.smoke)
    judge = metrics.feature_network("digits", steps=10) if sizes.smoke else metrics.feature_network("digits")
    cond = {"label": np.arange(sizes.samples, dtype=np.int32) % CLASSES}
    teacher, seconds = taught_by(base), {}

    def measures(drawn: Drawn) -> Mapping[str, float]:
        near = manifold(judge.held_out, judge.features(drawn.x), k=3)
        said = metrics.judged(judge, drawn.x, cond["label"])
        row = {"distance": said.distance, "accuracy": said.accuracy, **near._asdict()}
        return row | {"training": seconds.get((drawn.arm.rpartition(",")[0], drawn.seed), 0.0)}

    def arms(seed: int) -> dict[str, Arm]:
        grid = grid_of(teacher.process)
        found = {
            f"teacher, {name}, {steps} steps": Arm(teacher.denoiser, teacher.params, solver, grid(steps), cond)
            for name, solver in SOLVERS.items()
            for steps in TEACHER_STEPS
        }
        for method in methods:
            for steps, one in train(method, base, sizes, seed).items():
                made = one.student
                seconds[method, seed] = one.seconds
                found[f"{method}, {steps} steps"] = Arm(made.denoiser, one.params, made.solver, made.grid(steps), cond)
        return found

    return table(arms, seeds, measures, shape=base.trained.shape, count=sizes.samples).figures


def as_table(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
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


def draw(figures: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Fréchet distance by network evaluations, one curve a method."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, row in figures.items():
        xs, ys = curves.setdefault(name.rpartition(", ")[0].replace("_", " "), ([], []))
        xs.append(np.mean(row["evaluations"]))
        ys.append(np.mean(row["distance"]))
    pictures.save_curves(
        path, curves, x_label="network evaluations of a sample (a guided step has two)", y_label="Fréchet distance",
        title="Steps against quality: a guided teacher and its students",
    )  # fmt: skip


def put_into_page(lines: Sequence[str], page: Path = PAGE) -> None:
    """Replaces the table of the page."""
    text = page.read_text(encoding="utf-8")
    found = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert found.search(text), f"{page} has no place for the table"
    made = "\n".join((BEGIN, *lines, END))
    page.write_text(found.sub(lambda _: made, text), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates: only to see that everything runs")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of training and noise (default: 10,11,12)")
    arguments = parser.parse_args(argv)
    sizes = Sizes(2, 30, 64, True) if arguments.smoke else Sizes()
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    begun = stages.spent()
    figures = compare(sizes, methods, seeds)
    lines = as_table(figures)
    print("\n".join(lines))
    if arguments.smoke or methods != list(METHODS) or seeds != list(SEEDS):
        print("Nothing is written but of all methods and seeds.")
        return 0
    told = {
        "command": "python -m benchmarks.students", "seconds": round(stages.spent() - begun, 1), "seeds": seeds,
        "tuned_on": [100], "environment": environment(jax.devices()[0].device_kind), "figures": figures,
    }  # fmt: skip
    (RESULTS / "students.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    draw(figures, PICTURE)
    put_into_page(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
