"""The exception for wrong input, and the form of its messages.

Every message names the field, the value, what was expected, and the nearest valid choice when there is one.
Command lines print it without a traceback and leave with exit code 2. What stops a run from outside is `Halted`, with
exit code 3.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class InvalidInput(ValueError):
    """The input cannot work; the message says why, and how to correct it."""


class Halted(RuntimeError):
    """The system failed (a full disk, a lost process); the message says what failed and how to continue the run."""


def invalid(field: str, value: Any, expected: str) -> InvalidInput:
    """An error saying that `field` has `value` but `expected` was needed. Usage: `raise invalid(...)`."""
    return InvalidInput(f"{field} is {shortened(value)}, but {expected}.")


def shortened(value: Any, length: int = 200) -> str:
    """`repr(value)` in one line, cut where it would make a message longer than a reader wants."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]}..."


def nearest(value: Any, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The choice spelled most like `value`, or None when nothing comes close."""
    matches = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def need(field: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raises InvalidInput unless `value` is of this kind: a function given in the place of what it makes is not."""
    if not isinstance(value, kind):
        raise invalid(field, value, expected)


LISTED = 40, 12
"""Valid choices that a message names: all of so many, and of more the so many that are spelled most alike."""


def unknown(field: str, value: Any, choices: Iterable[str]) -> InvalidInput:
    """An error saying that `value` is not among `choices`, with the nearest one. Usage: `raise unknown(...)`."""
    choices = sorted(map(str, choices))
    match = nearest(value, choices)
    hint = f"did you mean {match!r}? " if match else ""
    valid = listed(value, choices)
    return InvalidInput(f"{field} is {shortened(value)}, which does not exist; {hint}Valid: {valid}.")


def listed(value: Any, choices: Sequence[str]) -> str:
    """The valid choices in a message: all of them or, where they are many (`LISTED`), those spelled most alike."""
    most, alike = LISTED
    if len(choices) <= most:
        return ", ".join(choices)
    close = difflib.get_close_matches(str(value), choices, n=alike, cutoff=0.0)
    return f"{', '.join(close)} and {len(choices) - len(close)} more"
