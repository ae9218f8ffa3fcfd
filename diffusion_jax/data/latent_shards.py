"""Latents that were computed beforehand: shards of arrays on disk, and what they were made by.

    NAME.x0.npy, NAME.label.npy, ...          shards, in a folder or in its subfolders `train` and `held_out`
    latents.json                              in the folder with subfolders: what they were made by, how many there are

`diffusion-jax encode` and `data.collect` write such folders; shards of one's own need no description.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.config import differences
from diffusion_jax.data.files import MappedRows, as_condition, as_data, existing, identity
from diffusion_jax.data.sources import as_labels
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.reading import read_array, read_json
from diffusion_jax.whole_files import written_whole

DESCRIPTION = "latents.json"
"""What the shards of a folder were made by."""

PLACES = ("folder",)
"""Entries of a description that say where something was; what it was is said by the others."""

PARTS = ("train", "held_out")
"""Subfolders of a described folder."""

IN_MEMORY = 2**20
"""Bytes of a shard's condition up to which it is read whole; larger ones, such as encoded texts, stay on disk."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """Examples spread over files, which stay on disk; the order is that of the file names.

    description: what they were made by, where `latents.json` says it.
    beside: which of the arrays beside x0 are entries of the batch themselves, such as `noise`; the others are
        conditions.
    """

    files: tuple[Path, ...]
    identities: tuple[Any, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    scale: float
    shift: float
    num_classes: int | None = None
    name: str = "latents"
    vocab_size: int | None = None
    class_names: tuple[str, ...] | None = None
    description: Mapping[str, Any] | None = None
    held_out: "Shards | None" = None
    beside: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        content = _shard(self.files[shard], self.identities[shard])
        row = index - self.starts[shard]
        x0 = content["x0"][row]
        example = {"x0": x0 if x0.dtype == np.int32 else (x0 - self.shift) * self.scale}
        cond = {key: value[row] for key, value in content.items() if key not in ("x0", *self.beside)}
        example |= {key: content[key][row] for key in self.beside}
        return {**example, "cond": cond} if cond else example


def _beside(file: Path) -> dict[str, Path]:
    """The files of a shard's conditions by name."""
    stem = file.name.removesuffix(".x0.npy")
    named = {
        path.name.removeprefix(f"{stem}.").removesuffix(".npy"): path
        for path in file.parent.glob("*.npy")
        if path.name.startswith(f"{stem}.")
    }
    return {key: named[key] for key in sorted(named) if key != "x0"}


def _identities(file: Path) -> tuple[Any, ...]:
    return tuple((str(path), identity(path)) for path in (file, *_beside(file).values()))


@functools.lru_cache(maxsize=512)
def _shard(file: Path, identities: tuple[Any, ...]) -> dict:
    """x0 as a memory map, the small arrays beside it (`NAME.label.npy`, ...) in memory: those of these identities."""
    if _identities(file) != identities:
        raise InvalidInput(f"The shard {str(file)!r} has changed since it was opened: start again to read it as it is.")
    content: dict[str, Any] = {"x0": MappedRows(file, functools.partial(as_data, name=str(file)))}
    for key, path in _beside(file).items():
        if key != "label" and path.stat().st_size > IN_MEMORY:
            name = repr(str(path))
            content[key] = MappedRows(path, lambda rows, key=key, name=name: as_condition(rows, key, name, axes=0))
        else:
            content[key] = as_condition(read_array(path), key, repr(str(path)))
        if len(content[key]) != len(content["x0"]):
            raise invalid(f"length of {str(path)!r}", len(content[key]), f"x0 has {len(content['x0'])} examples")
    return content


def latents(
    folder: str,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    num_classes: int | None = None,
    beside: Sequence[str] = (),
) -> Shards:
    """Latents computed beforehand: a folder that `diffusion-jax encode` wrote, with what it holds out, or shards
    `NAME.x0.npy`, each with `NAME.label.npy` and the like beside it.

    Shards are memory-mapped, so the data may be larger than the memory. `x0 <- (x0 - shift) * scale`, e.g. scale
    0.18215 for the latents of Stable Diffusion as they come; those that `encode` wrote are scaled. Signed integers are
    tokens and stay. `write_latents` writes the format. beside: arrays that are entries of the batch, such as "noise",
    and no conditions; sets that `collect` wrote say so themselves.

    Raises InvalidInput for shards that differ in shape or conditions, and for a folder that is not finished.
    """
    root = existing(folder, "The folder of latents")
    if not (root / DESCRIPTION).is_file():
        return _with_beside(_shards(root, scale, shift, num_classes), beside)
    told = read_json(root / DESCRIPTION)
    if (scale, shift) != (1.0, 0.0):
        raise invalid("scale, shift", (scale, shift), f"the latents in {str(root)!r} are scaled already: leave it out")
    known = {"class_names": _names(told), "vocab_size": told.get("vocab_size"), "description": told}
    classes = len(known["class_names"]) if known["class_names"] else num_classes
    parts = {}
    counts = told.get("examples")
    for part in PARTS:
        count = counts.get(part) if isinstance(counts, Mapping) else None
        if not count:
            continue
        found = dataclasses.replace(_shards(root / part, 1.0, 0.0, classes), **known)
        parts[part] = _with_beside(found, beside or told.get("beside") or ())
        if len(parts[part]) != count:
            raise InvalidInput(
                f"{str(root / part)!r} holds {len(parts[part])} of {count} examples: run again what was making them."
            )
    if "train" not in parts:
        raise InvalidInput(f"{str(root / DESCRIPTION)!r} names no latents to train on.")
    return dataclasses.replace(parts["train"], held_out=parts.get("held_out"))


