"""`diffusion-jax train`: trains what a config describes, and goes on where it stopped."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import data, distributed, objectives, pictures, report, summary, training
from diffusion_jax.command import cache_compilations, leave, parse_config, run_command
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.config.trust import outside_packages
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.experiment import (
    Experiment,
    Sampling,
    check_training,
    compiled_sampler,
    decoded,
    fit,
    prepare,
    prepare_sampling,
)
from diffusion_jax.places import sampled_average


def sampled_params(experiment: Experiment, state: training.TrainState) -> Any:
    """The parameters that `sampling.ema` names: those of an average, or the raw ones."""
    name = sampled_average(experiment.config)
    if name and name not in state.ema:
        raise unknown("sampling.ema", name, state.ema)
    return state.ema[name] if name else state.params


def validation(experiment: Experiment, every: int) -> training.Callback:
    """Logs the held-out loss at eight equidistant times, with the averaged parameters."""
    if experiment.held_out is None:
        raise invalid("train.validate_every", every, "there is nothing to validate on: held_out is None")
    count = min(len(experiment.held_out), experiment.config.train.validation_examples)
    evaluate = jax.jit(objectives.validation_loss(experiment.validation))
    # Of each size, where the data have several: nearly always of the one that they have.
    groups = data.rows_of_each_size(experiment.held_out).values() or [np.arange(len(experiment.held_out))]
    parts = [rows for rows in (rows[rows < count] for rows in groups) if len(rows)]
    batches = [data.stacked_examples(experiment.held_out, rows) | {"index": rows.astype(np.int32)} for rows in parts]

    shapes = jax.eval_shape(experiment.init_params, jax.random.key(0))
    frozen = training.frozen_trees(experiment.validation, shapes, batches[0], experiment.mesh)

    def losses(state: training.TrainState) -> dict[str, Any]:
        whole = training.complete_state(state.objective_state, frozen)
        params = sampled_params(experiment, state)
        found = [evaluate(params, whole, batch, jax.random.key(0)) for batch in batches]
        shares = [len(rows) / count for rows in parts]
        return jax.tree.map(lambda *values: sum(share * value for share, value in zip(shares, values)), *found)

    def function(state: training.TrainState, writer: Any) -> dict[str, Any]:
        return {f"validation/{key}": value for key, value in losses(state).items()}

    return training.Callback(every, function, True, lambda state: jax.eval_shape(losses, state), name="validation")


def sample_pictures(experiment: Experiment, sampling: Sampling, every: int) -> training.Callback:
    """Draws a batch of samples with the averaged parameters and writes them as a picture."""
    group = experiment.config.sampling
    # As many as fill the picture, and divide over the mesh.
    count = -(-(group.picture_columns**2) // experiment.mesh.size) * experiment.mesh.size
    sampler = compiled_sampler(experiment, sampling)
    index = np.arange(count, dtype=np.int32)
    cond = sampling.conditions(index) if sampling.conditions else None

    def draw(params: Any) -> Any:
        return sampler(jax.random.key(experiment.config.seed), params, sampling.grid, cond, index).x

    def picture(x: Any) -> np.ndarray:
        return pictures.grid(np.asarray(x), group.picture_columns, zoom=group.picture_zoom or None)

    def function(state: training.TrainState, writer: Any) -> None:
        x = draw(sampled_params(experiment, state))
        writer.image(int(state.step), "samples", picture(decoded(experiment, x)))

    def check(state: training.TrainState) -> None:
        shape = jax.eval_shape(draw, sampled_params(experiment, state))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shape)
        if group.get("decoder"):
            # One of them, for decoding takes its time.
            zeros = decoded(experiment, zeros[:1])
        try:
            picture(zeros)
        except (InvalidInput, TypeError, ValueError, KeyError):
            shapes = jax.tree.map(lambda leaf: leaf.shape[1:], shape)
            raise invalid(
                "train.sample_every", every, f"no picture can be made of samples of shape {shapes}: leave it at None"
            ) from None

    return training.Callback(every, function, check=check, name="sample pictures")


def run(experiment: Experiment, workdir: Path | str | None, progress: bool = True, **more: Any) -> training.TrainState:
    """Trains `experiment` in `workdir`, resuming what is there; returns the last state. more: as in `fit`."""
    group = experiment.config.train
    callbacks = []
    if group.validate_every:
        callbacks.append(validation(experiment, group.validate_every))
    if group.sample_every:
        callbacks.append(sample_pictures(experiment, prepare_sampling(experiment), group.sample_every))
    return fit(experiment, workdir, callbacks, progress=progress, **more)


def show_run(workdir: Path) -> None:
    """Draws the losses of `metrics.jsonl` by step (`loss.png`) and by t (`loss_by_time.png`), and writes the report."""
    records = training.logging.read_log(workdir / "metrics.jsonl")
    curves = {}
    for name, field in (("training", "loss"), ("validation (8 times)", "validation/loss")):
        points = [(r["step"], r[field]) for r in records if isinstance(r.get(field), float)]
        if points:
            curves[name] = tuple(zip(*points))
    if curves:
        pictures.save_curves(
            workdir / "loss.png", curves, x_label="training step", y_label="loss", title="Loss by step"
        )
    by_time = training.by_time.latest_curves(records)
    if by_time:
        pictures.save_curves(
            workdir / "loss_by_time.png",
            by_time,
            x_label="t (0: clean data, 1: noise)",
            y_label="loss",
            title="Loss by noise level",
        )
    report.write_report(workdir)


def steps_to_trace(text: str) -> tuple[int, int]:
    """`100:110` as two numbers."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise invalid("--profile", text, "two steps are needed, such as 100:110")
    return int(first), int(last)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "train",
        description=__doc__,
        epilog="example: diffusion-jax train --config=digits_dit --config.train.steps=500 "
        "--workdir=out/digits. Started again with the same --workdir, it resumes; SIGTERM and SIGINT (Ctrl-C) save and "
        "leave. In a terminal it shows a bar, elsewhere a line for each record of the log. Exit codes: "
        "0 trained or stopped, 1 nothing finite to learn from, 2 refused, 3 halted by the system, 130 left at once.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, logs and pictures go there")
    parser.add_argument(
        "--log-to",
        metavar="NAMES",
        help=f"where the log goes, separated by commas: {', '.join(training.logging.WRITERS)} (default "
        "--config.train.log_to, jsonl,tensorboard); metrics.jsonl is always written",
    )
    parser.add_argument(
        "--profile",
        metavar="A:B",
        help="trace steps A to B with the profiler of JAX, e.g. 100:110, into WORKDIR/profile",
    )
    parser.add_argument("--no-progress", action="store_true", help="neither a bar nor lines while it trains")
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, config = parse_config(parser, argv)
    if arguments.log_to is not None:
        with config.train.unlocked(), config.train.ignore_type():
            config.train.log_to = tuple(arguments.log_to.split(","))
    training.logging.check_log_to(tuple(config.train.get("log_to", ())))
    profile = None if arguments.profile is None else steps_to_trace(arguments.profile)
    distributed.initialize()
    cache_compilations()
    experiment = prepare(config)
    check_training(experiment)
    rows = summary.training_rows(experiment, arguments.workdir)
    if jax.process_index() == 0:
        print(summary.as_block("Training", rows), flush=True)
    record = summary.RunRecord(arguments.workdir, rows, ["train", *argv])
    try:
        state = run(experiment, arguments.workdir, progress=not arguments.no_progress, writer=record, profile=profile)
    except training.Diverged as error:
        raise SystemExit(f"error: {error}") from None
    if jax.process_index() == 0:
        show_run(arguments.workdir)
        done = int(state.step)
        if done < config.train.steps:
            print(f"Stopped after step {done} of {config.train.steps}; the same command goes on from there.")
        elif done > config.train.steps:
            print(f"Nothing to do: the run is at step {done}, and {config.train.steps} were asked for.")
        else:
            skipped = int(state.skipped)
            but = f" ({skipped} of them were not finite and changed nothing)" if skipped else ""
            packages = ",".join(outside_packages(config))
            then = f"--workdir={shlex.quote(str(arguments.workdir))}" + (f" --trust={packages}" if packages else "")
            print(f"Trained {done} steps{but}. Report: {arguments.workdir / report.REPORT}")
            print(f"Samples: diffusion-jax sample {then}")
        traces = arguments.workdir / "profile"
        if profile is not None and traces.is_dir():
            print(f"Trace: {traces}; its perfetto_trace.json.gz is for https://ui.perfetto.dev")


if __name__ == "__main__":
    leave(run_command(main))
