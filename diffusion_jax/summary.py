"""What a command says before it begins: what is trained, sampled or measured, on what, and where it is kept.

A summary is a dict of rows, so that commands add their own; `as_block` makes a text of it. Nothing is computed for it.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.costs import count_bytes
from diffusion_jax.experiment import Experiment, abstractly
from diffusion_jax.places import sampled_average
from diffusion_jax.shards import write_whole
from diffusion_jax.typing import Number

PACKAGES = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "numpy")
"""Whose versions are kept with a run."""

RUN = "run.json"
"""What was trained and on what, in the workdir."""


def as_block(title: str, rows: Mapping[str, str]) -> str:
    """A title and its rows, aligned."""
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def count_of(number: int, noun: str) -> str:
    """`1 example`, `1,438 examples`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def bytes_in_words(number: Number) -> str:
    """Bytes as `1.9 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def shape_in_words(shape: Any) -> str:
    """`8 x 8 x 1`, `2 numbers`; of joint data each by its name."""
    if isinstance(shape, Mapping):
        return ", ".join(f"{name} {shape_in_words(one)}" for name, one in shape.items())
    return " x ".join(map(str, shape)) if len(shape) > 1 else count_of(shape[0] if shape else 1, "number")


def parameters_in_words(params: Any) -> str:
    """How many parameters a tree of arrays (or of shapes) has, and their size."""
    leaves = jax.tree.leaves(params)
    kinds = " and ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    number = count_of(sum(leaf.size for leaf in leaves), "parameter")
    return f"{number} ({bytes_in_words(count_bytes(params))}, {kinds or 'none'})"


def on_what() -> str:
    """What this process computes on, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU core" + "s" * (cores != 1)


def devices_in_words(mesh: Any) -> str:
    """What a mesh computes on, and the axes along which it splits."""
    axes = [f"{axis}={length}" for axis, length in mesh.shape.items() if length > 1]
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return on_what() + processes + (f"; mesh {', '.join(axes)}" if axes else "")


def source_in_words(source: Any, shape: Any = None) -> str:
    """Examples, their shape, and classes where the source knows them."""
    told = count_of(len(source), "example")
    sizes = data.rows_of_each_size(source)
    if sizes:
        told += f" of {len(sizes)} sizes ({', '.join(shape_in_words(size) for size in sizes)})"
    elif shape is not None:
        told += f" of {shape_in_words(shape)}"
    classes = getattr(source, "num_classes", None)
    return told + (f", {count_of(classes, 'class')}" if classes else "")


def experiment_rows(experiment: Experiment, params: Any = None) -> dict[str, str]:
    """Model and data of an experiment. params: what is trained, or its shapes; those of the network by default."""
    config = experiment.config
    if params is None:
        params = abstractly("config.model on the data", experiment.init_params, jax.random.key(0))
    model = config.get("model")
    computes = model.get("dtype") if isinstance(model, ConfigDict) else None
    precision = f", computes in {computes}" if isinstance(computes, str) else ""
    rows = {
        "model": f"{_called(model)}{parameters_in_words(params)}{precision}",
        "process": _name(config.get("process")),
        "data": _called(config.get("data")) + source_in_words(experiment.source, experiment.shape),
    }
    return {name: text for name, text in rows.items() if text}


def training_rows(experiment: Experiment, workdir: Path | str | None, params: Any = None) -> dict[str, str]:
    """What `train` is about to do: `experiment_rows`, held-out data, batch, devices, and what is there already."""
    group = experiment.config.train
    passes = group.steps * group.batch_size / len(experiment.source)
    rows = experiment_rows(experiment, params)
    if experiment.held_out is not None:
        rows["held out"] = _called(experiment.config.get("held_out")) + source_in_words(experiment.held_out)
    accumulated = f", in {group.accumulate} parts" if group.accumulate > 1 else ""
    rows["batch"] = f"{count_of(group.batch_size, 'example')}{accumulated}"
    rows["steps"] = f"{group.steps:,}, that is {passes:,.{0 if passes >= 10 else 1}f} times through the data"
    rows["devices"] = devices_in_words(experiment.mesh)
    if workdir is not None:
        rows["workdir"] = f"{workdir}: {_progress_of(workdir, group.steps)}"
    return rows


def sampling_rows(experiment: Experiment, params: Any, number: int, sampler: str) -> dict[str, str]:
    """What `sample` is about to do: by which parameters and which sampler, how many samples, and on what."""
    group = experiment.config.sampling
    rows = experiment_rows(experiment, params)
    average = sampled_average(experiment.config)
    averaged = f", the average {average!r}" if average else ""
    changed = ", ".join(group.get("transformations", {}))
    return {
        "model": rows["model"] + averaged,
        **{name: text for name, text in rows.items() if name == "process"},
        "sampler": sampler + (f", with {changed}" if changed else ""),
        "samples": f"{number:,} of {shape_in_words(experiment.shape)}, {group.batch_size:,} at once",
        "devices": devices_in_words(experiment.mesh),
    }


def _progress_of(workdir: Path | str, steps: int) -> str:
    saved = training.saved_steps(workdir)
    if not saved:
        return "a new run"
    if saved[-1] >= steps:
        return f"holds step {saved[-1]:,} of {steps:,}, nothing is left to do"
    return f"goes on at step {saved[-1]:,} of {steps:,}"


def _name(entry: Any) -> str:
    """The call of an entry of a config; "" where it has none."""
    return (entry.get("call") if hasattr(entry, "get") else None) or ""


def _called(entry: Any) -> str:
    return f"{name}: " if (name := _name(entry)) else ""


def versions_and_devices() -> dict[str, str]:
    """Versions, devices and system of this process, as plain values."""
    return {
        "devices": on_what(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class RunRecord:
    """A writer of `training.train` that keeps `run.json` in the workdir: a summary, the environment, the command line.

    It is written with the first record of the log, so a run that is refused changes nothing.
    """

    def __init__(self, workdir: Path | str, rows: Mapping[str, str], command: Sequence[str]):
        self._path = Path(workdir) / RUN
        started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self._fields: Any = {
            "started": started,
            "command": shlex.join(["diffusion-jax", *command]),
            "summary": dict(rows),
            "environment": versions_and_devices(),
        }

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Figures are for other writers; the first ones say that the run goes on."""
        if self._fields is not None and jax.process_index() == 0:
            write_whole(self._path, json.dumps(self._fields, indent=2) + "\n")
        self._fields = None

    def image(self, step: int, name: str, image: Any) -> None:
        """Pictures are for other writers."""

    def close(self) -> None:
        """The file is whole as soon as it is there."""
