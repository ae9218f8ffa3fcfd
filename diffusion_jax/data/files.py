"""Data from files: NumPy arrays and ArrayRecord. Nothing is ever unpickled.

Readers and the writers of the formats that are ours. In all of them unsigned integers and bools are pixels, scaled by
the range of their type to [-1, 1] (`pixels.scaled`); signed integers are tokens; floats are taken as they are. Folders
of pictures, latents and tensorflow-datasets have modules of their own.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.sources import ArraySource, as_labels, as_numbers, check_finite
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.reading import first_line, read_array, read_arrays, regular_file
from diffusion_jax.typing import Number

LOOKED_AT = 64
"""Examples of a file that stays on disk whose range is looked at."""


def existing(path: Any, what: str) -> Path:
    """A path that is there. what: what a message calls it."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidInput(f"{what} {str(path)!r} does not exist.")
    return path


def as_data(values: Any, name: str, value_range: tuple[Number, Number] | None = None) -> np.ndarray:
    """x0 of one example or many: pixels as float32 in [-1, 1], tokens as int32, floats as float32.

    value_range: which values are -1 and 1, for pixels of another range or type; see `arrays`.
    """
    if value_range is None and np.issubdtype(values.dtype, np.signedinteger):
        return as_numbers(values, name)
    return pixels.scaled(values, name, value_range)


def as_condition(values: Any, key: str, name: str, num_classes: int | None = None, axes: int = 1) -> np.ndarray:
    """A condition of one example (`axes` 0) or of many (1): labels and other integers as int32, floats as float32.

    Unsigned integers with the axes of a picture, `[H, W, C]`, are pixels; bools, of masks, stay.
    """
    if key == "label":
        return as_labels(values, name, num_classes)
    if values.dtype == bool:
        return values
    if np.issubdtype(values.dtype, np.unsignedinteger) and values.ndim >= axes + 3:
        return pixels.scaled(values, name)
    if np.issubdtype(values.dtype, np.integer):
        return as_numbers(values, name)
    if not jnp.issubdtype(values.dtype, np.floating):
        raise invalid(
            name, f"{values.dtype}{list(values.shape)}", "a condition consists of real numbers; text, of tokens"
        )
    return pixels.scaled(values, name)


