"""Fields of a config in somebody else's JSON, read with their types checked.

Each reader gives the value that the peer would compute with, or raises one sentence with the file, the field, its value
and what is needed. null is what the peer's default is null for, and nothing else; true is no 1, 8.0 and "8" are no 8.
"""

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.errors import InvalidInput

MOST = 2**20
"""The largest size of an axis that is believed: four times the largest published vocabulary."""

MOST_LAYERS = 1000
"""As many layers are believed where there is no file whose tensors could be counted."""

MOST_LEVELS = 12
"""Levels of a U-Net or an autoencoder: each but the last halves the picture."""

MOST_SIDE = 2**12
"""Height and width of an x that a config may name."""

LARGEST, SMALLEST = 1e30, 1e-30
"""Numbers, and numbers above 0, that are believed: float32 holds them and their inverses."""

SHOWN = 80
"""Characters of a value that a message repeats."""

REQUIRED: Any = object()
"""In the place of a default: the field must be there."""


class Fields:
    """`values`, a dict out of JSON; source: what messages call it, its file.

    most_layers: how many layers there can be, since each has tensors of its own in the files.
    aliases: other names of fields, `{alias: name}`.
    `read` are the fields that were asked for, with the defaults of those that are absent.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str = "config.json",
        most_layers: int = MOST_LAYERS,
        aliases: Mapping[str, str] | None = None,
    ):
        self.values, self.source, self.most_layers = dict(values), source, most_layers
        self.read: dict[str, Any] = {}
        self.known = set(aliases or ())
        for alias, name in (aliases or {}).items():
            if alias in self.values and self.values.get(name, self.values[alias]) != self.values[alias]:
                raise self.wrong(name, f"{alias}={shown(self.values[alias])} says the same of this class")
            if alias in self.values:
                self.values[name] = self.values[alias]

    def wrong(self, name: str, expected: str) -> InvalidInput:
        """The error for a field. Usage: `raise fields.wrong("num_layers", "a number is needed")`."""
        value = f"={shown(self.values[name])}" if name in self.values else " nothing of it"
        return InvalidInput(f"{self.source} says {name}{value}, but {expected}.")

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it is, of any type."""
        self.known.add(name)
        if name not in self.values and default is REQUIRED:
            raise InvalidInput(f"{self.source} lacks {name}.")
        self.read[name] = self.values.get(name, default)
        return self.read[name]

    def _absent(self, name: str, default: Any) -> bool:
        """Whether the default counts: the field is not there, or null where that is the default."""
        value = self.raw(name, default)
        return name not in self.values or (value is None and default is None)

    def whole(self, name: str, default: Any, least: int = 1, most: int = MOST) -> Any:
        """A whole number."""
        if self._absent(name, default):
            return default
        return self._whole(name, self.values[name], least, most)

    def _whole(self, name, value, least, most):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most} is needed")
        return value

    def layers(self, name: str, default: Any, least: int = 1) -> Any:
        """How many layers there are: not more than the files can hold."""
        if self._absent(name, default):
            return default
        return self._layers(name, self.values[name], least)

    def _layers(self, name, value, least):
        value = self._whole(name, value, least, MOST)
        if value > self.most_layers:
            raise self.wrong(name, f"there can be at most {self.most_layers} layers, a tensor of the files for each")
        return value

    def number(self, name: str, default: Any, least: int | float = -math.inf, most: int | float = math.inf) -> Any:
        """A finite number, as a float."""
        if self._absent(name, default):
            return default
        return self._number(name, self.values[name], least, most)

    def _number(self, name, value, least, most):
        if not isinstance(value, int | float) or isinstance(value, bool) or not -LARGEST <= value <= LARGEST:
            raise self.wrong(name, "a number that float32 holds is needed")
        if not least <= value <= most:
            bounds = f"from {least:g}" + (f" to {most:g}" if most < math.inf else " up")
            raise self.wrong(name, f"a number {bounds} is needed" if least > -math.inf else f"at most {most:g} can be")
        return float(value)

    def positive(self, name: str, default: Any) -> Any:
        """A number above 0."""
        value = self.number(name, default)
        if value is not None and value < SMALLEST:
            raise self.wrong(name, "a number above 0 is needed")
        return value

    def flag(self, name: str, default: Any) -> Any:
        """true or false."""
        if self._absent(name, default):
            return default
        if not isinstance(self.values[name], bool):
            raise self.wrong(name, "true or false is needed")
        return self.values[name]

    def text(self, name: str, default: Any) -> Any:
        """A string."""
        if self._absent(name, default):
            return default
        if not isinstance(self.values[name], str):
            raise self.wrong(name, "a string is needed")
        return self.values[name]

    def choice(self, name: str, allowed: Sequence[Any], default: Any = REQUIRED) -> Any:
        """One of `allowed`, whose first is the default unless one is given."""
        default = allowed[0] if default is REQUIRED else default
        value = self.raw(name, default)
        for one in allowed:
            if value == one and isinstance(value, bool) == isinstance(one, bool):
                return one
        choices = " or ".join("null" if one is None else repr(one) for one in allowed)
        if name not in self.values:
            raise InvalidInput(f"{self.source} lacks {name}, which would be {default!r}: only {choices} can be loaded.")
        raise self.wrong(name, f"only {choices} can be loaded")

    def pair(self, name: str, default: Any, most: int = MOST_SIDE) -> Any:
        """Height and width, which may be given as one whole number."""
        if self._absent(name, default):
            return (default, default) if isinstance(default, int) else default
        value = self.values[name]
        sides = value if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2:
            raise self.wrong(name, "one whole number, or height and width, are needed")
        return tuple(self._whole(name, side, 1, most) for side in sides)

    def square(self, name: str, default: int, most: int = MOST_SIDE) -> int:
        """A size that is given as one number, or as two equal ones."""
        first, second = self.pair(name, default, most)
        if first != second:
            raise self.wrong(name, "one number, or two equal ones, are needed")
        return first

    def items(self, name: str, default: Any, least: int = 1, most: int = MOST) -> Any:
        """A list of at least `least` and at most `most` entries of any type, as a tuple."""
        if self._absent(name, default):
            return default
        value = self.values[name]
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            raise self.wrong(name, f"a list of {count} entries is needed")
        return tuple(value)

    def wholes(self, name: str, default: Any, least: int = 1, most: int = MOST, count: int = MOST_LEVELS) -> Any:
        """A list of whole numbers, at most `count`, as a tuple."""
        values = self.items(name, default, 1, count)
        return values if values is None else tuple(self._whole(name, value, least, most) for value in values)

    def numbers(self, name: str, default: Any, count: int) -> Any:
        """A list of `count` numbers, as a tuple."""
        values = self.items(name, default, count, count)
        return values if values is None else tuple(self._number(name, value, -math.inf, math.inf) for value in values)

    def per_level(self, name: str, default: Any, count: int) -> tuple:
        """An entry that is one value for all levels or a list of one for each, as a tuple of any type."""
        value = self.raw(name, default)
        value = tuple(value) if isinstance(value, list | tuple) else (value,) * count
        if len(value) != count:
            raise self.wrong(name, f"one value, or one for each of the {count} levels, is needed")
        return value

    def wholes_per_level(self, name: str, default: Any, count: int, least: int = 1, most: int = MOST) -> tuple:
        """`per_level` of whole numbers."""
        return tuple(self._whole(name, value, least, most) for value in self.per_level(name, default, count))

    def layers_per_level(self, name: str, default: Any, count: int, least: int = 1) -> tuple:
        """`per_level` of numbers of layers."""
        return tuple(self._layers(name, value, least) for value in self.per_level(name, default, count))

    def section(self, name: str) -> "Fields":
        """A dict within; an empty one where there is none, or null."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "a dict is needed")
        return Fields(value or {}, f"{self.source}: {name}", self.most_layers)

    def warn_of_unknown(self, others: Sequence[str] = ()) -> None:
        """Warns of fields that no reader asked for, are not among `others`, and are spelt almost like one that is.

        The peers ignore what they do not know, and their files are full of it; one letter more would be silent.
        """
        known = self.known.union(others)
        for name in self.values:
            if name in known or name.startswith("_"):
                continue
            near = difflib.get_close_matches(name, known - set(self.values), n=1, cutoff=0.9)
            if near:
                warnings.warn(
                    f"{self.source} says {name}={shown(self.values[name])}, which is no field of this class and is "
                    f"ignored: was {near[0]} meant?",
                    stacklevel=4,
                )


def shown(value: Any) -> str:
    """The value as a message repeats it: JSON's null, and not more than fits a line."""
    if value is None:
        return "null"
    text = repr(value[:SHOWN] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
