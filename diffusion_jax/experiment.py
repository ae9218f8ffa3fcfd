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
                  (a group), condition, size, decoder (a folder with the autoencoder of latents), batch_size, ema
    metrics       a group of what `evaluate` measures, each a constructor call

A ConfigDict has its entries in alphabetical order, so that is the order in which transforms and transformations are
applied: where it matters, name them so. An entry of a group that is None is left out.

`defaults` is the config to start from: it has every plain value, and leaves the entries to be set. `places` says
what each entry takes, and all of it is looked at before anything is built.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
from diffusion_jax.experiment_data import sampled_shape, with_data
from diffusion_jax.models import ConditionStream, check_values
from diffusion_jax.places import GROUPS, check_config, entries_of, part_of, parts_in
from diffusion_jax.processes import with_condition
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
        "log_to": ("jsonl", "tensorboard"),
    }
    config.sampling = {
        "ema": None,
        "acceleration": call("acceleration.accelerated", preset="plain"),
        "transformations": {},
        "condition": None,
        "size": None,
        "decoder": None,
        "batch_size": 256,
        "picture_columns": 10,
        "picture_zoom": None,
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

    shape: the shape of one sample, which is that of an example's x0 unless the config says otherwise (a dict of shapes
        for joint data).
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
        return self.network.init(key, x, t, with_condition(self.process, cond)[1])

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises InvalidInput where a batch of data has a label or a token that network or process do not know."""
        check_known(batch, self.conditions, self.process)

    def example(self, batch_size: int = 1) -> Any:
        """A batch of the data's first examples, as NumPy arrays."""
        # Of one size, where the data have several.
        rows = next(iter(data.rows_of_each_size(self.source).values()), np.arange(len(self.source)))
        batch = data.stacked_examples(self.source, rows[np.arange(batch_size) % len(rows)])
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
    check_config(config, [name for name, value in stand_ins.items() if value is not None])
    mesh = part_of("mesh", config)
    config, source, held_out = with_data(config, source, held_out)
    network = part_of("model", config) if network is None else network
    process = part_of("process", config) if process is None else process
    parts = {"network": network, "autoencoder": network, "process": process}
    still = ConfigDict({"objective": _still(config.objective.to_dict())})
    validation = objective or part_of("objective", still, **parts)
    loss = objective or part_of("objective", config, **parts)
    # Schedules that are given no length have that of the run.
    optimizer = part_of("optimizer", config, total_steps=max(config.train.steps, 1))
    if not len(source):
        raise invalid("config.data", config.data.get("call"), "it holds no example")
    shape = sampled_shape(config, source)
    conditions = getattr(getattr(network, "module", None), "conditions", ())
    check_classes(source, held_out, conditions, process)
    check_null_class("config.objective.null", _trained_null(config.objective.to_dict()), source, conditions)
    return Experiment(
        config, source, held_out, network, process, loss, validation, optimizer, mesh, shape, conditions, begin
    )


def _still(objective: Mapping[str, Any]) -> dict[str, Any]:
    """An objective as it validates, and so the one that it is made of: nothing is dropped."""
    quiet = {"cond_dropout": 0.0, "train": False}
    return {
        name: quiet.get(name, _still(value) if isinstance(value, Mapping) else value)
        for name, value in objective.items()
    }


