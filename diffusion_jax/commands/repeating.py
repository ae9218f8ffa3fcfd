"""`sample --like=PNG`: the settings in an image, as arguments of a command line.

An image may come from anyone, so what it says is data. It chooses no code: a config file, a package to trust and a part
of one's own must be given again by the user.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.commands.image_files import read_settings
from diffusion_jax.commands.sample_flags import flag_list
from diffusion_jax.config.literals import outside_names
from diffusion_jax.errors import InvalidInput

OF_THE_USER = ("--config", "--trust", "--output")
"""Flags that are never taken from an image: what is run, and where files are written."""


def repeated(argv: Sequence[str]) -> list[str]:
    """The arguments of `--like=FILE` in front of those that are given, which have the last word.

    Raises InvalidInput for an image without them, and where they name code that is not of this library.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--like")
    found, rest = reader.parse_known_args(argv)
    if found.like is None:
        return list(argv)
    settings = read_settings(found.like)
    given = {argument.split("=")[0].removeprefix("--") for argument in rest}
    try:
        stored = flag_list(_flags(settings, given))
    except (AttributeError, KeyError, TypeError):
        raise InvalidInput(
            f"{found.like} does not hold the flags of a call of `sample`, so it cannot be repeated."
        ) from None
    for argument in stored:
        _check(argument, found.like)
    return [*stored, *rest]


def _flags(settings: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    flags = {name: value for name, value in settings["flags"].items() if name not in given}
    if not given & {"seed", "seeds"}:
        flags["seed"] = settings["seed"]
    if not given & {"prompt", "class"}:
        flags |= {name: settings[name] for name in ("prompt", "class") if name in settings}
        if not given & {"index", "num-samples", "images-per-prompt"}:
            flags |= {"num-samples": settings["index"] + 1, "index": settings["index"]}
    return flags


def _check(argument: str, image: str) -> None:
    name, _, value = argument.partition("=")
    names = outside_names(f"solvers.{value}" if name == "--solver" else value)
    if name in OF_THE_USER or (names and (name == "--solver" or name.startswith("--config."))):
        raise InvalidInput(
            f"{image} was made with {argument}, which is not taken from an image: give {name} yourself if you trust it."
        )
