"""Folders of pictures as sources: with classes, with captions, or without either; of one size, or of a few.

    folder/class/picture.png                  classes, numbered in the order of `class_names`
    folder/picture.png                        no condition
    folder/picture.png + picture.txt          captions: beside each picture, in metadata.jsonl, metadata.csv or
                                              captions.csv (`captioned_folder`)

Which files are pictures, and which of them are held out, is in `picture_files`; what a file becomes, in `pixels`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.buckets import bucket_sizes, nearest_bucket
from diffusion_jax.data.captions import read_captions, tokenized
from diffusion_jax.data.picture_files import (
    class_folders,
    class_of_each,
    file_state,
    folder_summary,
    held_out_rows,
    listed_problems,
    picture_files,
    some_of,
    unusable,
    warn_left_out,
)
from diffusion_jax.data.sources import Indices, numbered
from diffusion_jax.errors import InvalidInput, invalid, unknown

WITHOUT_CAPTION = ("refuse", "drop", "empty")
ON_ERROR = ("refuse", "skip")

MEMORY = 2**30
"""Bytes of a folder's pictures, at the size that they are trained at, up to which they are decoded only once."""

MOST_CHECKED = 10_000
"""Pictures that `ImageFolder.check` reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """Pictures of a folder, decoded when they are asked for; see `image_folder` and `captioned_folder`.

    cond: what is known of them, arrays `[N, ...]`. sizes, bucket: the sizes that pictures are brought to, and the
    number of each one's. left_out: files that are no pictures. skipped: pictures that cannot be used.
    held_out: those of the folder that are not to be trained on.
    """

    files: tuple[Path, ...]
    cond: Mapping[str, Any]
    sizes: tuple[tuple[int, int], ...]
    bucket: np.ndarray
    channels: int
    name: str
    class_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    tokenizer: Any = None
    length: int | None = None
    background: str | tuple[int, ...] | None = None
    weigh_alpha: bool = False
    fit: str = "crop"
    left_out: tuple[Path, ...] = ()
    skipped: tuple[Path, ...] = ()
    held_out: "ImageFolder | None" = None
    decoded: dict[Path, tuple[Any, dict]] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture; of the largest group of them where they have several sizes."""
        return (*self.sizes[np.bincount(self.bucket, minlength=len(self.sizes)).argmax()], self.channels)

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
        example = self._pixels(self.files[index], self.sizes[self.bucket[index]])
        return {**example, "cond": {key: rows[index] for key, rows in self.cond.items()}} if self.cond else example

    def _pixels(self, file: Path, size: tuple[int, int]) -> dict:
        """x0 and its weight; kept while the file is the same, where all pictures together are small."""
        kept, now = None if self.decoded is None else self.decoded.get(file), file_state(file)
        if kept is not None and kept[0] == now:
            return kept[1]
        image, alpha = pixels.image_and_alpha(file, channels=self.channels, background=self.background)
        border = pixels.colour("black" if self.background is None else self.background)
        example: dict[str, np.ndarray] = {
            "x0": pixels.to_size(image, size, self.fit, border if self.channels == 3 else border @ pixels.GREY)
        }
        if self.weigh_alpha:
            example["weight"] = pixels.to_size(alpha, size, self.fit, 0.0)[..., 0]
        if self.decoded is not None:
            for array in example.values():
                array.setflags(write=False)
            self.decoded[file] = (now, example)
        return example

    def check(self) -> None:
        """Raises InvalidInput, naming the first of them, where pictures cannot be used.

        All are read, those that are held out too; of more than `MOST_CHECKED`, so many, spread evenly.
        """
        every = (*self.files, *(self.held_out.files if self.held_out else ()))
        rows = np.unique(np.linspace(0, len(every) - 1, MOST_CHECKED).astype(np.int64))
        looked_at = [every[row] for row in rows]
        if problems := self._unusable(looked_at):
            raise InvalidInput(
                f"{listed_problems(Path(self.name), problems, len(looked_at))}; mend or remove them, or leave them out "
                "by on_error='skip' (--config.data.on_error=skip, or --on-error=skip of encode)."
            )

    def _unusable(self, files: Sequence[Path]) -> dict[Path, str]:
        buckets = dict(zip(self.files, self.bucket))
        buckets |= dict(zip(self.held_out.files, self.held_out.bucket)) if self.held_out else {}
        return unusable(
            files, lambda file: self._pixels(file, self.sizes[buckets[file]]), f"pixels on {self.background}"
        )

    def rows(self, chosen: np.ndarray) -> "ImageFolder":
        """Those pictures alone for which `chosen`, bool `[N]`, is true; none of them held out."""
        numbers = np.flatnonzero(chosen)
        return dataclasses.replace(
            self,
            files=tuple(self.files[row] for row in numbers),
            cond={key: values[numbers] for key, values in self.cond.items()},
            bucket=self.bucket[numbers],
            captions=None if self.captions is None else tuple(self.captions[row] for row in numbers),
            held_out=None,
        )


