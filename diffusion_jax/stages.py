"""Stages: what a study trains, collects or calibrates once and keeps, under a key of everything that it depends on.

The key of a stage is a hash of what it reads and of the keys of its parents:

    key = hash(what training reads of its config, the function that makes it, the keys of its parents)

Training reads the data, model, process, objective, optimiser, averages, seed, and of `train` what changes the result;
never sampling, metrics, pictures, logging or how devices are laid out. Of a constructor call only the arguments that
differ from the constructor's defaults count, so a constructor may gain an argument. The key cannot see a change of
code: a trained stage that is loaded proves itself by its loss on a batch of its data, which was stored with it.
"""

import ast
import hashlib
import inspect
import json
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import training
from diffusion_jax.cache import cache_folder
from diffusion_jax.config.parts import constructor
from diffusion_jax.distributed import init_sharded
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.experiment import Experiment, fit, prepare
from diffusion_jax.training.damage import set_aside
from diffusion_jax.typing import Params
from diffusion_jax.whole_files import written_whole

NOT_READ = {
    "": ("held_out", "mesh", "sampling", "metrics"),
    "train": (
        "log_every",
        "checkpoint_every",
        "keep",
        "snapshot_every",
        "max_skipped",
        "validate_every",
        "validation_examples",
        "sample_every",
        "log_to",
    ),
}
"""Entries of an experiment's config that training does not read, by the group in which they stand."""

PROBE = 16
"""Examples in the batch on which a trained stage proves itself."""

TOLERANCE = 1e-3
"""Relative difference of two losses of the same parameters, on other devices or by another release of jax."""

_PREPARE = prepare
"""What an experiment is prepared by where nothing else is asked for; `stage` has an argument of that name."""


class Stage(NamedTuple):
    """What was made. value: the parameters (their only average where the config keeps one), or what `make` returned.

    experiment: what was trained; None for what `make` returned. seconds: that it took, whenever that was (`spent`).
    loaded: whether it was found in the cache.
    """

    name: str
    key: str
    value: Any
    experiment: Experiment | None
    seconds: float
    loaded: bool

    @property
    def trained(self) -> Experiment:
        """The experiment of a stage that has one."""
        if self.experiment is None:
            raise InvalidInput(f"The stage {self.name!r} was collected, not trained: it has no experiment.")
        return self.experiment


def stage(
    name: str,
    config: Any,
    *parents: Stage,
    prepare: Callable[..., Experiment] = prepare,
    make: Callable[..., Mapping[str, Any]] | None = None,
    keep: bool = True,
) -> Stage:
    """What `config` and `parents` determine: made once, then read from `cache_folder()`; see the module.

    prepare: `(config, *parents) -> Experiment`, where the experiment is more than its config says: on data in a
        parent's latent space, from a parent's parameters. make: `(config, *parents) -> nested dicts of arrays`, for
        what is not the training of an experiment. Both are functions of a module, so that they read nothing else.
    keep: whether to look into the cache and to store there.

    An interrupted training goes on where it was. Raises InvalidInput for a function that could read more than its
    arguments, and for more than one average; KeyboardInterrupt when a training was stopped by a signal.
    """
    key = stage_key(config, *parents, prepare=prepare, make=make)
    folder = cache_folder() / "stages" / key
    experiment = prepare(config, *parents) if make is None else None
    if experiment is not None and len(experiment.config.ema) > 1:
        raise invalid("config.ema", list(experiment.config.ema), "a stage keeps one average, or none")
    if keep and (found := _read(name, key, folder, experiment)) is not None:
        return found
    print(f"{name}: {'trained' if make is None else 'made'} once and kept as {key}", file=sys.stderr, flush=True)
    begun = spent()
    if experiment is not None:
        value = _train(experiment, folder / "run" if keep else None)
    elif make is not None:
        value = make(config, *parents)
    made = Stage(name, key, value, experiment, spent() - begun, False)
    if keep:
        _write(made, folder, config, parents)
    return made


def spent() -> float:
    """Seconds so far: on CPUs of processor time, which other processes do not change, elsewhere of a clock."""
    return sum(os.times()[:4]) if jax.default_backend() == "cpu" else time.monotonic()


def stage_key(
    config: Any,
    *parents: Stage,
    prepare: Callable[..., Experiment] = prepare,
    make: Callable[..., Mapping[str, Any]] | None = None,
) -> str:
    """The key of `stage` of the same arguments: 16 hexadecimal digits."""
    function = prepare if make is None else make
    source = None if function is _PREPARE else _source(function)
    read = [relevant(config), source, [parent.key for parent in parents]]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]


