"""What each place of an experiment's config takes, and the check of a whole config before anything is built."""

from collections.abc import Collection, Mapping
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import data, metrics, training
from diffusion_jax.config import as_plain, build, check_entry
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

GROUPS = {
    "train.transforms": Transform,
    "ema": training.ema.Ema,
    "sampling.transformations": Denoiser,
    "metrics": metrics.SetMetric,
}
"""What each call in a group must make."""

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

MOST, MOST_AT_ONCE = 2**40, 2**20
"""Of a number of steps, and of what is made at once: examples of a batch, pictures of a side."""

ENTRIES = ("seed", "data", "held_out", "model", "process", "objective", "optimizer", "mesh", "train", "ema", "sampling")


MISSING = object()


def check_config(config: ConfigDict, given: Collection[str] = ()) -> None:
    """Raises InvalidInput, naming the entry, for what is missing, of a wrong type, or makes something else than its
    place takes. Nothing is built. given: entries that come from elsewhere, and which the config may leave out.
    """
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
        for name, entry in entry_at(config, place, {}).items():
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
    if average is not None and config.ema and average not in config.ema:
        raise unknown("config.sampling.ema", average, [*config.ema, "None"])


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
    entries = entry_at(config, place, {})
    return {name: build(entry, GROUPS[place], f"config.{place}.{name}") for name, entry in entries.items()}
