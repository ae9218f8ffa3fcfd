"""The parser of every command line: mistakes are told in one sentence, with the nearest flag."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from diffusion_jax.errors import InvalidInput, nearest


class CommandParser(argparse.ArgumentParser):
    """The flags of `diffusion-jax NAME`. What cannot be parsed is told in one sentence, with the nearest flag."""

    def __init__(self, name: str, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options
        super().__init__(prog=f"diffusion-jax {name}", **options)

    def parse_args(
        self, args: Any = None, namespace: Any = None, *, fields: Callable[[], Iterable[str]] = tuple
    ) -> Any:
        """fields: the fields of the config, which are asked for where a flag is unknown that may stand for one."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            raise InvalidInput(self._unknown(left[0], fields))
        return found

    def _unknown(self, argument: str, fields: Callable[[], Iterable[str]]) -> str:
        flag, given, value = argument.partition("=")
        if not flag.startswith("--"):
            return f"{argument!r} belongs to no flag; values with spaces need quotes (all flags: {self.prog} --help)."
        name = flag.removeprefix("--").replace("-", "_")
        places = [field for field in fields() if field.split(".")[-1] == name]
        # The outermost: those of a run rather than of a part of a part of it.
        top = min((place.count(".") for place in places), default=0)
        likely = [f"--config.{place}{given}{value}" for place in places if place.count(".") == top]
        likely = likely or [text for text in [nearest(flag, self._option_string_actions, cutoff=0.75)] if text]
        hint = f"; did you mean {' or '.join(likely)}?" if likely else "."
        return f"{flag} is no flag of `{self.prog}`{hint} (All flags: {self.prog} --help.)"

    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message} (all flags: {self.prog} --help).")