def relevant(config: Any) -> Any:
    """What of `config` counts, as plain values: without `NOT_READ`, and without arguments left at their defaults."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    if isinstance(plain, Mapping) and "train" in plain:
        plain = {name: value for name, value in plain.items() if name not in NOT_READ[""]}
        plain["train"] = {name: value for name, value in plain["train"].items() if name not in NOT_READ["train"]}
    return _plain(plain)


def _plain(entry: Any) -> Any:
    if isinstance(entry, ConfigDict):
        entry = entry.to_dict()
    if isinstance(entry, Mapping):
        named = {str(name): _plain(value) for name, value in entry.items()}
        if "call" not in named:
            return named
        parameters = inspect.signature(constructor(named["call"])).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        return {
            name: value
            for name, value in named.items()
            if name not in defaults or defaults[name] is inspect.Parameter.empty or value != _plain(defaults[name])
        }
    if isinstance(entry, list | tuple | range):
        return [_plain(value) for value in entry]
    if isinstance(entry, int | float | np.number) and not isinstance(entry, bool):
        return float(entry)
    return entry if isinstance(entry, str | bool | None) else repr(entry)


def _source(function: Callable[..., Any]) -> str:
    """The code of a function, without its comments, docstring and layout."""
    # What checks types stands around it.
    function = inspect.unwrap(function)
    if not inspect.isfunction(function) or function.__closure__ or function.__name__ == "<lambda>":
        raise invalid(
            "the function of a stage", function, "a function of a module was expected, which closes over nothing"
        )
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return f"{function.__module__}.{function.__qualname__}: {ast.dump(tree)}"


def _train(experiment: Experiment, workdir: Path | None) -> Params:
    config = experiment.config
    if config.train.steps == 0:
        return init_sharded(experiment.init_params, jax.random.key(config.seed), mesh=experiment.mesh)
    state = fit(experiment, workdir, progress=workdir is not None and sys.stderr.isatty())
    if int(state.step) < config.train.steps:
        # After SIGTERM; the next run goes on from here.
        raise KeyboardInterrupt
    return next(iter(state.ema.values())) if config.ema else state.params


def probe_loss(experiment: Experiment, params: Params) -> float:
    """The loss on the first examples of the data, the same in every process."""
    batch = experiment.example(min(PROBE, len(experiment.source)))
    objective, key = experiment.validation, jax.random.key(0)

    @jax.jit
    def loss(params, batch, frozen):
        state = training.complete_state(objective.init(key, params, batch), frozen)
        return objective.loss(params, state, batch, key)[0].mean()

    return float(loss(params, batch, training.frozen_trees(objective, params, batch)))


def _write(made: Stage, folder: Path, config: Any, parents: tuple[Stage, ...]) -> None:
    loss = None if made.experiment is None else probe_loss(made.experiment, made.value)
    if (folder / "value").exists():
        # Of one that was killed before its record was written.
        set_aside(folder / "value")
    training.save_params(folder / "value", made.value)
    record = {"name": made.name, "seconds": made.seconds, "loss": loss, "config": relevant(config)}
    record["parents"] = {parent.name: parent.key for parent in parents}
    text = json.dumps(record, indent=2)
    # Written last: a stage without its record was not finished.
    with written_whole(folder / "stage.json") as draft:
        draft.write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(folder / "run", ignore_errors=True)


def _read(name: str, key: str, folder: Path, experiment: Experiment | None) -> Stage | None:
    """The stage that is kept in `folder`, if it is whole and still what it was; what is not is set aside.

    Raises InvalidInput where it cannot be read now, which says nothing of what is there.
    """
    if not (folder / "stage.json").is_file():
        return None
    try:
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        value = training.load_params(folder / "value", mesh=experiment and experiment.mesh)
        if experiment is not None:
            loss = probe_loss(experiment, value)
            if not np.isclose(loss, record["loss"], rtol=TOLERANCE, atol=0):
                raise ValueError(f"its loss on a batch of its data is {loss:.6g}, and was {record['loss']:.6g}")
        return Stage(name, key, value, experiment, record["seconds"], True)
    except OSError as problem:
        raise InvalidInput(
            f"The stage {name!r} in {folder} cannot be read now ({problem}); nothing was changed."
        ) from None
    except (ValueError, KeyError, TypeError) as problem:
        aside = set_aside(folder)
        told = f"The stage {name!r} cannot be used ({problem}); it is made anew, and what was there is kept as {aside}."
        warnings.warn(told, stacklevel=3)
        return None
