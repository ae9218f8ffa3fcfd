"""What cannot be read, now or ever again, and what cannot be written: told apart, and never answered by deleting.

What is not what was saved is `Damaged`: readers fall back to what was saved before, and a run that goes on sets it
aside under another name. What the system refuses to hand out (a permission, too many open files, memory) says nothing
of what is there, so nothing is changed and the user is told.
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from diffusion_jax.errors import Halted, InvalidInput
from diffusion_jax.reading import first_line

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Errors that say what is there: something is missing, or is not of its kind."""

CODE = re.compile(r"os[ _]error(?:_code)?[ =:']+(\d+)", re.IGNORECASE)
STATUS = re.compile(r"\b(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE)\b")
"""How tensorstore, which writes and reads arrays, reports what the system said."""


class Damaged(RuntimeError):
    """Something that exists but cannot be trusted."""


def system_error(error: BaseException | None) -> str | None:
    """What the system said, if that is why `error` or its cause was raised; None where the content is to blame."""
    if error is None:
        return None
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        return None if error.errno in ABSENT else f"{error.strerror}{where}"
    for one in getattr(error, "exceptions", ()):
        if told := system_error(one):
            return told
    if found := CODE.search(str(error)):
        return None if int(found[1]) in ABSENT else os.strerror(int(found[1]))
    if STATUS.search(str(error)):
        return first_line(error)
    return system_error(error.__cause__ or error.__context__)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Around the reading of `what`: raises Damaged for what is not what was saved.

    Raises InvalidInput, whatever the reader raised, where it cannot be read now.
    """
    try:
        yield
    except (InvalidInput, Damaged):
        raise
    except Exception as error:
        if told := system_error(error):
            raise InvalidInput(f"{what} cannot be read now ({told}); nothing was changed.") from error
        raise Damaged(first_line(error)) from error


@contextlib.contextmanager
def writing(what: str, untouched: str) -> Iterator[None]:
    """Around the writing of `what`: raises Halted where the system refuses it. untouched: says what is still there."""
    try:
        yield
    except Exception as error:
        if told := system_error(error):
            raise Halted(f"{what} could not be written ({told}); {untouched}.") from error
        raise


def set_aside(path: Any) -> Any:
    """Renames a folder (of `pathlib` or of a bucket) so that nothing takes it for what it was; returns its new path."""
    aside = path.parent / f"{path.name}.unusable-{time.time_ns()}"
    path.rename(aside)
    return aside
