"""Sets of images to be measured: a folder of pictures, an NPZ file, the samples of a run, or any source of data.

Whatever they come from, images are measured as 8 bits a channel, which is what a picture file holds: floats in [-1, 1]
are clipped and rounded. So the same images give the same numbers as files, as arrays and as samples of a run.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax import pictures, pixels, reading
from diffusion_jax.commands.image_files import GENERATED
from diffusion_jax.data.captions import TABLES, read_captions
from diffusion_jax.data.picture_files import picture_files
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.shards import read_samples

ON_ERROR = ("refuse", "skip")
"""What happens to a picture file that cannot be decoded."""

ARRAYS = ("arr_0", "x", "images", "x0")
"""Names under which an NPZ file may hold images: guided-diffusion's, a shard's, and two that are usual."""

READERS = 8
"""Threads that decode picture files."""

WANTED = "a folder of pictures, an NPZ file or the folder of a run"

"""Beside images of a published checkpoint: what they were asked to show."""


class ImageSet(NamedTuple):
    """Images `[H, W, 1 or 3]` of uint8, of one size or of many.

    name: where they come from, in words. count: how many there are. identity: changes when the images do; None where
    that cannot be known without reading all of them.
    read: (indices in ascending order) -> the images one after another, None for one that is skipped.
    label: (index) -> what an image is called. root, files, others: a folder of pictures, these, and the files beside.
    """

    name: str
    count: int
    identity: str | None
    read: Callable[[Sequence[int]], Iterator[np.ndarray | None]]
    label: Callable[[int], str]
    root: Path | None = None
    files: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()


def open_images(path: str | os.PathLike, background: str | None = None, on_error: str = "refuse") -> ImageSet:
    """The images of a folder of pictures, an NPZ file, a run (its samples), or a folder of shards.

    background: a colour, seen where a picture is transparent. on_error: "refuse" a picture that cannot be decoded, or
    "skip" it. Raises InvalidInput where there are no images.
    """
    if on_error not in ON_ERROR:
        raise unknown("on_error", on_error, ON_ERROR)
    if background is not None:
        pixels.colour(background)
    root = Path(path).expanduser()
    if root.is_dir():
        if is_run(root):
            return _of_shards(root / "samples", f"samples of the run {root}")
        if any(root.glob("samples-*-of-*.npz")):
            return _of_shards(root, f"samples in {root}")
        return _of_folder(root, background, on_error)
    if not os.path.lexists(root):
        raise InvalidInput(f"{root} does not exist: {WANTED} is needed.")
    if root.suffix != ".npz":
        raise invalid("the images", str(root), f"{WANTED} is needed")
    return _of_archive(root)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / "config.json").is_file() and ((folder / "checkpoints").is_dir() or (folder / "samples").is_dir())


def holds_images(archive: Path) -> bool:
    """Whether an NPZ file has an array of images."""
    return any(name in ARRAYS for name in reading.array_shapes(archive))


def source_images(source: Any, name: str) -> ImageSet:
    """The x0 of a source of data, such as what a run held out."""

    def read(indices):
        for index in indices:
            yield as_bytes(np.asarray(source[int(index)]["x0"]), f"x0 of {name}")

    files, count = getattr(source, "files", ()), len(source)
    # Known where each example is one file, and what the source says of itself is how it reads them: size, background.
    known = len(files) == count and dataclasses.is_dataclass(source)
    identity = digest_of([repr(source), *map(_stat, files)]) if known else None
    return ImageSet(name, count, identity, read, lambda index: f"{index}")


def digest_of(value: Any) -> str:
    """A digest of what JSON can hold, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def as_bytes(image: np.ndarray, name: str) -> np.ndarray:
    """One image as uint8 `[H, W, 1 or 3]`: floats in [-1, 1] are clipped and rounded, bytes stay.

    Raises InvalidInput for another shape and for a NaN or an infinity.
    """
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or not image.size:
        hint = "; latents must be decoded before they are measured" if image.ndim == 3 else ""
        told = f"{image.dtype}{list(image.shape)}"
        raise invalid(name, told, f"images [H, W, C] with 1 or 3 channels are measured{hint}")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InvalidInput(f"{name} holds a NaN or an infinity: it is no image.")
    return pictures.to_uint8(image)


def _stat(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


def _of_folder(root: Path, background: str | None, on_error: str) -> ImageSet:
    root, files, others = picture_files(root)
    if (root / GENERATED).is_file():
        # What lies beside the images, such as a grid of all of them, is none of them.
        files = tuple(path for path in files if re.fullmatch(r"\d{5,}", path.stem)) or files

    def one(index):
        try:
            picture = pixels.as_image(files[index], channels=3, background=background)
        except reading.Unreadable:
            raise
        except InvalidInput as error:
            if on_error == "skip":
                return None
            told, _, hint = str(error).partition(": give background")
            mend = "--background=white, say, tells what is seen there" if hint else "--on-error=skip leaves such out"
            raise InvalidInput(f"{told.rstrip('.')}: {mend}.") from None
        return pictures.to_uint8(picture)

    def read(indices):
        indices = list(indices)
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(indices), 4 * READERS):
                yield from pool.map(one, indices[start : start + 4 * READERS])

    identity = digest_of([background, on_error, *map(_stat, files)])

    def label(index):
        return str(files[index].relative_to(root))

    return ImageSet(str(root), len(files), identity, read, label, root, files, others)


