"""Files that are there whole or not at all, whatever stops the one who writes them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A draft beside `path`, in a folder that is made if need be, which takes the place of `path` when all is written.

    What is in the place of `path` stays until then, and stays if anything is raised; the draft is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
