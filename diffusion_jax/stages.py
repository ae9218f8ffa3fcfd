"""Stages: what is trained, collected or calibrated once and kept, under a key of everything that it depends on.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.cache import cache_folder
from diffusion_jax.config.parts import constructor
from diffusion_jax.data.collected import Collection
from diffusion_jax.data.collected import collect as gather
from diffusion_jax.data.latent_shards import DESCRIPTION, Shards
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
    """What was made. value: the parameters (their only average where the config keeps one), what `make` returned, or
    the source of what was collected.

    experiment: what was trained; None otherwise. seconds: that it took, whenever that was (`spent`).
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
            raise InvalidInput(f"The stage {self.name!r} was not trained: it has no experiment.")
        return self.experiment


def stage(
    name: str,
    config: Any,
    *parents: Stage,
    prepare: Callable[..., Experiment] = prepare,
    make: Callable[..., Mapping[str, Any]] | None = None,
    collect: Callable[..., Collection] | None = None,
    keep: bool = True,
) -> Stage:
    """What `config` and `parents` determine: made once, then read from `cache_folder()`; see the module.

    prepare: `(config, *parents) -> Experiment`, where the experiment is more than its config says: on data in a
        parent's latent space, from a parent's parameters. make: `(config, *parents) -> nested dicts of arrays`, for
        what is not the training of an experiment. collect: `(config, *parents) -> data.Collection`, for examples that a
        model makes, which stay on disk. All three are functions of a module, so that they read nothing else.
    keep: whether to look into the cache and to store there.

    An interrupted training or collection goes on where it was. Raises InvalidInput for a function that could read more
    than its arguments, for both `make` and `collect`, and for more than one average; KeyboardInterrupt when a training
    was stopped by a signal.
    """
    key = stage_key(config, *parents, prepare=prepare, make=make, collect=collect)
    folder = cache_folder() / "stages" / key
    experiment = prepare(config, *parents) if make is None and collect is None else None
    if experiment is not None and len(experiment.config.ema) > 1:
        raise invalid("config.ema", list(experiment.config.ema), "a stage keeps one average, or none")
    if keep and (found := _read(name, key, folder, experiment, collect is not None)) is not None:
        return found
    how = "made" if make is not None else "collected" if collect is not None else "trained"
    print(f"{name}: {how} once and kept as {key}", file=sys.stderr, flush=True)
    begun = spent()
    if experiment is not None:
        value = _train(experiment, folder / "run" if keep else None)
    elif collect is not None:
        value = gather(collect(config, *parents), folder / "value" if keep else None, {"stage": key})
    elif make is not None:
        value = make(config, *parents)
    made = Stage(name, key, value, experiment, spent() - begun, False)
    if keep:
        _write(made, folder, config, parents)
    return made


def rounds(
    name: str,
    first: Stage,
    settings: Sequence[Any],
    *,
    collect: Callable[..., Collection],
    prepare: Callable[..., Experiment],
    label: Callable[..., Collection] | None = None,
    ask: Callable[..., Stage] = stage,
) -> list[Stage]:
    """Collect, label, learn, once for each of `settings`: the model of a round makes the examples of the next one.

    first: the trained stage that makes the examples of the first round. settings: for each round a config with the
        entries `collect` and `learn`, and `label` where there is one. Each step is a stage with a key of its own, so
        rounds that were done are found again, and a process that was killed goes on within the round that it was in.
    collect: `(config.collect, model) -> Collection`. label: `(config.label, collected, model) -> Collection`, such as
        `data.labelled` by a reward. prepare: `(config.learn, collected, model) -> Experiment`, on what was collected
        (or labelled), which usually begins with the model's parameters. ask: `stage`, or `Study.stage`.

    Returns the trained stage of every round. Raises InvalidInput for settings without one of these entries.
    """
    steps = ("collect", "learn", *(() if label is None else ("label",)))
    for number, config in enumerate(settings):
        if lacking := [step for step in steps if step not in config]:
            raise invalid(f"settings[{number}]", sorted(config), f"the entries {lacking} are missing")
    model, done = first, []
    for number, config in enumerate(settings):
        examples = ask(f"{name} {number}: examples", config["collect"], model, collect=collect)
        if label is not None:
            examples = ask(f"{name} {number}: labels", config["label"], examples, model, collect=label)
        model = ask(f"{name} {number}", config["learn"], examples, model, prepare=prepare)
        done.append(model)
    return done


def spent() -> float:
    """Seconds so far: on CPUs of processor time, which other processes do not change, elsewhere of a clock."""
    return sum(os.times()[:4]) if jax.default_backend() == "cpu" else time.monotonic()


def stage_key(
    config: Any,
    *parents: Stage,
    prepare: Callable[..., Experiment] = prepare,
    make: Callable[..., Mapping[str, Any]] | None = None,
    collect: Callable[..., Collection] | None = None,
) -> str:
    """The key of `stage` of the same arguments: 16 hexadecimal digits."""
    if make is not None and collect is not None:
        raise InvalidInput("A stage is made or collected: give one of make= and collect=.")
    function = make or collect or prepare
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
    if not isinstance(made.value, Shards):
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


def _read(name: str, key: str, folder: Path, experiment: Experiment | None, collected: bool) -> Stage | None:
    """The stage that is kept in `folder`, if it is whole and still what it was; what is not is set aside.

    Raises InvalidInput where it cannot be read now, which says nothing of what is there.
    """
    if not (folder / "stage.json").is_file():
        return None
    try:
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        if collected:
            return _read_collected(name, key, folder / "value", record["seconds"])
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


def _read_collected(name: str, key: str, folder: Path, seconds: float) -> Stage | None:
    """What was collected; None where shards are missing or damaged, which are then made again beside the others."""
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{DESCRIPTION} is missing")
    try:
        return Stage(name, key, data.latents(str(folder)), None, seconds, True)
    except InvalidInput:
        return None
