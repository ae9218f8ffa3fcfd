"""Files of a folder of pictures: which of them are pictures, which can be read, which are held out, and what they are.

What systems leave behind is no picture: names that begin with a dot, `__MACOSX`, thumbnails. Whatever else is not read
is told. Pictures are held out by their content: those with the smallest digests, whatever they are called, so that the
split is the same on every machine, a renamed picture stays on its side, and a copy is on the side of its original.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from diffusion_jax import pixels
from diffusion_jax.cache import cache_folder
from diffusion_jax.data.captions import TABLES
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.reading import Unreadable, read_json, regular_file, unreadable
from diffusion_jax.whole_files import written_whole

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Of pictures, in small or capital letters."""

LEFT_BEHIND = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
"""What systems put into folders."""

DIGESTED = 2**16
"""Bytes at the beginning of a file that tell it, with its size, from others."""

MOST_HEADERS = 1000
"""Pictures of a folder whose headers `folder_summary` reads, spread evenly."""

READERS = 4
"""Pictures that are decoded at once: a large photograph takes half a gigabyte meanwhile."""

REMEMBERED = 1000
"""Pictures of which it is kept which of them cannot be used."""

SIZES = (8, 16, 24, 32, 48, 64)
"""Sides in pixels that `folder_summary` chooses from."""


