"""Reading files that came from elsewhere: regular files alone, within stated bounds, and every refusal names the file.

A fifo, a socket or a device is never opened, for that could wait for ever; JSON is bounded in bytes and in depth,
archives in what they unpack to, pictures in pixels. Nothing is unpickled, and no file can run code.
"""

import errno
import gzip
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import InvalidInput

MAX_JSON_BYTES = 2**25
"""32 MiB: many times the largest index or vocabulary that is published."""

MAX_JSON_DEPTH = 64
"""How deep dicts and lists of a JSON file may be nested."""

UNPACKED_BYTES, MAX_EXPANSION = 2**28, 100
"""An archive may unpack to 256 MiB whatever its size, and beyond that to 100 times its size."""

MAX_PIXELS = 2**27
"""134 million: more than cameras give, less than what would fill the memory."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What a picture may be, whatever its name: other decoders of Pillow call programs of the machine."""

SPECIAL = {
    stat.S_ISFIFO: "a fifo",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


class Unreadable(InvalidInput):
    """What is there and cannot be read now, or is no file: not to be taken for damaged, and never replaced."""


def regular_file(path: str | os.PathLike, max_bytes: int | None = None) -> Path:
    """`path`, where it is a regular file that can be looked at, of at most `max_bytes`; links are followed.

    Raises InvalidInput for what does not exist, a folder, a fifo, a socket, a device or a larger file. To be called
    before any library opens the path.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name with a null byte is a ValueError
        raise InvalidInput(f"{_named(path)} does not exist.") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if stat.S_ISDIR(found.st_mode):
        raise Unreadable(f"{_named(path)} is a folder, but a file is needed.")
    for test, kind in SPECIAL.items():
        if test(found.st_mode):
            raise Unreadable(f"{_named(path)} is {kind}, but a regular file is needed.")
    if max_bytes is not None and found.st_size > max_bytes:
        raise InvalidInput(f"{_named(path)} has {found.st_size} bytes, but at most {max_bytes} are read of one.")
    return path


def unreadable(path: str | os.PathLike, error: BaseException) -> Unreadable:
    """The error for a file that is there and cannot be read now: a permission, too many open files, no memory."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
    hint = "; close other files or raise the limit (ulimit -n)" if getattr(error, "errno", 0) == errno.EMFILE else ""
    return Unreadable(f"{_named(path)} cannot be read: {reason}{hint}.")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    if type(error).__name__ == "UnidentifiedImageError":  # Pillow's words show an object of Python
        return "its content is of no kind of picture that is read here"
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__


def _named(path: str | os.PathLike) -> str:
    """The path as a message shows it: control characters and lone surrogates escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`."""
    file = regular_file(path, max_bytes)
    try:
        return file.read_bytes()
    except (OSError, MemoryError) as error:
        raise unreadable(file, error) from None


def read_text(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The content of a regular file of at most `max_bytes`, which must be UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{_named(path)} is not UTF-8 text: {error}.") from None


def read_gzip(path: str | os.PathLike, max_bytes: int = UNPACKED_BYTES) -> bytes:
    """What a gzip file unpacks to, of which more than `max_bytes` are never unpacked. Raises InvalidInput for more, and
    for a file that is damaged or no gzip."""
    file = regular_file(path)
    try:
        with gzip.open(file) as opened:
            content = opened.read(max_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{_named(file)} is damaged, or no gzip file: {first_line(error)}.") from None
    except (OSError, MemoryError) as error:
        raise unreadable(file, error) from None
    if len(content) > max_bytes:
        raise InvalidInput(f"{_named(file)} unpacks to more than {max_bytes} bytes, which are the most that are read.")
    return content


def read_json(
    path: str | os.PathLike,
    kind: type | tuple[type, ...] = dict,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
) -> Any:
    """What a JSON file holds, which must be of `kind` (a dict, unless said otherwise).

    Raises InvalidInput, with the file's name, where it is not there, no regular file, too large, no JSON, nested too
    deep or of another kind.
    """
    return parse_json(read_bytes(path, max_bytes), _named(path), kind, max_depth=max_depth)


def parse_json(
    text: str | bytes, where: str, kind: type | tuple[type, ...] = dict, *, max_depth: int = MAX_JSON_DEPTH
) -> Any:
    """What a JSON text holds, as `read_json` of a file. where: what messages call it, "FILE: its metadata"."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{where} is not JSON: {first_line(error)}.") from None
    except RecursionError:
        raise InvalidInput(f"{where} is nested too deep: at most {max_depth} levels are read.") from None
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise InvalidInput(
            f"{where} holds a JSON {type(value).__name__}, but a {' or '.join(k.__name__ for k in kinds)} is needed."
        )
    _check_depth(value, where, max_depth)
    return value


def _check_depth(value: Any, where: str, max_depth: int) -> None:
    level, depth = [value], 0
    while level := [entry for node in level for entry in _entries(node)]:
        depth += 1
        if depth > max_depth:
            raise InvalidInput(f"{where} is nested too deep: at most {max_depth} levels are read.")


def _entries(node: Any) -> Iterable[Any]:
    """The dicts and lists directly within a dict or a list."""
    within = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return (entry for entry in within if isinstance(entry, dict | list))


def file_within(folder: Path, name: Any, named_by: str | os.PathLike) -> Path:
    """The file `name` of `folder`, as the file `named_by` (an index) gives it.

    Raises InvalidInput for what is no string, is absolute or leaves the folder by `..`. Links within the folder are
    followed: Hugging Face's cache is made of them.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidInput(f"{_named(named_by)} names the file {name!r}, but a file name is needed.")
    parts = name.replace("\\", "/").split("/")
    if Path(name).is_absolute() or parts[0] in ("", "~") or ":" in parts[0] or ".." in parts:
        raise InvalidInput(f"{_named(named_by)} names the file {name!r}, which lies outside of its folder.")
    return folder / name


def read_array(path: str | os.PathLike, *, mmap: bool = False) -> np.ndarray:
    """The array of a `.npy` file, memory-mapped with `mmap`. Raises InvalidInput for anything else."""
    file = regular_file(path)
    try:
        with file.open("rb") as opened:
            _check_header(opened, file.stat().st_size)
        return np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception as error:
        raise _no_numpy(_named(file), error) from None


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name.

    Raises InvalidInput for a file that is damaged, needs pickle, or unpacks to more than `MAX_EXPANSION` times its size
    and `UNPACKED_BYTES`; every declared size is checked before anything is unpacked.
    """
    return read_members(path, None)


def read_members(path: str | os.PathLike, names: Collection[str] | None) -> dict[str, np.ndarray]:
    """`read_arrays` of those of `names` that the file has, all of them when None; the others are not unpacked."""
    file = regular_file(path)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            total, there = sum(member.file_size for member in members), file.stat().st_size
            if total > max(UNPACKED_BYTES, MAX_EXPANSION * there):
                raise InvalidInput(
                    f"{_named(file)} has {there} bytes that unpack to {total}, but at most {MAX_EXPANSION} times its "
                    f"size or {UNPACKED_BYTES} bytes are read; store it without compression (numpy.savez)."
                )
            for member in members:
                with archive.open(member) as opened:
                    _check_header(opened, member.file_size)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if names is None or name in names}
    except Exception as error:
        raise _no_numpy(_named(file), error) from None


def array_shapes(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array of a `.npz` file by name; no array is read. Raises InvalidInput as `read_arrays`
    does, whatever the arrays unpack to."""
    file = regular_file(path)
    try:
        found = {}
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as opened:
                    found[member.filename.removesuffix(".npy")] = _check_header(opened, member.file_size)
        return found
    except Exception as error:
        raise _no_numpy(_named(file), error) from None


def array_rows(path: str | os.PathLike, name: str) -> Iterator[np.ndarray]:
    """The rows of an array of a `.npz` file one after another, of which one at a time is in memory."""
    file = regular_file(path)
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as opened:
            shape, fortran, dtype = _header(opened)
            if fortran or not shape or dtype.hasobject:
                raise ValueError(f"{name!r} is not stored row by row")
            size = math.prod(shape[1:]) * dtype.itemsize
            if size > UNPACKED_BYTES:
                raise ValueError(f"a row of {name!r} has {size} bytes, but at most {UNPACKED_BYTES} are read of one")
            for _ in range(shape[0]):
                row = opened.read(size)
                if len(row) != size:
                    raise ValueError(f"{name!r} ends early")
                yield np.frombuffer(row, dtype).reshape(shape[1:])
    except Exception as error:
        raise _no_numpy(_named(file), error) from None


def _header(opened: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype, as the header of a `.npy` announces them."""
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(opened)


def _check_header(opened: Any, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a `.npy`. Raises ValueError where its header announces more, or less, than `size` bytes have
    in all."""
    shape, _, dtype = _header(opened)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != size - opened.tell():
        raise ValueError(f"it announces {list(shape)} of {dtype}, which is not what it holds")
    return shape, dtype


def _no_numpy(name: str, error: Exception) -> InvalidInput:
    """A refusal that was made already, a file that cannot be read now, or one that is damaged."""
    if isinstance(error, InvalidInput):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
        return unreadable(name, error)
    return InvalidInput(f"{name} is damaged, or no NumPy file that can be read without pickle: {first_line(error)}.")


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Any:
    """The picture of a file as Pillow decodes it, whole and closed.

    Raises InvalidInput for what is no regular file, none of `IMAGE_FORMATS`, damaged, of several frames, or larger than
    `max_pixels`, which is known before anything is decoded. Neither turned by its EXIF orientation nor converted.
    """
    return _read_picture(path, lambda image: image.load(), max_pixels)


def read_image_header(path: str | os.PathLike) -> Any:
    """The picture of a file as Pillow opens it, closed and not decoded: its size, mode and EXIF are known.

    Raises InvalidInput as `read_image` does, but does not see what is damaged behind the header.
    """
    return _read_picture(path, lambda image: image.getexif(), MAX_PIXELS)


def _read_picture(path: str | os.PathLike, read: Callable[[Any], Any], max_pixels: int) -> Any:
    from PIL import Image

    file = regular_file(path)
    name = _named(file)
    try:
        with file.open("rb") as opened:
            # Pillow's own bound is looked at while it opens the file, and lies above ours.
            image = Image.open(opened, formats=IMAGE_FORMATS)
            if math.prod(image.size) > max_pixels:
                raise InvalidInput(
                    f"{name} has {image.width} x {image.height} pixels, but at most {max_pixels} are decoded; make it "
                    "smaller."
                )
            check_frames(image, name)
            read(image)
            return image
    except InvalidInput:
        raise
    except OSError as error:
        if error.errno is not None:
            raise unreadable(file, error) from None
        raise InvalidInput(f"{name} cannot be decoded as a picture: {first_line(error)}.") from None
    except Exception as error:  # decoders raise whatever their parsing comes upon
        raise InvalidInput(f"{name} cannot be decoded as a picture: {first_line(error)}.") from None


def check_frames(image: Any, name: str) -> None:
    """Raises InvalidInput for a Pillow image of several frames or pages, of which nobody said which one is meant.

    The first of a camera's JPEG (MPO) is the picture, what follows are its thumbnail and its depth.
    """
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise InvalidInput(f"{name} has several frames, but one picture is needed: store the one that is meant.")