def image_folder(
    folder: str,
    *,
    size: int | tuple[int, int] | None = 64,
    channels: int | None = 3,
    classes: bool = True,
    class_names: tuple[str, ...] | None = None,
    fit: str = "crop",
    buckets: int | tuple[tuple[int, int], ...] | None = None,
    background: str | tuple[int, ...] | None = None,
    weigh_alpha: bool = False,
    on_error: str = "refuse",
    held_out: float = 0.0,
) -> ImageFolder:
    """Pictures `[size, size, channels]` in [-1, 1]: `folder/class/picture.png` with labels, or `folder/picture.png`.

    `pixels.as_image` says how files become pixels.
    size: the side in pixels, or height and width; None chooses the side by the pictures (`folder_summary`).
    channels: 3, or 1 for grey; None for what the pictures have.
    classes: False reads subfolders as if all pictures lay in one folder.
    class_names: of the subfolders, in the order of their numbers; all subfolders in alphabetical order when None, also
        those without a picture. A run stores the names of its training data.
    fit: "crop" resizes the shorter side and keeps the middle; "stretch" changes the picture's shape; "pad" keeps all of
        the picture and fills up with the background (with black, without one).
    buckets: trains on several sizes of about size x size pixels, each picture at the nearest aspect: how many, chosen
        by the pictures, or their heights and widths. A batch has one size, so a network is compiled once for each.
    background: what is seen where a picture is transparent, such as "white"; None refuses such a picture when it is
        read (`ImageFolder.check` reads them all beforehand, as `train` does).
    weigh_alpha: gives examples `weight [size, size]`, how opaque each pixel is, as the weight of its loss: what is
        transparent is not learned at all (`objectives.denoising`).
    on_error: what happens to a picture that cannot be read: "refuse", or "skip", for which all are read at once; how
        many are skipped, and the first of them, is told in a warning.
    held_out: which share of the pictures is kept from training, as `source.held_out`: chosen by their content
        (`picture_files`), the same whatever the files are called.

    Raises InvalidInput for a folder without pictures, classes mixed with loose pictures, and a subfolder that
    class_names lack. Files that are no pictures, and classes without any, are told in a warning.
    """
    root, files, others = picture_files(folder)
    warn_left_out(root, others)
    parents = class_of_each(root, files) if classes else []
    cond, names = {}, None
    if not parents and class_names is not None:
        raise invalid("class_names", tuple(class_names), f"{str(root)!r} has no subfolder with pictures of a class")
    if parents:
        names = tuple(class_folders(root) if class_names is None else class_names)
        cond = {"label": np.asarray(numbered(parents, names, repr(str(root))), np.int32)}
        if empty := sorted(set(names) - set(parents)):
            warnings.warn(
                f"{some_of(empty)} in {str(root)!r} has no picture; the number of the class stays.", stacklevel=2
            )
    known = {"class_names": names, "left_out": others}
    look = {"fit": fit, "background": background, "weigh_alpha": weigh_alpha}
    return _source(root, files, cond, size, channels, buckets, on_error, held_out, {**known, **look})


