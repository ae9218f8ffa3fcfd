"""Folders of pictures: what in a folder is a picture, which class it is of, and what its caption says.

    folder/class/picture.png                  classes, numbered in the order of `class_names`
    folder/picture.png                        no condition
    folder/picture.png + picture.txt          captions: beside each picture, in metadata.jsonl, metadata.csv or
                                              captions.csv (`captioned_folder`)

What systems leave behind is neither class nor picture: names that begin with a dot, `__MACOSX`, thumbnails. Whatever
else is not read is told.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.captions import read_captions, tokenized
from diffusion_jax.data.sources import Indices, numbered
from diffusion_jax.errors import InvalidInput, invalid, unknown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Of pictures, in small or capital letters."""

LEFT_BEHIND = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
"""What systems put into folders."""

WITHOUT_CAPTION = ("refuse", "drop", "empty")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """Pictures of a folder, decoded when they are asked for; see `image_folder` and `captioned_folder`.

    cond: what is known of them, arrays `[N, ...]`. left_out: files that are no pictures.
    """

    files: tuple[Path, ...]
    cond: Mapping[str, Any]
    size: int
    channels: int
    name: str
    class_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    tokenizer: Any = None
    background: str | tuple[int, ...] | None = None
    weigh_alpha: bool = False
    left_out: tuple[Path, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, self.channels)

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The number of each picture's class."""
        return None if self.class_names is None else tuple(self.cond["label"].tolist())

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    @property
    def vocab_size(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        options = {"channels": self.channels, "background": self.background}
        image, alpha = pixels.image_and_alpha(self.files[index], **options)
        example: dict[str, Any] = {"x0": pixels.centre_crop(image, self.size)}
        if self.weigh_alpha:
            example["weight"] = pixels.centre_crop(alpha, self.size)[..., 0]
        return {**example, "cond": {key: rows[index] for key, rows in self.cond.items()}} if self.cond else example


def image_folder(
    folder: str,
    *,
    size: int = 64,
    channels: int = 3,
    class_names: tuple[str, ...] | None = None,
    background: str | tuple[int, ...] | None = None,
    weigh_alpha: bool = False,
) -> ImageFolder:
    """Pictures `[size, size, channels]` in [-1, 1]: `folder/class/picture.png` with labels, or `folder/picture.png`.

    The shorter side is resized to `size` and the middle square kept; `pixels.as_image` says how files become pixels.
    class_names: of the subfolders, in the order of their numbers; all subfolders in alphabetical order when None, also
        those without a picture. A run stores the names of its training data, and held-out data take them from there.
    background: what is seen where a picture is transparent, such as "white"; None refuses such a picture when it is
        read (`data.check_finite(source)` reads them all beforehand).
    weigh_alpha: gives examples `weight [size, size]`, how opaque each pixel is, as the weight of its loss: what is
        transparent is not learned at all (`objectives.denoising`).

    Raises InvalidInput for a folder without pictures, classes mixed with loose pictures, and a subfolder that
    class_names lack. Files that are no pictures, and classes without any, are told in a warning.
    """
    root, files, others = _listed(folder, size, channels, background)
    loose = [path for path in files if path.parent == root]
    fields: dict[str, Any] = {"background": background, "weigh_alpha": weigh_alpha, "left_out": others}
    _tell(root, others)
    if len(loose) == len(files):
        if class_names is not None:
            raise invalid("class_names", tuple(class_names), f"{str(root)!r} has no subfolder with pictures of a class")
        return ImageFolder(files, {}, size, channels, str(root), **fields)
    if loose:
        raise InvalidInput(
            f"{str(root)!r} mixes class subfolders with loose images such as {loose[0].name!r}: move those."
        )
    parents = [path.relative_to(root).parts[0] for path in files]
    names = tuple(_subfolders(root) if class_names is None else class_names)
    labels = np.asarray(numbered(parents, names, repr(str(root))), np.int32)
    if empty := sorted(set(names) - set(parents)):
        warnings.warn(f"{_some(empty)} in {str(root)!r} has no picture; the number of the class stays.", stacklevel=2)
    return ImageFolder(files, {"label": labels}, size, channels, str(root), names, **fields)


def captioned_folder(
    folder: str,
    *,
    size: int = 64,
    channels: int = 3,
    captions: str = "auto",
    text_column: str = "text",
    tokenizer: Any = None,
    length: int = 64,
    without_caption: str = "refuse",
    background: str | tuple[int, ...] | None = None,
    weigh_alpha: bool = False,
) -> ImageFolder:
    """Pictures with captions: `picture.txt` beside each, or `metadata.jsonl`, `metadata.csv` or `captions.csv`.

    captions: "auto" reads all of these that are there; "txt", or one of the names, reads that alone. Tables have the
        columns `file_name` and `text_column`, file names relative to the table, as Hugging Face's imagefolder has them.
    tokenizer: what makes `cond["tokens"] [length]` and `cond["tokens_mask"]` of them for `models.text`, such as
        `data.byte_tokenizer()` or `interop.load_tokenizer(folder)`. None: the strings stay in `source.captions`, for
        `encoded_captions` and a text encoder. Captions of more than `length` tokens are cut, which is told.
    without_caption: "refuse", or "drop" the picture, or take the "empty" caption.
    The rest as in `image_folder`.

    Raises InvalidInput for a picture with two captions that differ, a caption without a picture, and, unless told what
    to do with it, a picture without a caption.
    """
    if without_caption not in WITHOUT_CAPTION:
        raise unknown("without_caption", without_caption, WITHOUT_CAPTION)
    root, files, others = _listed(folder, size, channels, background)
    texts, used = read_captions(files, others, captions, text_column)
    others = tuple(path for path in others if path not in used)
    _tell(root, others)
    bare = [path for path in files if path not in texts]
    if len(bare) == len(files):
        raise InvalidInput(f"No picture in {str(root)!r} has a caption (captions={captions!r}).")
    if bare and without_caption == "refuse":
        raise InvalidInput(
            f"{len(bare)} of {len(files)} pictures in {str(root)!r} have no caption: "
            f"{_some([str(path.relative_to(root)) for path in bare])}; write them, or give without_caption='drop' or "
            "'empty'."
        )
    if without_caption == "drop":
        files = tuple(path for path in files if path in texts)
    words = tuple(texts.get(path, "") for path in files)
    cond = {} if tokenizer is None else tokenized(words, tokenizer, length, str(root))
    return ImageFolder(files, cond, size, channels, str(root), None, words, tokenizer, background, weigh_alpha, others)


def encoded_captions(
    source: ImageFolder, encode: Callable[[Sequence[str]], Mapping[str, Any]], batch: int = 64
) -> ImageFolder:
    """`source` with `encode(captions)` as its condition, computed once and held in memory.

    encode: so many strings to a dict of arrays with as many rows, such as the `context` of a text encoder:
        `lambda texts: pipeline.prompter.main(texts, (512, 512))` of a published checkpoint. Every call has `batch`
        strings, so it compiles once; equal captions are encoded once.
    """
    if source.captions is None:
        raise InvalidInput(f"{source.name!r} has no captions: it was not made by captioned_folder.")
    if batch < 1:
        raise invalid("batch", batch, "it must be positive")
    texts = sorted(set(source.captions))
    place = {text: row for row, text in enumerate(texts)}
    parts = []
    for start in range(0, len(texts), batch):
        # The last ones are repeated until the batch is full.
        rows = np.minimum(np.arange(start, start + batch), len(texts) - 1)
        made = encode([texts[row] for row in rows])
        parts.append({key: np.asarray(value)[: len(texts) - start] for key, value in made.items()})
    rows = np.asarray([place[text] for text in source.captions])
    cond = {key: _Repeated(np.concatenate([part[key] for part in parts]), rows) for key in parts[0]}
    return dataclasses.replace(source, cond=cond)


class _Repeated:
    """Rows of an array, some of them several times, without a copy."""

    def __init__(self, values: np.ndarray, rows: np.ndarray):
        self._values, self._rows = values, rows
        self.shape, self.dtype, self.ndim = (len(rows), *values.shape[1:]), values.dtype, values.ndim

    def __getitem__(self, index: Indices | int) -> np.ndarray:
        return self._values[self._rows[index]]

    def __len__(self) -> int:
        return len(self._rows)


def _listed(folder: str, size: int, channels: int, background: Any) -> tuple[Path, tuple[Path, ...], tuple[Path, ...]]:
    """The folder, its pictures and its other files."""
    if size < 1 or channels not in (1, 3):
        raise invalid("size, channels", (size, channels), "size must be at least 1 and channels 1 or 3")
    if background is not None:
        pixels.colour(background)
    return picture_files(folder)


def picture_files(folder: str | os.PathLike) -> tuple[Path, tuple[Path, ...], tuple[Path, ...]]:
    """A folder, the pictures in it and below it in the order of their names, and its other files.

    Raises InvalidInput where there is no folder, or no picture in it.
    """
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


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in LEFT_BEHIND


def _subfolders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name))


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


def _some(names: Sequence[str]) -> str:
    """A few of the names, and how many there are besides."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + rest


def _tell(root: Path, others: Sequence[Path]) -> None:
    if others:
        named = _some([str(path.relative_to(root)) for path in others])
        count = "1 file" if len(others) == 1 else f"{len(others)} files"
        warnings.warn(f"{count} in {str(root)!r} left out, no pictures by their names: {named}.", stacklevel=3)
