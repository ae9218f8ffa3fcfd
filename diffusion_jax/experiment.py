"""From a config to the objects that a run needs: the one place where the command lines, notebooks and recipes agree.

A config has these entries; all of them are constructor calls (`config.call`) unless said otherwise:

    seed          a number
    data          the source to train on; `held_out` the one to validate and measure against
    model         a network, or what else is trained (an autoencoder, a pair of encoders: init(key, x) -> params);
                  `process` the noise (None where there is none), `objective` the loss, `optimizer`
    mesh          how devices are laid out
    train         a group: steps, batch_size and whatever else `training.train` takes; transforms, a group of calls
    ema           a group of averages of the parameters, each a constructor call
    sampling      a group: solver, grid, acceleration (from network and process to a denoiser), transformations of it
                  (a group, applied in its order), condition, batch_size, ema
    metrics       a group of what `evaluate` measures, each a constructor call

`defaults` is the config to start from: it has every plain value, and leaves the entries to be set. `places` says
what each entry takes, and all of it is looked at before anything is built.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, training
from diffusion_jax.clock import as_grid
from diffusion_jax.config import as_plain, build, call
from diffusion_jax.data.agreement import check_classes, check_known, check_null_class
from diffusion_jax.distributed import BATCH_AXES, path_name
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import ConditionStream, check_values
from diffusion_jax.places import GROUPS, check_config, part_of, parts_in
from diffusion_jax.reading import first_line
from diffusion_jax.sampling import make_sampler
from diffusion_jax.typing import Denoiser, Network, Objective, Solver


def defaults(steps: int, batch_size: int) -> ConfigDict:
    """A config with the plain values of a run of `steps`; what is trained, on what and how, is left to be set."""
    config = ConfigDict({"seed": 0, "mesh": call("distributed.make_mesh"), "ema": {}, "metrics": {}})
    config.train = {
        "steps": steps,
        "batch_size": batch_size,
        "transforms": {},
        "accumulate": 1,
        "clip_norm": 1.0,
        "log_every": 50,
        "checkpoint_every": 1000,
        "keep": 2,
        "snapshot_every": None,
        "max_skipped": 100,
        "validate_every": 500,
        "validation_examples": 256,
        "sample_every": None,
    }
    config.sampling = {
        "ema": None,
        "acceleration": call("acceleration.accelerated", preset="plain"),
        "transformations": {},
        "condition": None,
        "batch_size": 256,
        "picture_columns": 10,
        "picture_zoom": 2,
    }
    return config


OF_THE_LOOP = (
    "steps",
    "accumulate",
    "clip_norm",
    "log_every",
    "checkpoint_every",
    "keep",
    "snapshot_every",
    "max_skipped",
)
"""Entries of `config.train` that `training.train` takes under the same name."""

MOST_BYTES = 2**42
"""4 TiB of arrays in one state: more than what runs on many machines together has."""


class Experiment(NamedTuple):
    """What `config` describes, made.

    shape: the shape of one example's x0 (a dict of shapes for joint data).
    conditions: what the network itself reads of `cond`; none where that is not known.
    objective: the training loss; `validation` is the same without dropout of the condition.
    begin: `key -> params` to train from; None where those are fresh ones of the network.
    """

    config: ConfigDict
    source: Any
    held_out: Any
    network: Any
    process: Any
    objective: Objective
    validation: Objective
    optimizer: Any
    mesh: Any
    shape: Any
    conditions: tuple[ConditionStream, ...]
    begin: Callable[[Any], Any] | None = None

    def init_params(self, key) -> Any:
        """The parameters that training begins with."""
        if self.begin is not None:
            return self.begin(key)
        # Known now, even while a run's first state is being traced: worlds draw their examples with JAX.
        with jax.ensure_compile_time_eval():
            example = self.example()
        x, cond = example["x0"], example.get("cond")
        if not isinstance(self.network, Network):
            return self.network.init(key, x)
        t = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:1]), x)
        return self.network.init(key, x, t, cond)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises InvalidInput where a batch of data has a label or a token that network or process do not know."""
        check_known(batch, self.conditions, self.process)

    def example(self, batch_size: int = 1) -> Any:
        """A batch of the data's first examples, as NumPy arrays."""
        batch = data.stacked_examples(self.source, np.arange(batch_size) % len(self.source))
        return {**batch, "index": np.arange(batch_size, dtype=np.int32)}


