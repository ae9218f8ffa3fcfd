"""The position in the data as an item of a checkpoint: one JSON file for each process, since each reads its own part.

Iterators of grain give bytes or a dict; any tree of plain values, bytes and arrays is kept as it is.
"""

import base64
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.errors import InvalidInput, invalid


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
    """The inverse of `encode`."""
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


class PositionHandler(ocp.CheckpointHandler):
    """Writes and reads this process's file; Orbax makes it appear together with the rest of the checkpoint."""

    def save(self, directory: Any, args: "DataPosition") -> None:
        path = epath.Path(directory) / f"{jax.process_index()}_of_{jax.process_count()}.json"
        path.write_text(json.dumps(as_json(args.state)))

    def restore(self, directory: Any, args: "DataPosition") -> Any:
        path = epath.Path(directory) / f"{jax.process_index()}_of_{jax.process_count()}.json"
        if not path.is_file():
            found = sorted(entry.stem for entry in epath.Path(directory).glob("*_of_*.json"))
            if not found:
                raise FileNotFoundError(f"{path.name} is missing")
            was = found[0].rsplit("_", 1)[-1]
            raise InvalidInput(
                f"the checkpoint has the data positions of {was} processes, but this run has {jax.process_count()}: "
                f"each reads its own part, so resume with {was}."
            )
        return from_json(json.loads(path.read_text()))


@ocp.args.register_with_handler(PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DataPosition(ocp.args.CheckpointArgs):
    """What an iterator's `get_state()` gave; ignored when restoring."""

    state: Any
