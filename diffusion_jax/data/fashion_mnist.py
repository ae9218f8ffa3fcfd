"""Fashion-MNIST (Xiao et al. 2017): 70,000 real pictures of garments, 28 x 28 and grey, in ten classes.

They are read from where the Debian package dataset-fashion-mnist puts them (MIT licence, 31 MB), or from another folder
with the same four files. `read_idx` reads any file of the format, which that of MNIST and its other successors is.
"""

import os
from math import prod
from pathlib import Path

import numpy as np

from diffusion_jax.data.sources import ArraySource, as_labels, check_split
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.reading import read_gzip

FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian and Ubuntu put the files."""

GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""What the labels 0 .. 9 mean."""

SIDE, BORDERED = 28, 32
"""Pixels a side of the pictures, and with two of background around them."""

SIZES = (28, 14, 7, 32, 16, 8, 4)
"""Divisors of the one and of the other."""

UNSIGNED_BYTES = 0x08
"""The one type of numbers in IDX files that is pixels or labels."""


def fashion_mnist(
    split: str = "train", size: int = 28, length: int | None = None, folder: str | None = None
) -> ArraySource:
    """Garments `[N, size, size, 1]` in [-1, 1], -1 the background, with `label` 0 .. 9 (`class_names`).

    split: "train" (60,000) or "test" (10,000), as published.
    size: 28 as they are, 14 or 7 by means over blocks of pixels; 32 with two pixels of background on each side, and 16,
        8 or 4 by means over blocks of that.
    length: the first so many; all when None. folder: with the four files, where they are not in `FOLDER`.

    Raises InvalidInput, with the command that installs them, where the files are not there; and for damaged ones.
    """
    check_split(split)
    if size not in SIZES:
        raise invalid("size", size, f"one of {', '.join(map(str, SIZES))} was expected")
    if length is not None and length < 1:
        raise invalid("length", length, "it must be at least 1")
    part = {"train": "train", "test": "t10k"}[split]
    images = read_idx(_file(folder, f"{part}-images-idx3-ubyte.gz"))
    labels = read_idx(_file(folder, f"{part}-labels-idx1-ubyte.gz"))
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1]:
        told = f"{images.shape} and {labels.shape}"
        raise invalid("the shapes of images and labels of Fashion-MNIST", told, "[N, 28, 28] and [N] were expected")
    images, labels = images[:length], as_labels(labels[:length], "a label of Fashion-MNIST", len(GARMENTS))
    name = f"fashion_mnist/{split}"
    return ArraySource(_sized(images, size), {"label": labels}, name, num_classes=len(GARMENTS), class_names=GARMENTS)


def _file(folder: str | None, name: str) -> Path:
    file = Path(FOLDER if folder is None else folder) / name
    if not file.exists():
        raise InvalidInput(
            f"{file} does not exist: install Fashion-MNIST (apt-get install dataset-fashion-mnist), or give the folder "
            "that has its four files."
        )
    return file


def _sized(images: np.ndarray, size: int) -> np.ndarray:
    if BORDERED % size == 0:
        border = (BORDERED - SIDE) // 2
        images = np.pad(images, ((0, 0), (border, border), (border, border)))
    block = images.shape[1] // size
    blocks = images.reshape(len(images), size, block, size, block)
    return (blocks.mean(axis=(2, 4), dtype=np.float32) / np.float32(127.5) - 1.0)[..., None]


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array of unsigned bytes in a gzip IDX file, uint8 of the shape that it announces.

    Raises InvalidInput where the file is damaged, no such file, of another type of numbers, or announces more or less
    than it holds.
    """
    content = read_gzip(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise InvalidInput(f"{path} is no IDX file, as those of MNIST are.")
    if content[2] != UNSIGNED_BYTES:
        raise InvalidInput(f"{path} holds numbers of type {content[2]:#x}, but unsigned bytes are needed (0x8).")
    axes = content[3]
    body = content[4 + 4 * axes :]
    shape = (
        tuple(int(n) for n in np.frombuffer(content[4 : 4 + 4 * axes], ">u4")) if len(content) >= 4 + 4 * axes else ()
    )
    if len(shape) != axes or prod(shape) != len(body) or not axes:
        raise InvalidInput(f"{path} announces the shape {list(shape)}, which is not that of its {len(body)} bytes.")
    return np.frombuffer(body, np.uint8).reshape(shape)
