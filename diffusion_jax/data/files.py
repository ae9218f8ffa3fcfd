"""Data from files: NumPy arrays, precomputed latents in shards, ArrayRecord, image folders. Nothing is ever unpickled.

Readers and the writers of the formats that are ours. tensorflow-datasets has a module of its own.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data import pixels
from diffusion_jax.data.sources import ArraySource, check_finite
from diffusion_jax.errors import InvalidInput, invalid

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _existing(path: Any, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidInput(f"{what} {str(path)!r} does not exist.")
    return path


def _load(path: Path, mmap: bool = False) -> Any:
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{str(path)!r} is damaged, or no NumPy file that can be read without pickle ({error})."
        ) from None


def _as_data(array: Any) -> Any:
    """uint8 images to [-1, 1]; integers to int32 tokens; other floats to float32 unless they are that already."""
    if array.dtype == np.uint8:
        return pixels.from_uint8(array)
    if np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int32)
    return array if array.dtype == np.float32 else array.astype(np.float32)


def arrays(
    path: str | None = None, *, x0: Any = None, label: Any = None, num_classes: int | None = None
) -> ArraySource:
    """A source from a `.npy` file (x0 alone, memory-mapped), a `.npz` file, or arrays in memory.

    path: an `.npz` holds `x0 [N, ...]` and, if there is one, `label [N]`; every other array in it becomes a condition
        of that name. uint8 images are scaled to [-1, 1]; integers are tokens.
    x0, label: arrays instead of a path.
    num_classes: one more than the largest label when None.

    Raises InvalidInput when the file is missing, damaged, needs pickle, or holds a NaN.
    """
    if (path is None) == (x0 is None):
        raise InvalidInput("arrays needs either a path or x0, and not both.")
    name, cond = "arrays", {}
    if path is not None:
        file = _existing(path, "The file")
        name = str(file)
        loaded = _load(file, mmap=file.suffix == ".npy")
        if isinstance(loaded, np.ndarray):
            x0 = loaded
        else:
            with loaded:
                content = {key: _read_member(loaded, key, file) for key in loaded.files}
            if "x0" not in content:
                raise InvalidInput(f"{name!r} holds {sorted(content)}, but an array named 'x0' is needed.")
            x0 = content.pop("x0")
            cond = {key: _as_data(value) for key, value in content.items()}
    if label is not None:
        cond["label"] = np.asarray(label).astype(np.int32)
    if "label" in cond and num_classes is None:
        num_classes = int(cond["label"].max()) + 1
    source = ArraySource(_as_data(x0 if isinstance(x0, np.ndarray) else np.asarray(x0)), cond, name, num_classes)
    if not isinstance(source.x0, np.memmap):
        check_finite(source)
    return source


def _read_member(archive, key, file):
    try:
        return archive[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{key!r} in {str(file)!r} cannot be read without pickle, or is damaged ({error})."
        ) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """Examples spread over files, each opened when it is first needed; the order is that of the file names."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    scale: float
    shift: float
    num_classes: int | None = None
    name: str = "latents"

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        content = _shard(self.files[shard])
        row = index - self.starts[shard]
        example = {"x0": (content["x0"][row].astype(np.float32) - self.shift) * self.scale}
        cond = {key: value[row] for key, value in content.items() if key != "x0"}
        return {**example, "cond": cond} if cond else example


@functools.lru_cache(maxsize=4096)
def _shard(file: Path) -> dict:
    """x0 as a memory map, the small arrays beside it (`NAME.label.npy`, ...) in memory."""
    content = {"x0": _load(file, mmap=True)}
    stem = file.name.removesuffix(".x0.npy")
    for beside in sorted(file.parent.glob(f"{stem}.*.npy")):
        key = beside.name.removeprefix(f"{stem}.").removesuffix(".npy")
        if key != "x0":
            content[key] = _as_data(_load(beside))
            if len(content[key]) != len(content["x0"]):
                raise invalid(f"length of {str(beside)!r}", len(content[key]), f"x0 has {len(content['x0'])} examples")
    return content