def prepare(
    config: ConfigDict,
    *,
    source: Any = None,
    held_out: Any = None,
    network: Any = None,
    process: Any = None,
    objective: Objective | None = None,
    begin: Callable[[Any], Any] | None = None,
) -> Experiment:
    """Makes everything that training and sampling share. Raises InvalidInput for an incomplete config.

    source, held_out, network, process, objective: stand in place of what the config describes, e.g. data in a latent
    space or a network that was made of another one; the rest is made for them. begin: see `Experiment`.
    """
    stand_ins = {
        "data": source,
        "held_out": held_out,
        "model": network,
        "process": process,
        "objective": objective,
    }
    if "pretrained" in config and network is None:
        folder = config.pretrained.get("folder")
        raise InvalidInput(
            f"This run fine-tuned {folder}: sample its result by sample --pretrained={folder} "
            "--lora=WORKDIR/pytorch_lora_weights.safetensors, or, where all weights learned, by "
            "sample --pretrained=WORKDIR/pipeline."
        )
    check_config(config, [name for name, value in stand_ins.items() if value is not None])
    mesh = part_of("mesh", config)
    config, source, held_out = _with_data(config, source, held_out)
    network = part_of("model", config) if network is None else network
    process = part_of("process", config) if process is None else process
    parts = {"network": network, "autoencoder": network, "process": process}
    quiet = {name: value for name, value in {"cond_dropout": 0.0, "train": False}.items() if name in config.objective}
    still = ConfigDict({"objective": {**config.objective.to_dict(), **quiet}})
    validation = objective or part_of("objective", still, **parts)
    loss = objective or part_of("objective", config, **parts)
    optimizer = part_of("optimizer", config)
    if not len(source):
        raise invalid("config.data", config.data.get("call"), "it holds no example")
    shape = jax.tree.map(np.shape, source[0]["x0"])
    conditions = getattr(getattr(network, "module", None), "conditions", ())
    check_classes(source, held_out, conditions, process)
    check_null_class("config.objective.null", as_plain(config.objective.get("null")), source, conditions)
    return Experiment(
        config, source, held_out, network, process, loss, validation, optimizer, mesh, shape, conditions, begin
    )


def _with_data(config: ConfigDict, source: Any, held_out: Any) -> tuple[ConfigDict, Any, Any]:
    """The data, and the config with the names of their classes where an entry takes them and gives none.

    So a run stores which number is which class, and held-out data are numbered as the data to train on.
    """
    config = config.copy_and_resolve_references()
    made = {"data": source, "held_out": held_out}
    names = getattr(source, "class_names", None)
    for name, given in made.items():
        if given is not None:
            continue
        entry = config[name]
        takes_names = isinstance(entry, ConfigDict) and "class_names" in entry
        if takes_names and entry.class_names is None:
            entry.class_names = names
        made[name] = part_of(name, config)
        names = names or getattr(made[name], "class_names", None)
        if takes_names and name == "data":
            entry.class_names = names
    return config, made["data"], made["held_out"]


