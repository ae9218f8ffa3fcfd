"""Sets of samples on disk: shards that each know what they were drawn by, and are never mixed or taken for others.

A shard is an NPZ file with the arrays of a range of samples and an entry `identity`: JSON that says seed, parameters
(their digest), model, process, how it was sampled, the range `index` and the names, shapes and dtypes of `arrays`.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax import reading
from diffusion_jax.config import differences
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.whole_files import written_whole

MOST_SHARDS = 99_999
"""Their names have five digits."""

COST = "sampling.json"
"""What drawing a set has cost, beside its shards, with the set's identity."""

OF_A_SHARD = ("index", "arrays")
"""What the identity of a shard says of itself; the rest is that of its set."""


def shard_paths(folder: Path, num_samples: int, shard_size: int) -> list[tuple[Path, int, int]]:
    """The shards of a set: `(path, first index, number of samples)`. Raises InvalidInput for more than `MOST_SHARDS`,
    and for an index that an int32 cannot hold."""
    if num_samples >= 2**31 or -(-num_samples // shard_size) > MOST_SHARDS:
        most = min(2**31 - 1, MOST_SHARDS * shard_size)
        raise invalid("--num-samples", num_samples, f"with --shard-size={shard_size} a set has at most {most}")
    starts = range(0, num_samples, shard_size)
    return [
        (folder / f"samples-{number:05d}-of-{len(starts):05d}.npz", start, min(shard_size, num_samples - start))
        for number, start in enumerate(starts)
    ]


def write_shard(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an NPZ file in one go: it is whole, or it is not there.

    Another process may have written it in the meantime: the same samples stay, others are not replaced.
    Raises InvalidInput for those, and where the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, draft = tempfile.mkstemp(suffix=".partial", prefix=path.stem + ".", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        with os.fdopen(number, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]: no array is named allow_pickle
        os.chmod(draft, 0o666 & ~_umask())
        _put(Path(draft), path, identity_of(arrays))
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        Path(draft).unlink(missing_ok=True)


def _put(draft: Path, path: Path, identity: Mapping[str, Any]) -> None:
    """Gives a draft its name, where nothing sound has it."""
    try:
        os.link(draft, path)
    except FileExistsError:
        there = read_shard(path)
        if there is None:
            draft.replace(path)
        else:
            check_identity(path, identity_of(there), identity)
    except OSError:  # a file system without links
        draft.replace(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(f"{path} cannot be written: {error.strerror or error}.")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one go. Raises InvalidInput where that cannot be."""
    try:
        with written_whole(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def shapes_and_dtypes(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Shape and dtype of every array by name, as the identity of a shard has them."""
    return {name: [list(value.shape), str(value.dtype)] for name, value in arrays.items()}


def identified(arrays: Mapping[str, np.ndarray], made_by: Mapping[str, Any], start: int) -> dict[str, np.ndarray]:
    """The arrays of samples `start .. ` with the identity of their shard; made_by: what all of the set share."""
    stop = start + len(arrays["index"])
    identity = {**made_by, "index": [start, stop], "arrays": shapes_and_dtypes(arrays)}
    return {**arrays, "identity": np.asarray(json.dumps(identity))}


def read_shard(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a finished shard; None when it is not there, damaged, or does not hold what its identity says.

    Raises InvalidInput for what is no file, or is there and cannot be read now.
    """
    if not os.path.lexists(path):
        return None
    try:
        arrays = reading.read_arrays(path)
        stated = identity_of(arrays)
    except reading.Unreadable:
        raise
    except InvalidInput:
        return None
    index = arrays.get("index")
    if index is None or index.ndim != 1 or any(value.ndim < 1 or len(value) != len(index) for value in _held(arrays)):
        return None
    if "arrays" in stated:
        held = shapes_and_dtypes({name: value for name, value in arrays.items() if name != "identity"})
        start, stop = stated["index"] if _is_range(stated.get("index")) else (0, -1)
        if stated["arrays"] != held or not np.array_equal(index, np.arange(start, max(stop, start))):
            return None
    return arrays


def _held(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [value for name, value in arrays.items() if name != "identity"]


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(end) is int and 0 <= end < 2**31 for end in value)


def identity_of(shard: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a shard was drawn by; empty for one without. Raises InvalidInput where it cannot be read."""
    return reading.parse_json(str(shard["identity"]), "the identity of a shard") if "identity" in shard else {}


def of_the_set(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that all shards of a set share."""
    return {name: value for name, value in identity.items() if name not in OF_A_SHARD}


def check_identity(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InvalidInput where a shard was drawn by other parameters, with another seed, in another way, or is of
    another range. What `wanted` does not say of a shard is not compared."""
    stored = {name: value for name, value in stored.items() if name in wanted or name not in OF_A_SHARD}
    if changed := differences(stored, wanted):
        other = any(name.startswith("parameters ") for name in changed)
        hint = " The parameters are those of another checkpoint or average." if other else ""
        raise InvalidInput(
            f"{path} holds other samples than those asked for: {', '.join(changed[:5])}; "
            f"empty the folder or give --output.{hint}"
        )


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """All samples of a finished set, in the order of their index.

    Raises InvalidInput when shards are missing, damaged, of several sets, or drawn in different ways.
    """
    paths = sorted(folder.glob("samples-*-of-*.npz"))
    if not paths:
        raise InvalidInput(f"{folder} holds no samples; draw them with `diffusion-jax sample` first.")
    totals = {path.stem.rpartition("-")[2] for path in paths}
    if len(totals) > 1 or not all(total.isdecimal() for total in totals):
        raise InvalidInput(f"{folder} holds shards of several sets (of {', '.join(sorted(totals))}); empty it.")
    total = int(totals.pop())
    shards = {path: shard for path in paths if (shard := read_shard(path)) is not None}
    if len(shards) != total:
        damaged = [path.name for path in paths if path not in shards]
        which = f" ({', '.join(damaged[:3])} cannot be read)" if damaged else ""
        raise InvalidInput(
            f"{folder} holds {len(shards)} readable shards of {total}{which}; run the same sample command again."
        )
    first = next(iter(shards.values()))
    shared = of_the_set(identity_of(first))
    for path, shard in shards.items():
        check_identity(path, of_the_set(identity_of(shard)), shared)
        if shard.keys() != first.keys() or any(shard[n].shape[1:] != first[n].shape[1:] for n in shard):
            raise InvalidInput(f"{path} holds other arrays than the shards before it; empty the folder.")
    names = [name for name in first if name != "identity"]
    samples = {name: np.concatenate([shard[name] for shard in shards.values()]) for name in names}
    if not np.array_equal(samples["index"], np.arange(len(samples["index"]))):
        raise InvalidInput(f"{folder} holds shards that do not follow one another; empty it and draw them again.")
    return samples


def set_identity(folder: Path) -> dict[str, Any]:
    """What all shards of a set were drawn by, as its first one says; empty where that is not known."""
    for path in sorted(folder.glob("samples-*-of-*.npz"))[:1]:
        return of_the_set(identity_of(read_shard(path) or {}))
    return {}


def read_identity(path: Path) -> Any:
    """The JSON of a small file of ours; None where it is not there or damaged."""
    try:
        return reading.read_json(path)
    except InvalidInput:
        return None