def latents(folder: str, *, scale: float = 1.0, shift: float = 0.0, num_classes: int | None = None) -> Shards:
    """Latents computed beforehand: `NAME.x0.npy` shards, each with `NAME.label.npy` and the like beside it.

    Shards are memory-mapped, so the data may be larger than the memory. `x0 <- (x0 - shift) * scale`, e.g. scale
    0.18215 for the latents of Stable Diffusion. `write_latents` writes the format.
    """
    files = tuple(sorted(_existing(folder, "The folder of latents").glob("*.x0.npy")))
    if not files:
        raise InvalidInput(f"The folder {str(folder)!r} holds no shard: files named NAME.x0.npy are expected.")
    shards = [_shard(file) for file in files]
    shapes = {tuple(shard["x0"].shape[1:]) for shard in shards}
    if len(shapes) > 1:
        raise invalid("shapes of the latents", sorted(shapes), "all shards must have the same")
    starts = tuple(np.cumsum([0] + [len(shard["x0"]) for shard in shards]).tolist())
    if num_classes is None and all("label" in shard for shard in shards):
        num_classes = int(max(shard["label"].max() for shard in shards)) + 1
    return Shards(files, starts, shapes.pop(), float(scale), float(shift), num_classes, str(folder))


def write_latents(folder: str | Path, name: str, x0: np.ndarray, cond: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes one shard, `x0 [N, ...]` and its conditions `[N, ...]`, for `latents` to read."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in (cond or {}).items():
        np.save(folder / f"{name}.{key}.npy", value, allow_pickle=False)
    np.save(folder / f"{name}.x0.npy", x0, allow_pickle=False)


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayRecords:
    """Examples in ArrayRecord files, each record a small safetensors block; see `array_record`."""

    paths: tuple[str, ...]
    records: Any
    name: str = "array_record"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        from safetensors.numpy import load

        flat = load(self.records[index])
        example = {key: value for key, value in flat.items() if not key.startswith("cond.")}
        cond = {key.removeprefix("cond."): _scalar(value) for key, value in flat.items() if key.startswith("cond.")}
        return {**example, "cond": cond} if cond else example

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self[0]["x0"].shape)


def _scalar(value):
    return value.reshape(()) if value.shape == (1,) else value


def array_record(paths: str | Sequence[str]) -> ArrayRecords:
    """Examples from ArrayRecord files written by `write_array_record` (one path or several)."""
    import grain

    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    files = tuple(str(_existing(path, "The ArrayRecord file")) for path in paths)
    try:
        source = ArrayRecords(files, grain.sources.ArrayRecordDataSource(list(files)))
        if len(source):
            source[0]
    except InvalidInput:
        raise
    except Exception as error:  # the reader is C++ and raises whatever it likes
        raise InvalidInput(
            f"{files} cannot be read as ArrayRecord of examples ({str(error).splitlines()[0]})."
        ) from None
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


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images of a folder, decoded when they are asked for; see `image_folder`."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    size: int
    channels: int
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, self.channels)

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.files[index]) as opened:
                image = np.asarray(opened.convert("RGB" if self.channels == 3 else "L"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise InvalidInput(f"The image {str(self.files[index])!r} cannot be decoded ({error}).") from None
        example = {"x0": pixels.centre_crop(pixels.from_uint8(image), self.size)}
        return example if self.labels is None else {**example, "cond": {"label": np.int32(self.labels[index])}}


def image_folder(folder: str, *, size: int = 64, channels: int = 3) -> ImageFolder:
    """Images `[size, size, channels]` in [-1, 1]: `folder/class/image.png` with labels, or `folder/image.png` without.

    The shorter side is resized to `size` and the middle square kept. Classes are the subfolders in alphabetical order.
    """
    if size < 1 or channels not in (1, 3):
        raise invalid("size, channels", (size, channels), "size must be at least 1 and channels 1 or 3")
    root = _existing(folder, "The image folder")
    if not root.is_dir():
        raise InvalidInput(f"{str(root)!r} is a file, but a folder of images is expected.")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InvalidInput(f"The folder {str(root)!r} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    loose = [path.name for path in files if path.parent == root]
    if len(loose) == len(files):
        return ImageFolder(tuple(files), None, None, size, channels, str(root))
    if loose:
        raise InvalidInput(f"{str(root)!r} mixes class subfolders with loose images such as {loose[0]!r}: move those.")
    parents = [path.relative_to(root).parts[0] for path in files]
    names = tuple(sorted(set(parents)))
    labels = tuple(names.index(parent) for parent in parents)
    return ImageFolder(tuple(files), labels, names, size, channels, str(root))