def picture_files(folder: str | os.PathLike) -> tuple[Path, tuple[Path, ...], tuple[Path, ...]]:
    """The folder, its pictures and its other files, in the order of their names.

    Raises InvalidInput for what is no folder, cannot be read, or holds no picture.
    """
    if not folder:
        raise InvalidInput("A folder of pictures is needed, but its name is empty.")
    root = Path(folder).expanduser()
    if not root.exists():
        raise InvalidInput(f"The image folder {str(root)!r} does not exist.")
    if not root.is_dir():
        raise InvalidInput(f"{str(root)!r} is a file, but a folder of images is expected.")
    files = sorted(_visible_files(root))
    pictures = tuple(path for path in files if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise InvalidInput(f"The folder {str(root)!r} holds no image ({', '.join(SUFFIXES)}).")
    return root, pictures, tuple(path for path in files if path.suffix.lower() not in SUFFIXES)


def class_of_each(root: Path, pictures: Sequence[Path]) -> list[str]:
    """The subfolder that each picture is in; empty where they lie in the folder itself. Refuses a mixture."""
    loose = [path for path in pictures if path.parent == root]
    if len(loose) == len(pictures):
        return []
    if loose:
        raise InvalidInput(
            f"{str(root)!r} mixes class subfolders with loose images such as {loose[0].name!r}: move those."
        )
    return [path.relative_to(root).parts[0] for path in pictures]


def class_folders(root: Path) -> list[str]:
    """The names of the subfolders, in alphabetical order."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name))


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in LEFT_BEHIND


def _visible_files(root: Path) -> list[Path]:
    """All files below a folder, links to folders followed, each folder once."""

    def refuse(error):
        raise InvalidInput(f"The folder {error.filename!r} cannot be read ({error.strerror}).")

    found, seen = [], set()
    for at, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(at))
        folders[:] = [
            name for name in folders if _is_visible(name) and os.path.realpath(os.path.join(at, name)) not in seen
        ]
        found += [Path(at, name) for name in files if _is_visible(name)]
    return found


def some_of(names: Sequence[str]) -> str:
    """A few of the names, and how many there are besides."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + rest


def warn_left_out(root: Path, others: Sequence[Path]) -> None:
    """Warns of files that are no pictures by their names."""
    if others:
        named = some_of([str(path.relative_to(root)) for path in others])
        count = "1 file" if len(others) == 1 else f"{len(others)} files"
        warnings.warn(f"{count} in {str(root)!r} left out, no pictures by their names: {named}.", stacklevel=3)


def unusable(pictures: Sequence[Path], read: Callable[[Path], Any], reading: str) -> dict[Path, str]:
    """What `read` refuses, each with its reason. What cannot be read now (a permission, say) is raised instead.

    The answer for `REMEMBERED` pictures and more is kept, and found again while the files are the same. reading: tells
    `read` from others that answer otherwise.
    """
    if len(pictures) < REMEMBERED:
        return _unusable(pictures, read)
    states = json.dumps([reading, *([str(path), *(file_state(path) or ())] for path in pictures)])
    place = cache_folder() / "pictures" / f"{hashlib.sha256(states.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(InvalidInput):
        return {Path(path): str(told) for path, told in read_json(place).items()}
    found = _unusable(pictures, read)
    # What cannot be kept is looked at again the next time.
    with contextlib.suppress(OSError), written_whole(place) as draft:
        draft.write_text(json.dumps({str(path): told for path, told in found.items()}), encoding="utf-8")
    return found


def file_state(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another of its name; None of what is not there, which reading it will say."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _unusable(pictures: Sequence[Path], read: Callable[[Path], Any]) -> dict[Path, str]:

    def problem(path: Path) -> str | None:
        try:
            read(path)
        except Unreadable:
            raise
        except InvalidInput as error:
            return str(error).removeprefix(str(path)).strip().rstrip(".")
        return None

    with ThreadPoolExecutor(READERS) as pool:
        shown = {
            "desc": "looking at pictures",
            "unit": "picture",
            "disable": None if len(pictures) >= REMEMBERED else True,
        }
        problems = list(tqdm(pool.map(problem, pictures), total=len(pictures), **shown))
    return {path: told for path, told in zip(pictures, problems, strict=True) if told is not None}


def listed_problems(root: Path, problems: dict[Path, str], count: int) -> str:
    """How many of `count` pictures cannot be used, and the first of them with their reasons, as half a sentence."""
    first = [f"{str(path.relative_to(root))!r} ({told})" for path, told in list(problems.items())[:3]]
    rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{len(problems)} of {count} pictures in {str(root)!r} cannot be used: {', '.join(first)}{rest}"


def content_digest(path: Path) -> bytes:
    """What a file is known by whatever its name: its size and its first bytes."""
    file = regular_file(path)
    try:
        with file.open("rb") as opened:
            return hashlib.sha256(file.stat().st_size.to_bytes(8, "big") + opened.read(DIGESTED)).digest()
    except OSError as error:
        raise unreadable(file, error) from None


def held_out_rows(pictures: Sequence[Path], share: float) -> np.ndarray:
    """Which pictures are held out, bool `[N]`: about `share` of them and at least one, chosen by their content.

    Raises InvalidInput where nothing would be left to train on.
    """
    if isinstance(share, bool) or not 0 <= share < 1:
        raise invalid("held_out", share, "the share of the pictures to hold out lies in [0, 1)")
    if not share:
        return np.zeros(len(pictures), bool)
    digests = [content_digest(path) for path in pictures]
    # Equal pictures are on one side: what decides is the digest of the last that is held out.
    last = sorted(digests)[max(1, round(share * len(digests))) - 1]
    rows = np.asarray([digest <= last for digest in digests])
    if rows.all():
        raise invalid("held_out", share, f"of {len(pictures)} pictures none would be left to train on")
    return rows


class FolderSummary(NamedTuple):
    """What a folder of pictures is, as far as names and headers tell; see `folder_summary`.

    count: pictures. class_names: of the subfolders that hold them; () where they lie in the folder itself, or in one
    subfolder alone. captions: whether any picture has one. sizes: height and width of the pictures that were looked at,
    upright. grey, transparent: whether all of those are grey, and how many can be transparent. unreadable: those
    whose header could not be read.
    """

    folder: str
    count: int
    class_names: tuple[str, ...]
    captions: bool
    sizes: tuple[tuple[int, int], ...]
    grey: bool
    transparent: int
    unreadable: int

    @property
    def size(self) -> int:
        """The side to train at: the largest of `SIZES` that three quarters of the pictures have on either side."""
        shorter = np.percentile([min(size) for size in self.sizes], 25)
        return max([size for size in SIZES if size <= shorter], default=SIZES[0])

    @property
    def channels(self) -> int:
        return 1 if self.grey else 3

    @property
    def told(self) -> str:
        """What was found, in one line."""
        sides = sorted(self.sizes, key=lambda size: size[0] * size[1])
        small, large = (f"{height} x {width}" for height, width in (sides[0], sides[-1]))
        kinds = (
            "captions" if self.captions else f"{len(self.class_names)} classes" if self.class_names else "no classes"
        )
        reach = f"of {small}" if small == large else f"from {small} to {large} (height x width)"
        return f"{self.folder}: {self.count} pictures, {kinds}, {reach}, {'grey' if self.grey else 'colour'}"


def folder_summary(folder: str) -> FolderSummary:
    """Looks at the names in a folder of pictures, and at the headers of at most `MOST_HEADERS` of them.

    Raises InvalidInput for a folder without pictures, classes mixed with loose pictures, and where no header can be
    read.
    """
    root, pictures, others = picture_files(folder)
    beside = {path for path in others if path.suffix == ".txt"}
    captions = any(path.name in TABLES for path in others) or any(p.with_suffix(".txt") in beside for p in pictures)
    names = () if captions else tuple(class_folders(root)) if class_of_each(root, pictures) else ()
    rows = np.unique(np.linspace(0, len(pictures) - 1, MOST_HEADERS).astype(int))
    headers, problem = [], ""
    for row in rows:
        try:
            headers.append(pixels.read_header(pictures[row]))
        except InvalidInput as error:
            problem = str(error)
    if not headers:
        raise InvalidInput(f"No picture in {str(root)!r} can be read: {problem}")
    return FolderSummary(
        str(root),
        len(pictures),
        names if len(names) > 1 else (),
        captions,
        tuple(header.size for header in headers),
        all(header.grey for header in headers),
        sum(header.transparent for header in headers),
        len(rows) - len(headers),
    )