def _with_beside(shards: Shards, names: Sequence[str]) -> Shards:
    have = sorted(_shard(shards.files[0], shards.identities[0]).keys() - {"x0"})
    for name in names:
        if name not in have:
            raise unknown("beside", name, have)
    return dataclasses.replace(shards, beside=tuple(names))


def _names(told: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = told.get("class_names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _shards(root: Path, scale: float, shift: float, num_classes: int | None) -> Shards:
    files = tuple(sorted(root.glob("*.x0.npy")))
    if not files:
        raise InvalidInput(f"The folder {str(root)!r} holds no shard: files named NAME.x0.npy are expected.")
    identities = tuple(_identities(file) for file in files)
    shards = [_shard(*shard) for shard in zip(files, identities, strict=True)]
    first = shards[0]
    for file, shard in zip(files, shards, strict=True):
        for what, here, there in (
            ("shape", shard["x0"].shape[1:], first["x0"].shape[1:]),
            ("conditions", sorted(shard.keys() - {"x0"}), sorted(first.keys() - {"x0"})),
        ):
            if here != there:
                raise invalid(f"{what} of {str(file)!r}", here, f"{str(files[0])!r} has {there}")
        if "label" in shard:
            as_labels(shard["label"], f"label beside {str(file)!r}", num_classes)
    starts = tuple(np.cumsum([0] + [len(shard["x0"]) for shard in shards]).tolist())
    if num_classes is None and "label" in first:
        num_classes = max(int(shard["label"].max(initial=-1)) for shard in shards) + 1
    shape = tuple(first["x0"].shape[1:])
    return Shards(files, identities, starts, shape, float(scale), float(shift), num_classes, str(root))


def write_latents(folder: str | Path, name: str, x0: np.ndarray, cond: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes one shard, `x0 [N, ...]` and its conditions `[N, ...]`, for `latents` to read.

    A shard of that name is replaced whole: who reads the old one still does.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in {**(cond or {}), "x0": x0}.items():
        part = folder / f".{name}.{key}.part"
        with part.open("wb") as opened:
            np.save(opened, value, allow_pickle=False)
        part.replace(folder / f"{name}.{key}.npy")


class Shard(NamedTuple):
    """A shard to be written: its name, which examples it holds, and whether it is there already."""

    name: str
    rows: range
    there: bool


def shards_to_write(folder: Path, count: int, shard_size: int) -> list[Shard]:
    """The shards of `count` examples that this process writes: with several, each has its share."""
    total = -(-count // shard_size)
    # What some shards have beside x0, all have.
    entries = {path.name.split(".", 1)[1] for path in folder.glob("*.*.npy") if not path.name.startswith(".")}
    shards = []
    for number in range(jax.process_index(), total, jax.process_count()):
        name = f"{number:05d}-of-{total:05d}"
        rows = range(number * shard_size, min(count, (number + 1) * shard_size))
        files = [folder / f"{name}.{entry}" for entry in sorted({*entries, "x0.npy"})]
        shards.append(Shard(name, rows, _are_there(files, len(rows))))
    return shards


def _are_there(files: Sequence[Path], count: int) -> bool:
    for path in files:
        if not path.is_file():
            return False
        try:
            held = len(read_array(path, mmap=True))
        except InvalidInput:
            held = None
        if held != count:
            print(f"{path} is damaged and is made again.")
            return False
    return True


def check_same(folder: Path, description: Mapping[str, Any], what: str, instead: str) -> None:
    """Raises InvalidInput where `folder` holds `what` ("latents") that were made by something else; instead: what to do
    about it. Entries that `description` lacks, and places (`PLACES`) at any depth, are not compared."""
    file = folder / DESCRIPTION
    if not file.is_file():
        if folder.is_dir() and any(folder.rglob("*.x0.npy")):
            raise InvalidInput(f"{folder} holds {what}, and nothing tells what made them: {instead}.")
        return
    stored = read_json(file)
    stored = {name: value for name, value in stored.items() if name in description}
    if changed := differences(_without_places(stored), _without_places(description)):
        raise InvalidInput(f"{folder} holds {what} that were made otherwise: {', '.join(changed[:5])}; {instead}.")


def _without_places(description: Any) -> Any:
    if not isinstance(description, Mapping):
        return description
    return {key: _without_places(value) for key, value in description.items() if key not in PLACES}


def describe_latents(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes what the shards of a folder were made by, for `latents` and for whoever goes on writing them."""
    with written_whole(folder / DESCRIPTION) as draft:
        draft.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
