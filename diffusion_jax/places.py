"""What each place of an experiment's config takes, and the check of a whole config before anything is built."""

from collections.abc import Collection, Mapping
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import data, metrics, training
from diffusion_jax.config import as_plain, build, check_entry
from diffusion_jax.config.calls import MISSING
from diffusion_jax.data.pipeline import Transform
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models import Autoencoder, Captioner, DualEncoder, Encoder
from diffusion_jax.typing import Denoiser, Grid, Network, Objective, Process, Solver

Trained = Network | Autoencoder | Encoder | DualEncoder | Captioner
"""What a config can train: `init(key, x, ...) -> params`, and an objective that knows the rest."""

PARTS = {
    "data": data.Source,
    "held_out": data.Source | None,
    "model": Trained,
    "process": Process | None,
    "objective": Objective,
    "optimizer": training.optimizers.Optimizer | optax.GradientTransformation,
    "mesh": Mesh,
    "sampling.solver": Solver,
    "sampling.grid": Grid,
    "sampling.acceleration": Denoiser | None,
    "sampling.condition": data.Conditions | None,
}
"""What the call in each entry must make."""

GROUPS: dict[str, Any] = {
    "train.transforms": Transform,
    "ema": training.ema.Ema,
    "sampling.transformations": Denoiser,
    "metrics": metrics.SetMetric,
}
"""What each call in a group must make; an entry that is None is left out."""

NUMBERS = {
    "train": {
        "steps": 0,
        "batch_size": 1,
        "accumulate": 1,
        "log_every": 1,
        "checkpoint_every": 1,
        "keep": 1,
        "snapshot_every": None,
        "max_skipped": 1,
        "validate_every": None,
        "validation_examples": 1,
        "sample_every": None,
    },
    "sampling": {"batch_size": 1, "picture_columns": 1, "picture_zoom": None},
}
"""Whole numbers and the least that each can be; None where None and 0 stand for never."""

ABOUT = {
    "seed": "the number from which all randomness of the run follows",
    "data": "the examples to train on",
    "held_out": "examples that are not trained on: for validation and evaluation",
    "model": "the network, or what else is trained",
    "process": "how data become noise, and what the network predicts",
    "objective": "the training loss",
    "optimizer": "how parameters are updated, and the schedule of its rate",
    "mesh": "how devices are laid out",
    "train": "the training loop",
    "train.steps": "batches to train on, counted from the beginning of the run",
    "train.batch_size": "examples in a batch, over all devices",
    "train.transforms": "what is done to each example as it is read, in the alphabetical order of names",
    "train.accumulate": "parts into which a batch is cut to save memory",
    "train.clip_norm": "gradients are scaled down to this global norm; None: never",
    "train.log_every": "steps between lines of the log",
    "train.checkpoint_every": "steps between checkpoints; one is always made at the end",
    "train.keep": "checkpoints that are kept",
    "train.snapshot_every": "steps between stored averages for post-hoc widths; None: never",
    "train.max_skipped": "steps in a row without a finite update after which the run ends",
    "train.validate_every": "steps between validations, and one at the end; None: never",
    "train.validation_examples": "held-out examples of a validation",
    "train.log_to": "where the log goes: jsonl, tensorboard, csv, wandb",
    "train.sample_every": "steps between pictures of samples; None: never",
    "ema": "averages of the parameters, by a name of your choice",
    "sampling": "how samples are drawn",
    "sampling.ema": "the average whose parameters are sampled; None: the parameters themselves",
    "sampling.solver": "the method of the steps",
    "sampling.grid": "the times of the steps, from noise to data",
    "sampling.acceleration": "how the network is asked: at every step, or less often",
    "sampling.transformations": "guidance and the like, applied in the alphabetical order of names",
    "sampling.condition": "the classes or captions of samples",
    "sampling.size": "height and width of samples; None: those of the data",
    "sampling.decoder": "the folder of the autoencoder that shows samples of latents as pictures; None: they are not",
    "sampling.batch_size": "samples that are drawn at once",
    "sampling.picture_columns": "samples in a row of a picture",
    "sampling.picture_zoom": "pixels of a picture for each pixel of a sample",
    "metrics": "what `evaluate` measures, by a name of your choice",
}
"""What each place of a config is for, in the words that `--print-config` shows."""

MOST, MOST_AT_ONCE = 2**40, 2**20
"""Of a number of steps, and of what is made at once: examples of a batch, pictures of a side."""