def _trained_null(objective: Mapping[str, Any]) -> Any:
    """What an objective, or the one that it is made of, puts in the place of conditions; None where neither does."""
    found = [
        objective.get("null"),
        *(_trained_null(value) for value in objective.values() if isinstance(value, Mapping)),
    ]
    return next((null for null in found if null is not None), None)


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
    """Raises InvalidInput where network, data and objective do not fit together, before anything is compiled, and
    where the data have examples that cannot be used (`source.check`, of those that have it)."""
    check_data = getattr(experiment.source, "check", None)
    if check_data is not None:
        check_data()
    key = jax.random.key(0)
    params = abstractly("config.model on the data", experiment.init_params, key)
    batch = experiment.example(experiment.config.train.batch_size)
    state = abstractly("config.objective", experiment.objective.init, key, params, batch)
    abstractly("config.objective on the data", experiment.objective.loss, params, state, batch, key)
    for size, rows in data.rows_of_each_size(experiment.source).items():
        one = data.stacked_examples(experiment.source, np.full(experiment.config.train.batch_size, rows[0]))
        one = {**one, "index": batch["index"]}
        what = f"config.model, which must take pictures of several sizes, on those of {size[0]} x {size[1]}"
        abstractly(what, experiment.objective.loss, params, state, one, key)


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
    **more: Any,
) -> training.TrainState:
    """Trains `experiment` in `workdir`, resuming what is there; returns the last state. None keeps nothing.

    init_params: `key -> params`, for a run that does not begin with fresh parameters of the network.
    more: what else `training.train` takes, such as `writer` and `profile`.
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
        log_to=tuple(config.train.get("log_to", ("jsonl", "tensorboard"))),
        **{name: config.train[name] for name in OF_THE_LOOP},
        **more,
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
    plainly = part_of("sampling.acceleration", plain, network=experiment.network, **context)
    denoiser = plainly
    if config.sampling.get("acceleration"):
        # It takes the network, or, as a transformation does, its denoiser.
        around = {"network": experiment.network, "denoiser": plainly, "inner": plainly}
        denoiser = part_of("sampling.acceleration", config, **around, **context)
    for name, entry in entries_of("sampling.transformations", config).items():
        field = f"config.sampling.transformations.{name}"
        _check_null(f"{field}.null", entry.get("null"), experiment)
        around = {"denoiser": denoiser, "inner": denoiser}
        denoiser = build(entry, GROUPS["sampling.transformations"], field, **around, **context)
    classes = getattr(experiment.source, "num_classes", None)
    known_of_data = {"source": experiment.source if experiment.held_out is None else experiment.held_out}
    known_of_data |= {} if classes is None else {"num_classes": classes}
    conditions = part_of("sampling.condition", config, **known_of_data) if config.sampling.get("condition") else None

    known = conditions and _checked(conditions, experiment.conditions, classes)
    grid = as_grid(part_of("sampling.grid", config, **context))
    return Sampling(denoiser, part_of("sampling.solver", config, **context), grid, known)


def _check_null(field: str, null: Any, experiment: Experiment) -> None:
    """Raises InvalidInput where the null class of a transformation is a class of the data, or not the one that was
    trained as the null class."""
    null, trained = as_plain(null), _trained_null(experiment.config.objective.to_dict())
    check_null_class(field, null, experiment.source, experiment.conditions)
    label, known = (one.get("label") if isinstance(one, Mapping) else None for one in (null, trained))
    if isinstance(label, int) and isinstance(known, int) and label != known:
        raise invalid(f"{field}['label']", label, f"{known} was trained as the null class (config.objective.null)")


def _checked(conditions: data.Conditions, streams: Any, classes: int | None) -> data.Conditions:
    """`conditions`, whose values are looked at before they are given out. classes: how many the data have."""

    def known(index):
        cond = conditions(index)
        check_values(streams, cond, data=True)
        label = np.max(cond["label"], initial=0) if classes is not None and "label" in cond else 0
        if classes is not None and label >= classes:
            raise invalid(
                "a label of config.sampling.condition", int(label), f"the data have classes 0 to {classes - 1}"
            )
        return cond

    return known


def decoded(experiment: Experiment, x: Any) -> Any:
    """Samples as pictures `[B, H, W, C]`: latents through the autoencoder in `config.sampling.decoder`; others as they
    are.

    Raises InvalidInput where there is none, or where it is not the one that the data's latents were made by.
    """
    folder = experiment.config.sampling.get("decoder")
    if folder is None:
        return x
    told = getattr(experiment.source, "description", None) or {}
    decode = _decoder(str(folder), told.get("autoencoder", {}).get("parameters"))
    return np.concatenate([np.asarray(decode(x[i : i + DECODED])) for i in range(0, len(x), DECODED)])


DECODED = 4
"""Latents that are decoded at once."""


@lru_cache(maxsize=2)
def _decoder(folder: str, digest: str | None) -> Callable[[Any], Any]:
    from diffusion_jax.interop.latents import load_latent_autoencoder
    from diffusion_jax.training.storage import params_digest

    autoencoder = load_latent_autoencoder(folder)
    if digest not in (None, params_digest(autoencoder.params)):
        raise invalid("config.sampling.decoder", folder, "its autoencoder is not the one that made the latents")
    decode = jax.jit(autoencoder.network.decode)
    return lambda latents: decode(autoencoder.params, latents)


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
