"""What the product of an adapter's factors is multiplied by: alphas beside them, or PEFT's config, checked as read.

alpha / rank, or alpha / sqrt(rank) where the config says `use_rslora`; 1 where nothing says an alpha
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.files import TensorFiles
from diffusion_jax.interop.lora_names import DOTTED, PEFT, component_of
from diffusion_jax.reading import parse_json, read_json

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's config within a file, by component."""

KINDS = (None, "LORA", "LOHA", "LOKR")

DEFAULT = 8
"""PEFT's alpha where its config says none."""

UNBOUNDED = re.compile(r"[*+{]")
REPEATED = re.compile(r"\)\s*[*+{]|\\\d|\(\?P?[=<]")
MOST_UNBOUNDED = 3
"""What patterns of a file may not have, since it could take for ever: repeated groups, references, many repeats."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin the factors that change the base as well, so that a file is not of the published base."""


def adapter_config(files: TensorFiles, location: Path, component: str) -> tuple[dict[str, Any], str]:
    """PEFT's config of the component, and what names it in an error; empty where there is none.

    It is in the file's metadata, or in the adapter_config.json of the folder or beside a file of PEFT.
    """
    told = files.metadata().get(METADATA)
    if told is not None:
        where = f"{location}: {METADATA}"
        config = parse_json(told, where)
        for head in DOTTED[component]:
            if own := {k.removeprefix(f"{head}."): v for k, v in config.items() if k.startswith(f"{head}.")}:
                return own, where
        return ({} if any(component_of(name) for name in config) else config), where
    folder = location if location.is_dir() else location.parent
    theirs = location.is_dir() or any(name.startswith(f"{PEFT}.") for name in files.names)
    file = folder / "adapter_config.json"
    return (read_json(file), str(file)) if theirs and file.is_file() else ({}, str(file))


def scales(
    files: TensorFiles, location: Path, component: str
) -> tuple[Callable[[str, int | None, str | None], float], dict[str, Any]]:
    """`(module, rank, name of the tensor alpha or None) -> scale`, and PEFT's config. Raises InvalidInput where either
    says what cannot be, or asks for what is not read.
    """
    config, where = adapter_config(files, location, component)
    _check(config, where)
    ranks, alphas = (_compiled(config, name, where) for name in ("rank_pattern", "alpha_pattern"))

    def scale(module: str, rank: int | None, alpha: str | None) -> float:
        if alpha is not None:
            value = _number(files.scalar(alpha), f"{location}: {alpha}")
            # LoKr without factors has no rank, and no scale.
            return value / rank if rank else 1.0
        if not config:
            return 1.0
        told = _first(ranks, module)
        told = config.get("r", rank) if told is None else told
        if rank is None:
            rank = told
        elif told is not None and told != rank:
            raise InvalidInput(f"{where} says the rank {told!r} of {module}, but it has factors of rank {rank}.")
        if not isinstance(rank, int) or rank < 1:
            raise invalid(f"{where}: r", rank, "a positive integer is needed")
        name = "alpha" if config.get("peft_type") in ("LOHA", "LOKR") else "lora_alpha"
        value = _first(alphas, module)
        value = _number(config.get(name, DEFAULT) if value is None else value, f"{where}: {name}")
        return value / math.sqrt(rank) if config.get("use_rslora") else value / rank

    return scale, config


def _check(config, where):
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise invalid(f"{where}: peft_type", kind, "LORA, LOHA and LOKR are read")
    for name in ("rank_pattern", "alpha_pattern"):
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            raise invalid(f"{where}: {name}", value, "a dict from patterns of modules to numbers is needed")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(config.get(name, False), bool | None):
            raise invalid(f"{where}: {name}", config[name], "true or false is needed")
    begun = config.get("init_lora_weights", config.get("init_weights"))
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise invalid(
            f"{where}: init_lora_weights",
            begun,
            "such factors are of a changed base: save them converted (path_initial_model_for_weight_conversion)",
        )
    for name in ("layer_replication", "alora_invocation_tokens"):
        if config.get(name):
            raise invalid(f"{where}: {name}", config[name], "this is not read")


def _compiled(config, name, where) -> list[tuple[re.Pattern, Any]]:
    """Patterns on the ends of modules' names and their values, in order."""
    found = []
    for pattern, value in (config.get(name) or {}).items():
        if len(UNBOUNDED.findall(pattern)) > MOST_UNBOUNDED or REPEATED.search(pattern):
            raise InvalidInput(f"{where}: the pattern {pattern[:80]!r} of {name} repeats too much to be tried.")
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, OverflowError, RecursionError):
            raise InvalidInput(f"{where}: the pattern {pattern[:80]!r} of {name} is no regular expression.") from None
    return found


def _first(patterns, module):
    """The value of the first pattern that matches, as PEFT finds it; None where none does."""
    return next((value for pattern, value in patterns if pattern.match(module)), None)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not value:
        raise invalid(name, value, "a finite number other than 0 is needed")
    return float(value)
