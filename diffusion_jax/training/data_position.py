"""The position in the data as an item of a checkpoint: one JSON file for each process, since each reads its own part.

Iterators of grain give bytes or a dict; any tree of plain values, bytes and arrays is kept as it is, beside a digest of
it. Where all processes stood at the same position, as those of `data.pipeline` do, any number of them can resume.
"""

import base64
import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.training.damage import Damaged


def as_json(value: Any) -> Any:
    """A JSON value for a tree of None, bool, int, float, str, bytes, list, tuple, dict and arrays.

    Raises InvalidInput for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        return {"array": base64.b64encode(array.tobytes()).decode(), "dtype": str(array.dtype), "shape": array.shape}
    if isinstance(value, tuple):
        return {"tuple": [as_json(entry) for entry in value]}
    if isinstance(value, list):
        return {"list": [as_json(entry) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[as_json(name), as_json(entry)] for name, entry in value.items()]}
    raise invalid("the data's state", type(value).__name__, "plain values, bytes, arrays and their trees can be saved")


def from_json(value: Any) -> Any:
    """The inverse of `as_json`."""
    if not isinstance(value, dict):
        return value
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "array" in value:
        data = np.frombuffer(base64.b64decode(value["array"]), value["dtype"])
        return data.reshape(value["shape"]).copy()
    if "tuple" in value:
        return tuple(from_json(entry) for entry in value["tuple"])
    if "list" in value:
        return [from_json(entry) for entry in value["list"]]
    return {from_json(name): from_json(entry) for name, entry in value["dict"]}


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whichever way it is laid out in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class PositionHandler(ocp.CheckpointHandler):
    """Writes this process's file and reads it, or any where all are equal; Orbax makes it appear with all the rest."""

    def save(self, directory: Any, args: "DataPosition") -> None:
        state = as_json(args.state)
        path = epath.Path(directory) / f"{jax.process_index()}_of_{jax.process_count()}.json"
        path.write_text(json.dumps({"state": state, "sha256": digest(state)}))

    def restore(self, directory: Any, args: "DataPosition") -> Any:
        folder = epath.Path(directory)
        path = folder / f"{jax.process_index()}_of_{jax.process_count()}.json"
        if path.is_file():
            return from_json(_checked(path))
        return from_json(_common(folder))


def _checked(path: epath.Path) -> Any:
    """What a file holds. Raises Damaged if it is not what was written."""
    stored = json.loads(path.read_text())
    whole = isinstance(stored, dict) and stored.keys() == {"state", "sha256"}
    if not whole or stored["sha256"] != digest(stored["state"]):
        raise Damaged(f"data/{path.name} is not what was saved")
    return stored["state"]


def _common(folder: epath.Path) -> Any:
    """The one position of all processes of a run that had another number of them."""
    count = max((int(path.stem.rpartition("_")[-1]) for path in folder.glob("*_of_*.json")), default=0)
    paths = [folder / f"{number}_of_{count}.json" for number in range(count)]
    if not paths or not all(path.is_file() for path in paths):
        raise Damaged("a file of the position in the data is missing")
    states = [_checked(path) for path in paths]
    if any(state != states[0] for state in states):
        raise InvalidInput(
            f"the checkpoint has the data positions of {count} processes, which differ, but this run has "
            f"{jax.process_count()}: each read its own part, so resume with {count}."
        )
    return states[0]


@ocp.args.register_with_handler(PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DataPosition(ocp.args.CheckpointArgs):
    """What an iterator's `get_state()` gave; ignored when restoring."""

    state: Any
