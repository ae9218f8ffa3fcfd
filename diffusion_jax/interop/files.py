"""Folders in the Hugging Face layout: their JSON and their safetensors files, read tensor by tensor, slice by slice.

Nothing is unpickled, ever: `.bin`, `.ckpt` and `.pt` files are refused. What the tensors mean is in `tables` and in
the families.
"""

import json
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion_jax.errors import InvalidInput, invalid, nearest
from diffusion_jax.reading import Unreadable, file_within, first_line, read_json, regular_file, unreadable

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Kinds of tensors that are weights, and their bytes an entry."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How either library names its files of weights."""

ENDINGS = (*PICKLES, ".safetensors", ".json", ".txt", ".model")
"""Of files: a name with one is a path."""

HUB_SECONDS = 5
"""How long the hub may take to say whether it has a repo id."""

REMAP_BYTES = 2**27
"""Files are mapped afresh after this many bytes were read, so that pages already used do not count as memory."""


def local_folder(folder: str | os.PathLike) -> Path:
    """A folder or file of this machine; a repo id ("owner/name") is downloaded by huggingface_hub where that can be.

    What looks like a path is one, and never asked for elsewhere. The hub is asked once, for `HUB_SECONDS`; where it
    does not answer, what was downloaded before is taken.

    Raises InvalidInput where there is neither.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if os.path.lexists(path) or _looks_like_a_path(str(folder), path):
        return _existing_file(path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InvalidInput(
            f"{folder} is no folder here, and to fetch it as a repo id the package huggingface_hub is needed: "
            "pip install huggingface_hub."
        ) from None
    reason = _unreachable(str(folder))
    try:
        kinds = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(str(folder), allow_patterns=kinds, local_files_only=reason is not None))
    except Exception as error:
        told = reason or first_line(error)
        raise InvalidInput(f"{folder} is no folder here, and as a repo id it could not be fetched: {told}.") from None


def _looks_like_a_path(text: str, path: Path) -> bool:
    """Whether a name that does not exist is meant as a path: it is no "owner/name", or its first part is here."""
    return not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) or path.suffix in ENDINGS or Path(path.parts[0]).exists()


def _existing_file(path: Path) -> Path:
    try:
        return regular_file(path)
    except Unreadable:
        raise
    except InvalidInput:
        beside = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path, beside)
        hint = f" Did you mean {near}?" if near else ""
        raise InvalidInput(
            f"{path} does not exist: a folder with config.json and safetensors files is needed.{hint}"
        ) from None


def _unreachable(repo: str) -> str | None:
    """Why the hub does not tell of a repo id within `HUB_SECONDS`; None where it does."""
    from huggingface_hub import HfApi

    found: list[str | None] = [f"the hub did not answer within {HUB_SECONDS} seconds"]

    def ask():
        try:
            HfApi().model_info(repo, timeout=HUB_SECONDS)
            found[0] = None
        except Exception as error:
            found[0] = first_line(error)

    # The library may try again and again: whatever it does, nobody waits for it any longer.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return found[0]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class TensorFiles:
    """The tensors of a folder (one safetensors file, or several and their index) or of one file, read lazily.

    variant: "fp16" reads `*.fp16.safetensors`. aliases: `(regex, replacement)` pairs that turn old names into those
    that are used now. Raises InvalidInput for a folder without safetensors, for a shard that the index names and that
    is not there, and for a file that is damaged or cut short.
    """

    def __init__(self, folder: str | os.PathLike, variant: str | None = None, aliases: Sequence[tuple[str, str]] = ()):
        self.path = Path(folder)
        self._open: dict[Path, Any] = {}
        self._read = 0
        self._where: dict[str, tuple[Path, str]] = {}
        for file in _weight_files(self.path, variant):
            names = self._handle(file).keys()
            for name in names:
                now = name
                for pattern, replacement in aliases:
                    now = re.sub(pattern, replacement, now)
                self._where[now] = (file, name)

    @property
    def names(self) -> list[str]:
        return list(self._where)

    @property
    def files(self) -> list[Path]:
        """The files that have tensors, by their names."""
        return sorted({file for file, _ in self._where.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The kind of a tensor as safetensors calls it: "F32", "BF16", "I64", ..."""
        return self._slice(name).get_dtype()

    def metadata(self) -> dict[str, str]:
        """The strings that the files carry beside their tensors."""
        return {
            name: text
            for file in {file for file, _ in self._where.values()}
            for name, text in (self._handle(file).metadata() or {}).items()
        }

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at `index`."""
        file, _ = self._where[name]
        tensor = self._slice(name)
        if tensor.get_dtype() not in FLOATS:
            raise InvalidInput(
                f"{file}: {name} has dtype {tensor.get_dtype()}, but weights are one of {', '.join(FLOATS)}."
            )
        whole = all(entry == slice(0, size) for entry, size in zip(index, tensor.get_shape()))
        value = self._handle(file).get_tensor(self._where[name][1]) if whole else tensor[index]
        self._read += value.nbytes
        if self._read > REMAP_BYTES:
            self._open.clear()
            self._read = 0
        return value

    def scalar(self, name: str) -> float:
        """The one entry of a tensor of any kind of numbers, such as an alpha."""
        if math.prod(self.shape(name)) != 1:
            raise InvalidInput(f"{self.path}: {name} is {list(self.shape(name))}, but one number is needed.")
        file, original = self._where[name]
        return float(self._handle(file).get_tensor(original).item())

    def _slice(self, name):
        file, original = self._where[name]
        return self._handle(file).get_slice(original)

    def _handle(self, file: Path):
        if file not in self._open:
            regular_file(file)
            try:
                self._open[file] = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise InvalidInput(f"{file} is damaged or cut short: {first_line(error)}.") from None
            except OSError as error:
                raise unreadable(file, error) from None
        return self._open[file]


def _weight_files(path: Path, variant: str | None) -> list[Path]:
    if not path.is_dir():
        regular_file(path)
        if path.suffix != ".safetensors":
            raise invalid("checkpoint", str(path), _advice(path))
        return [path]
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    single = [path / f"{stem}{ending}" for stem in STEMS.values()]
    indices = [path / f"{stem}.safetensors.index{'.' + variant if variant else ''}.json" for stem in STEMS.values()]
    for index in indices:
        if index.is_file():
            return _shards(path, index)
    for file in single:
        if file.is_file():
            return [file]
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others and not variant:
        variants = [name for name in others if re.fullmatch(r"\w+\.\w+\.safetensors", name)]
        if variants:
            raise InvalidInput(f"{path} holds {', '.join(variants)} only: give variant={variants[0].split('.')[1]!r}.")
        if len(others) == 1:
            return [path / others[0]]
    pickles = sorted(file for file in path.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise invalid("checkpoint", str(pickles[0]), _advice(pickles[0]))
    expected = f"{single[0].name} or {single[1].name}"
    there = f"it holds {', '.join(others)}" if others else "it holds no safetensors"
    raise InvalidInput(f"{path} has no {expected}: {there}.")


def _shards(path: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid(f"weight_map of {index}", weight_map, "a dict from tensors to files is needed")
    files = {file_within(path, shard, index) for shard in weight_map.values()}
    for file in sorted(files):
        if not os.path.lexists(file):
            raise InvalidInput(f"{index} names the shard {file.name}, but {file} does not exist.")
        regular_file(file)
        if file.suffix != ".safetensors":
            raise invalid(f"a shard that {index} names", file.name, _advice(file))
    return sorted(files)


def _advice(path: Path) -> str:
    if path.suffix in PICKLES:
        return (
            "it is a pickle, which can run code when it is read, so it is never opened; "
            "convert it to safetensors where you trust it (save_pretrained(..., safe_serialization=True))"
        )
    return "a .safetensors file or a folder of them is needed"


class TensorWriter:
    """Writes tensors one by one to `folder`: shards of at most `max_shard_bytes`, with an index if there are several.

    At most one shard is held in memory. Call `close` at the end.
    """

    def __init__(self, folder: Path, library: str, max_shard_bytes: int | float):
        self.folder, self.stem, self.limit = folder, STEMS[library], max_shard_bytes
        self._held: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, value: np.ndarray) -> None:
        if self._held and sum(v.nbytes for v in self._held.values()) + value.nbytes > self.limit:
            self._flush()
        self._held[name] = np.ascontiguousarray(value)
        self._bytes += value.nbytes

    def _flush(self) -> None:
        self._shards.append(list(self._held))
        # The number of shards is not known yet: files get their names in `close`.
        save_file(self._held, self.folder / f"{self.stem}-{len(self._shards):05d}.part", metadata={"format": "pt"})
        self._held = {}

    def close(self) -> None:
        if self._held:
            self._flush()
        count, weight_map = len(self._shards), {}
        for i, names in enumerate(self._shards, start=1):
            file = f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{i:05d}-of-{count:05d}.safetensors"
            (self.folder / f"{self.stem}-{i:05d}.part").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)