ENTRIES = ("seed", "data", "held_out", "model", "process", "objective", "optimizer", "mesh", "train", "ema", "sampling")


def check_config(config: ConfigDict, given: Collection[str] = ()) -> None:
    """Raises InvalidInput, naming the entry, for what is missing, of a wrong type, or makes something else than its
    place takes. Nothing is built. given: entries that come from elsewhere, and which the config may leave out.
    """
    if "pretrained" in config and "model" not in given:
        folder = config.pretrained.get("folder")
        raise InvalidInput(
            f"This run fine-tuned {folder}: sample its result by sample --pretrained={folder} "
            "--lora=WORKDIR/pytorch_lora_weights.safetensors, or, where all weights learned, by "
            "sample --pretrained=WORKDIR/pipeline; measure those pictures by evaluate --images=FOLDER."
        )
    for name in ENTRIES:
        if name not in config:
            raise InvalidInput(f"The config has no entry {name!r}; it needs {', '.join(ENTRIES)}.")
    seed = config.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise invalid("config.seed", seed, "a whole number from 0 to 2^32 - 1 is needed")
    groups = {name for place in (*PARTS, *GROUPS, *NUMBERS) for name in (place.rpartition(".")[0],) if name}
    for place in sorted({*groups, *NUMBERS, *GROUPS}):
        group = entry_at(config, place, {})
        if not isinstance(group, Mapping | ConfigDict) or "call" in group:
            raise invalid(f"config.{place}", as_plain(group), "a group of entries is needed")
    for place, takes in PARTS.items():
        entry = entry_at(config, place, MISSING)
        if entry is not MISSING and (entry is not None or place not in given):
            check_entry(entry, takes, f"config.{place}")
    for place, takes in GROUPS.items():
        for name, entry in entries_of(place, config).items():
            check_entry(entry, takes, f"config.{place}.{name}")
    for place, numbers in NUMBERS.items():
        for name, least in numbers.items():
            _check_number(f"config.{place}.{name}", entry_at(config, f"{place}.{name}", MISSING), least)
    clip = config.train.get("clip_norm")
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
        raise invalid("config.train.clip_norm", clip, "a positive number is needed, or None")
    average = config.sampling.get("ema")
    if average is not None and not isinstance(average, str):
        raise invalid("config.sampling.ema", as_plain(average), "the name of an average is needed, or None")
    averages = entries_of("ema", config)
    if average is not None and averages and average not in averages:
        raise unknown("config.sampling.ema", average, [*averages, "None"])


def sampled_average(config: ConfigDict) -> str | None:
    """The name of the average whose parameters are sampled and measured; None for the parameters themselves, which is
    so where the run keeps no average."""
    return config.sampling.ema if entries_of("ema", config) else None


def entry_at(config: Any, place: str, default: Any) -> Any:
    """What stands at "sampling.solver" of a config; `default` where nothing does."""
    for name in place.split("."):
        if not isinstance(config, Mapping | ConfigDict) or name not in config:
            return default
        config = config[name]
    return config


def _check_number(field: str, value: Any, least: int | None) -> None:
    if value is MISSING:
        raise InvalidInput(f"{field} is missing: it is a whole number; experiment.defaults() has one for each.")
    if value is None and least is None:
        return
    most = MOST_AT_ONCE if field.endswith(("size", "examples", "columns", "zoom", "accumulate")) else MOST
    if isinstance(value, bool) or not isinstance(value, int) or not (least or 0) <= value <= most:
        never = ", or None" if least is None else ""
        raise invalid(field, as_plain(value), f"a whole number from {least or 0} to {most} is needed{never}")


def part_of(place: str, config: ConfigDict, **context: Any) -> Any:
    """The part in an entry of the config, "sampling.solver", of the type that `PARTS` says."""
    return build(entry_at(config, place, None), PARTS[place], f"config.{place}", **context)


def parts_in(place: str, config: ConfigDict) -> dict[str, Any]:
    """The parts of a group by name, of the type that `GROUPS` says."""
    entries = entries_of(place, config)
    return {name: build(entry, GROUPS[place], f"config.{place}.{name}") for name, entry in entries.items()}


def entries_of(place: str, config: ConfigDict) -> dict[str, Any]:
    """The entries of a group by name, without those that are None, which are left out."""
    return {name: entry for name, entry in entry_at(config, place, {}).items() if entry is not None}