def captioned_folder(
    folder: str,
    *,
    size: int | tuple[int, int] | None = 64,
    channels: int | None = 3,
    captions: str = "auto",
    text_column: str = "text",
    tokenizer: Any = None,
    length: int | None = None,
    without_caption: str = "refuse",
    fit: str = "crop",
    buckets: int | tuple[tuple[int, int], ...] | None = None,
    background: str | tuple[int, ...] | None = None,
    weigh_alpha: bool = False,
    on_error: str = "refuse",
    held_out: float = 0.0,
) -> ImageFolder:
    """Pictures with captions: `picture.txt` beside each, or `metadata.jsonl`, `metadata.csv` or `captions.csv`.

    captions: "auto" reads all of these that are there; "txt", or one of the names, reads that alone. Tables have the
        columns `file_name` and `text_column`, file names relative to the table, as Hugging Face's imagefolder has them.
    tokenizer: what makes `cond["tokens"] [length]` and `cond["tokens_mask"]` of them for `models.text`, such as
        `data.byte_tokenizer()` or `interop.load_tokenizer(folder)`. None: the strings stay in `source.captions`, for
        `encoded_captions` and a text encoder.
    length: in tokens; longer captions are cut, which is told. None takes that of the longest, `MOST_TOKENS` at most.
    without_caption: "refuse", or "drop" the picture, or take the "empty" caption.

    The rest is as in `image_folder`, which says more:
    size: the side in pixels, or height and width; None chooses the side by the pictures.
    channels: 3, or 1 for grey; None for what the pictures have.
    fit: what happens to pictures of another aspect: "crop", "stretch" or "pad".
    buckets: how many sizes of about one area are trained on, or their heights and widths.
    background: what is seen where a picture is transparent; None refuses such a picture.
    weigh_alpha: gives examples `weight [size, size]`, how opaque each pixel is.
    on_error: what happens to a picture that cannot be read: "refuse", or "skip".
    held_out: which share of the pictures is kept from training, as `source.held_out`.

    Raises InvalidInput for a picture with two captions that differ, a caption without a picture, and, unless told what
    to do with it, a picture without a caption.
    """
    if without_caption not in WITHOUT_CAPTION:
        raise unknown("without_caption", without_caption, WITHOUT_CAPTION)
    root, files, others = picture_files(folder)
    texts, used = read_captions(files, others, captions, text_column)
    others = tuple(path for path in others if path not in used)
    warn_left_out(root, others)
    bare = [path for path in files if path not in texts]
    if len(bare) == len(files):
        raise InvalidInput(
            f"No picture in {str(root)!r} has a caption: write NAME.txt beside NAME.png, or "
            "metadata.jsonl, metadata.csv or captions.csv with the columns file_name and "
            f"{text_column} (captions={captions!r})."
        )
    if bare and without_caption == "refuse":
        raise InvalidInput(
            f"{len(bare)} of {len(files)} pictures in {str(root)!r} have no caption: "
            f"{some_of([str(path.relative_to(root)) for path in bare])}; write them, or give without_caption='drop' or "
            "'empty' (--config.data.without_caption=drop)."
        )
    if without_caption == "drop":
        files = tuple(path for path in files if path in texts)
    words = tuple(texts.get(path, "") for path in files)
    cond = {} if tokenizer is None else tokenized(words, tokenizer, length, str(root))
    known = {"captions": words, "tokenizer": tokenizer, "left_out": others}
    known["length"] = cond["tokens"].shape[1] if cond else None
    look = {"fit": fit, "background": background, "weigh_alpha": weigh_alpha}
    return _source(root, files, cond, size, channels, buckets, on_error, held_out, {**known, **look})


def _source(root, files, cond, size, channels, buckets, on_error, held_out, fields) -> ImageFolder:
    """The source of the listed files: without those that cannot be used, and with those that are held out apart."""
    if on_error not in ON_ERROR:
        raise unknown("on_error", on_error, ON_ERROR)
    if fields["fit"] not in pixels.FITS:
        raise unknown("fit", fields["fit"], pixels.FITS)
    if channels not in (1, 3, None):
        raise invalid("channels", channels, "1 (grey), 3 (colour) or None (as the pictures are) is needed")
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise invalid("size", size, "a positive side, or height and width, is needed")
    if fields["background"] is not None:
        pixels.colour(fields["background"])
    if sides is None or channels is None:
        found = folder_summary(str(root))
        sides = (found.size, found.size) if sides is None else sides
        channels = found.channels if channels is None else channels
    sizes, bucket = (sides,), np.zeros(len(files), np.int32)
    if buckets is not None:
        headers = {} if on_error == "refuse" else unusable(files, pixels.read_header, "headers")
        shapes = [(1, 1) if file in headers else pixels.read_header(file).size for file in files]
        sizes = bucket_sizes(shapes, sides, buckets)
        bucket = nearest_bucket(shapes, sizes)
    bytes_each = 4 * (channels + fields["weigh_alpha"]) * max(height * width for height, width in sizes)
    decoded = {} if len(files) * bytes_each <= MEMORY else None
    source = ImageFolder(files, cond, sizes, bucket, channels, str(root), decoded=decoded, **fields)
    if on_error == "skip" and (problems := source._unusable(files)):
        told = listed_problems(root, problems, len(files))
        if len(problems) == len(files):
            raise InvalidInput(f"{told}: none is left.")
        warnings.warn(f"{told}; {'it is' if len(problems) == 1 else 'they are'} skipped.", stacklevel=4)
        chosen = np.asarray([file not in problems for file in files])
        source = dataclasses.replace(source.rows(chosen), skipped=tuple(problems))
    kept = held_out_rows(source.files, held_out)
    if not kept.any():
        return source
    return dataclasses.replace(source.rows(~kept), held_out=source.rows(kept))


def encoded_captions(
    source: ImageFolder, encode: Callable[[Sequence[str]], Mapping[str, Any]], batch: int = 64
) -> ImageFolder:
    """`source` with `encode(captions)` as its condition, computed once and held in memory; what it holds out, too.

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
    held_out = None if source.held_out is None else encoded_captions(source.held_out, encode, batch)
    return dataclasses.replace(source, cond=cond, held_out=held_out)


class _Repeated:
    """Rows of an array, some of them several times, without a copy."""

    def __init__(self, values: np.ndarray, rows: np.ndarray):
        self._values, self._rows = values, rows
        self.shape, self.dtype, self.ndim = (len(rows), *values.shape[1:]), values.dtype, values.ndim

    def __getitem__(self, index: Indices | int) -> np.ndarray:
        return self._values[self._rows[index]]

    def __len__(self) -> int:
        return len(self._rows)