def abstractly(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The shapes of `function(*arguments)`, for which nothing is computed or compiled.

    Raises InvalidInput, saying `what`, where that fails or needs more than `MOST_BYTES`.
    """
    try:
        shapes = jax.eval_shape(function, *arguments)
    except InvalidInput:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise InvalidInput(f"{what} does not fit together ({told}).") from error
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if size > MOST_BYTES:
        raise InvalidInput(f"{what} needs {size} bytes, but at most {MOST_BYTES} are taken.")
    return shapes


def check_training(experiment: Experiment) -> None:
    """Raises InvalidInput where network, data and objective do not fit together, before anything is compiled."""
    key = jax.random.key(0)
    params = abstractly("config.model on the data", experiment.init_params, key)
    batch = experiment.example(experiment.config.train.batch_size)
    state = abstractly("config.objective", experiment.objective.init, key, params, batch)
    abstractly("config.objective on the data", experiment.objective.loss, params, state, batch, key)


def check_params(experiment: Experiment, params: Any) -> None:
    """Raises InvalidInput, naming the first differences, for parameters that are not those of the experiment's network,
    before anything is compiled for them."""
    wanted = abstractly("config.model on the data", experiment.init_params, jax.random.key(0))
    shapes, theirs = (
        {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (wanted, params)
    )
    wrong = [name for name in sorted({*shapes, *theirs}) if shapes.get(name) != theirs.get(name)]
    if wrong:
        told = [f"{name} ({theirs.get(name, 'absent')}, config.model has {shapes.get(name, 'none')})" for name in wrong]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InvalidInput(f"the checkpoint is not of the network of this config: {', '.join(told[:3])}{more}.")


def fit(
    experiment: Experiment,
    workdir: Any = None,
    callbacks: Sequence[training.Callback] = (),
    init_params: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> training.TrainState:
    """Trains `experiment` in `workdir`, resuming what is there; returns the last state. None keeps nothing.

    init_params: `key -> params`, for a run that does not begin with fresh parameters of the network.
    """
    config = experiment.config
    batches = data.pipeline(
        experiment.source,
        config.train.batch_size,
        seed=config.seed,
        transforms=tuple(parts_in("train.transforms", config).values()),
        check=experiment.check_batch,
    )
    return training.train(
        experiment.objective,
        experiment.optimizer,
        batches,
        init_params=experiment.init_params if init_params is None else init_params,
        workdir=None if workdir is None else str(workdir),
        seed=config.seed,
        ema=parts_in("ema", config),
        mesh=experiment.mesh,
        callbacks=callbacks,
        config=config.to_dict(),
        progress=progress,
        **{name: config.train[name] for name in OF_THE_LOOP},
    )


class Sampling(NamedTuple):
    """How an experiment draws samples."""

    denoiser: Denoiser
    solver: Solver
    grid: Any
    conditions: data.Conditions | None


def prepare_sampling(experiment: Experiment) -> Sampling:
    """The denoiser with its transformations, the solver and the grid of `config.sampling`.

    Its conditions raise InvalidInput for what the network does not know; samples are of a class, as data are.
    """
    config = experiment.config
    for name in ("solver", "grid"):
        if name not in config.sampling:
            raise InvalidInput(f"config.sampling has no entry {name!r}: how samples are drawn is not said.")
    context = {"process": experiment.process}
    # Absent in the configs of runs that were trained before it existed.
    plain = ConfigDict({"sampling": {"acceleration": call("denoisers.denoiser")}})
    denoiser = part_of(
        "sampling.acceleration", config if config.sampling.get("acceleration") else plain,
        network=experiment.network, **context,
    )  # fmt: skip
    for name, entry in config.sampling.transformations.items():
        field = f"config.sampling.transformations.{name}"
        check_null_class(f"{field}.null", as_plain(entry.get("null")), experiment.source, experiment.conditions)
        denoiser = build(entry, GROUPS["sampling.transformations"], field, denoiser=denoiser, **context)
    conditions = part_of("sampling.condition", config) if config.sampling.get("condition") else None

    known = conditions and _checked(conditions, experiment.conditions)
    grid = as_grid(part_of("sampling.grid", config, **context))
    return Sampling(denoiser, part_of("sampling.solver", config, **context), grid, known)


def _checked(conditions: data.Conditions, streams: Any) -> data.Conditions:
    """`conditions`, whose values are looked at before they are given out."""

    def known(index):
        cond = conditions(index)
        check_values(streams, cond, data=True)
        return cond

    return known


def compiled_sampler(experiment: Experiment, sampling: Sampling, save_every: int | None = None):
    """`make_sampler` over the experiment's mesh: `(key, params, grid, cond, index) -> Samples`."""
    return make_sampler(
        sampling.denoiser,
        sampling.solver,
        shape=experiment.shape,
        mesh=experiment.mesh,
        axis=BATCH_AXES,
        save_every=save_every,
    )