class MappedRows:
    """The rows of a `.npy` file that stays on disk, of the type `stored`, converted when they are read.

    Raises InvalidInput where the file was changed, replaced or removed since it was opened: what is mapped is then no
    longer what the run began with, or is gone.
    """

    def __init__(self, file: Path, convert: Callable[[np.ndarray], np.ndarray]):
        self._file, self._convert, self._identity = file, convert, identity(file)
        self._array = read_array(file, mmap=True)
        self.shape, self.stored = self._array.shape, self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if identity(self._file) != self._identity:
            raise InvalidInput(f"{str(self._file)!r} has changed since it was opened: start again to read it as it is.")
        return self._convert(self._array[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def identity(file: Path) -> tuple[int, int, int]:
    """What tells a file from another of its name, or from itself rewritten."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise InvalidInput(f"{str(file)!r} can no longer be read ({error.strerror}).") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def arrays(
    path: str | None = None,
    *,
    x0: Any = None,
    label: Any = None,
    num_classes: int | None = None,
    value_range: tuple[Number, Number] | None = None,
) -> ArraySource:
    """A source from a `.npy` file (x0 alone, memory-mapped), a `.npz` file, or arrays in memory.

    path: an `.npz` holds `x0 [N, ...]` and, if there is one, `label [N]`; every other array in it becomes a condition
        of that name. Unsigned integers (and bools) are pixels, scaled by the range of their type to [-1, 1]; signed
        integers are tokens; floats are taken as they are, and images among them lie in [-1, 1].
    x0, label: arrays instead of a path.
    num_classes: one more than the largest label when None.
    value_range: which values of x0 are -1 and 1 in the place of these rules: (0, 1), (0, 255), (0, 4095) of 12 bits;
        (-1, 1) says that bright images in [0, 1] are meant as they are.

    Raises InvalidInput when the file is missing, damaged, needs pickle, or holds a NaN, for what is no number, floats
    that are images in 0 .. 255, and labels that are no numbers of classes. Images that all lie in [0, 1] are told.
    """
    if (path is None) == (x0 is None):
        raise InvalidInput("arrays needs either a path or x0, and not both.")
    name, content = "arrays", {}
    if path is not None:
        file = existing(path, "The file")
        name = str(file)
        if file.suffix == ".npy":
            x0 = MappedRows(file, lambda rows: as_data(rows, f"x0 of {name}", value_range))
        else:
            content = read_arrays(file)
            if "x0" not in content:
                raise InvalidInput(f"{name!r} holds {sorted(content)}, but an array named 'x0' is needed.")
            x0 = content.pop("x0")
    if label is not None:
        content["label"] = _as_array(label, "label")
    values = x0 if isinstance(x0, MappedRows) else _as_array(x0, f"x0 of {name}")
    if not values.shape:
        raise InvalidInput(f"x0 of {name} is a single value, but an axis of examples is needed.")
    cond = {key: as_condition(value, key, f"{key} of {name}", num_classes) for key, value in content.items()}
    if "label" in cond and num_classes is None:
        num_classes = int(cond["label"].max(initial=-1)) + 1
    if isinstance(values, MappedRows):
        source = ArraySource(values, cond, name, num_classes)
        if values.stored.kind == "f":
            rows = np.unique(np.linspace(0, len(values) - 1, LOOKED_AT).astype(np.int64))
            _check_range(values[rows], name, value_range)
        return source
    source = ArraySource(as_data(values, f"x0 of {name}", value_range), cond, name, num_classes)
    check_finite(source)
    if values.dtype.kind == "f":
        _check_range(source.x0, name, value_range)
    return source


def _as_array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # whatever another library's array raises
        raise InvalidInput(f"{name} is no array of numbers: {first_line(error)}.") from None


def _check_range(x0: np.ndarray, name: str, value_range: Any) -> None:
    """Raises InvalidInput for floats that are images in 0 .. 255, and warns of those in [0, 1]."""
    if value_range is not None or x0.ndim not in (4, 5) or x0.shape[-1] not in (1, 3) or x0.dtype != np.float32:
        return
    low, high = float(x0.min()), float(x0.max())
    if low < 0 or not high:
        return
    reach = f"from {low:g} to {high:g}"
    if high > pixels.OVERSHOOT:
        raise invalid(
            f"the range of x0 of {name}",
            reach,
            f"images lie in [-1, 1]: value_range=(0, {255 if high <= 255 else high:g})",
        )
    warnings.warn(
        f"x0 of {name} holds images {reach}, but those of this library lie in [-1, 1]: value_range=(0, 1) scales them, "
        "and value_range=(-1, 1) says that they are meant so.",
        stacklevel=3,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecords:
    """Examples in ArrayRecord files, each record a small safetensors block; see `array_record`."""

    paths: tuple[str, ...]
    records: Any
    num_classes: int | None = None
    name: str = "array_record"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        from safetensors.numpy import load

        where = f"record {index} of {', '.join(self.paths)}"
        try:
            flat = load(self.records[index])
        except Exception as error:  # the reader is C++ and raises whatever it likes
            raise InvalidInput(f"{where} cannot be read as an example ({first_line(error)}).") from None
        if "x0" not in flat:
            raise InvalidInput(f"{where} holds {sorted(flat)}, but an array named 'x0' is needed.")
        given = {key.removeprefix("cond."): _scalar(value) for key, value in flat.items() if key.startswith("cond.")}
        cond = {key: as_condition(value, key, f"{key} of {where}", self.num_classes, 0) for key, value in given.items()}
        example = {"x0": as_data(flat["x0"], f"x0 of {where}")}
        return {**example, "cond": cond} if cond else example

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self[0]["x0"].shape)


def _scalar(value):
    return value.reshape(()) if value.shape == (1,) else value


def array_record(paths: str | Sequence[str], num_classes: int | None = None) -> ArrayRecords:
    """Examples from ArrayRecord files written by `write_array_record` (one path or several).

    num_classes: how many classes labels are of; they are checked as they are read.
    """
    import grain

    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    files = tuple(str(regular_file(existing(path, "The ArrayRecord file"))) for path in paths)
    try:
        records: Any = grain.sources.ArrayRecordDataSource(list(files))
        count = len(records)
    except Exception as error:  # the reader is C++ and raises whatever it likes
        raise InvalidInput(f"{', '.join(files)} cannot be read as ArrayRecord ({first_line(error)}).") from None
    source = ArrayRecords(files, records, num_classes)
    if count:
        source[0]
    return source


def write_array_record(path: str | Path, examples: Iterable[dict]) -> None:
    """Writes examples `{"x0": array, "cond": {name: array}}`, one record each."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from safetensors.numpy import save

    # One record a group: records are read in random order.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        flat = {"x0": example["x0"], **{f"cond.{key}": value for key, value in example.get("cond", {}).items()}}
        writer.write(save({key: np.ascontiguousarray(np.atleast_1d(value)) for key, value in flat.items()}))
    writer.close()