def _of_shards(folder: Path, name: str) -> ImageSet:
    if not folder.is_dir():
        raise InvalidInput(f"{folder} does not exist: draw samples with `diffusion-jax sample --workdir=...` first.")
    samples = read_samples(folder)
    if "x" not in samples:
        raise InvalidInput(f"{folder} holds joint samples ({', '.join(samples)}), but images are measured.")
    shards = sorted(folder.glob("samples-*-of-*.npz"))
    return of_array(samples["x"], name, digest_of([_stat(path) for path in shards]))


def of_array(values: np.ndarray, name: str, identity: str | None = None) -> ImageSet:
    """Images `[N, H, W, C]`, uint8 or floats in [-1, 1]."""
    if values.ndim != 4:
        told = f"{values.dtype}{list(values.shape)}"
        raise invalid(name, told, "images [N, H, W, C] are measured here; other data has metrics of its config")
    if values.dtype != np.uint8:
        values = pixels.scaled(values, name)
        pixels.check_signed(values, name)

    def read(indices):
        return (as_bytes(values[index], name) for index in indices)

    return ImageSet(name, len(values), identity, read, lambda index: f"{index}")


def _of_archive(file: Path) -> ImageSet:
    """Images of an NPZ file, which may be larger than the memory."""
    shapes = reading.array_shapes(file)
    name = next((name for name in ARRAYS if name in shapes), None)
    if name is None:
        has = ", ".join(shapes) or "nothing"
        raise InvalidInput(f"{file} holds {has}, but images are expected under one of the names {', '.join(ARRAYS)}.")
    shape, dtype = shapes[name]
    where = f"{name} of {file}"
    if len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise invalid(where, f"{dtype}{list(shape)}", "images [N, H, W, C] with 1 or 3 channels are needed")
    if dtype != np.uint8:
        return of_array(reading.read_members(file, [name])[name], where, digest_of(_stat(file)))

    def read(indices):
        wanted = iter(indices)
        following = next(wanted, None)
        for number, row in enumerate(reading.array_rows(file, name)):
            if number == following:
                yield row
                following = next(wanted, None)
            if following is None:
                return

    return ImageSet(str(file), shape[0], digest_of(_stat(file)), read, lambda index: f"{index}")


def prompts_of(images: ImageSet, file: str | os.PathLike | None = None) -> list[str]:
    """What each image should show, in the order of the images.

    file: `generated.json`, `metadata.jsonl`, `captions.csv`, or a text file with a prompt a line; what lies beside the
    images when None. Raises InvalidInput where some image has none.
    """
    root = images.root
    if file is None:
        if root is None:
            raise InvalidInput(f"Nothing beside the {images.name} tells what they should show: give --prompts=FILE.")
        beside = [folder / GENERATED for folder in (root, root.parent) if (folder / GENERATED).is_file()]
        if not beside:
            return _captions(images, images.others, str(root))
        file = beside[0]
    path = reading.regular_file(Path(file).expanduser())
    if path.name in TABLES:
        return _captions(images, (path,), str(path), path.name)
    if path.suffix == ".json":
        texts = _generated(reading.read_json(path), images, path)
    else:
        texts = [line.strip() for line in reading.read_text(path).splitlines() if line.strip()]
    if len(texts) != images.count:
        raise invalid(f"the number of prompts in {path}", len(texts), f"there are {images.count} images")
    return texts


def _captions(images, others, where, table="auto"):
    if not images.files:
        raise InvalidInput(f"Captions in {where} are by file name, but {images.name} is no folder of pictures.")
    texts, _ = read_captions(images.files, others, table)
    bare = [path.name for path in images.files if path not in texts]
    if bare:
        raise InvalidInput(
            f"{len(bare)} of {images.count} images have no prompt in {where}, such as {bare[0]!r}: write captions "
            "beside them (NAME.txt, metadata.jsonl or captions.csv), or give --prompts=FILE."
        )
    return [texts[path] for path in images.files]


def _generated(told: Mapping[str, Any], images: ImageSet, path: Path) -> list[str]:
    """The prompts in the JSON that `sample` writes: what all images share, and a list of what is each one's own."""
    entries = told.get("images")
    if isinstance(entries, list) and all(isinstance(entry, Mapping) for entry in entries):
        named = {path.parent / str(entry.get("file")): entry.get("prompt", told.get("prompt")) for entry in entries}
        texts: list[Any] = [named.get(file) for file in images.files]
    else:
        prompts, repeats = told.get("prompt"), told.get("images_per_prompt", 1)
        prompts = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, list) else []
        texts = [text for text in prompts for _ in range(repeats if isinstance(repeats, int) else 0)]
    known = [text for text in texts if isinstance(text, str)]
    if not texts or len(known) != len(texts):
        raise InvalidInput(f"{path} does not say a prompt for each of {images.count} images in {images.name}.")
    return known
