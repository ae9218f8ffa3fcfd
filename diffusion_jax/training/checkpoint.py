"""Checkpoints of a run: everything that matters, written by Orbax in the background, complete or not there at all.

Layout of a workdir, also of an exported one:

    config.json                     the run's configuration, when given
    checkpoints/<step>/params       nested dict of arrays
    checkpoints/<step>/ema_<name>   one such dict for each track
    checkpoints/<step>/rest         the other fields of the state, flat by path
    checkpoints/<step>/meta         JSON: format, and shape, dtype and fingerprint of every array
    checkpoints/<step>/data         position in the data, one file for each process
    snapshots/<step>/ema_<name>     power-function tracks, kept for `ema.reconstruct`

A fingerprint is the sum modulo 2^32 of an array's words: it does not depend on the mesh, and no flipped bit or lost
block passes it unseen. Files are data, never code: nothing is unpickled.
"""

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules, path_name, shardings
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.training import ema as averages
from diffusion_jax.training.data_position import DataPosition, PositionHandler
from diffusion_jax.training.state import TrainState

FORMAT = 1


class Restored(NamedTuple):
    """state: on the mesh that was asked for. data: position in the data, None if none was saved. step: where it was."""

    state: TrainState
    data: Any
    step: int


class Damaged(RuntimeError):
    """A checkpoint that exists but cannot be trusted."""


class Checkpointer:
    """Saves and restores the states of one run. Close it, or use it in `with`, so that the last save is finished.

    workdir: created if missing. keep: how many checkpoints stay, the newest ones.

    Raises InvalidInput if `workdir` is a file or `keep` is not positive.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3):
        if keep < 1:
            raise invalid("keep", keep, "at least 1 checkpoint must be kept")
        self._root = _directory(workdir)
        self._manager = _manager(self._root / "checkpoints", keep)
        self._snapshots: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any = None, *, wait: bool = False) -> None:
        """Starts to write `state` and the position `data`; returns when the device buffers may be reused.

        data: what the iterator's `get_state()` gave: bytes or a tree of plain values and arrays; None: no position.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _items(state)
        meta = {"format": FORMAT, "items": {name: _described(item) for name, item in items.items()}}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args["meta"] = ocp.args.JsonSave(meta)
        args["data"] = DataPosition(data)
        self._manager.save(step, args=ocp.args.Composite(**args))
        if wait:
            self.wait()

    def save_snapshot(self, step: int, tracks: Mapping[str, averages.Ema], ema: Mapping[str, Any]) -> None:
        """Keeps the power-function tracks of this step for good; the others are left out."""
        widths = {name: track.sigma_rel for name, track in tracks.items() if track.sigma_rel is not None}
        if not widths:
            return
        if self._snapshots is None:
            self._snapshots = _manager(self._root / "snapshots", None)
        if step in self._snapshots.all_steps():
            return
        args = {f"ema_{name}": ocp.args.StandardSave(_plain(ema[name])) for name in widths}
        described = {f"ema_{name}": _described(_plain(ema[name])) for name in widths}
        args["meta"] = ocp.args.JsonSave({"format": FORMAT, "items": described, "sigma_rel": widths})
        self._snapshots.save(step, args=ocp.args.Composite(**args))

    def drop_snapshots_after(self, step: int) -> None:
        """Forgets snapshots of a later step than the one the run resumes from: it will make them again."""
        if (self._root / "snapshots").exists() and self._snapshots is None:
            self._snapshots = _manager(self._root / "snapshots", None)
        for later in self._snapshots.all_steps() if self._snapshots else ():
            if later > step:
                self._snapshots.delete(later)

    def restore(self, abstract: TrainState, mesh: Mesh | None = None, rules: Rules | None = None) -> Restored | None:
        """The newest undamaged checkpoint, laid out on `mesh`; None if there is none at all.

        abstract: `jax.eval_shape` of the initial state. A damaged checkpoint is reported by a warning and removed,
        and the one before it is tried.

        Raises InvalidInput if the checkpoint is of another model or optimiser, or if all are damaged.
        """
        placed = _placed(abstract, mesh, rules)
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract, placed)
            except Damaged as problem:
                damaged.append(step)
                warnings.warn(
                    f"Checkpoint {step} in {self._root} is damaged ({problem}); trying the one before.", stacklevel=2
                )
                continue
            for later in damaged:
                # The run will reach these steps again and must be able to save them.
                self._manager.delete(later)
            return restored
        if damaged:
            raise InvalidInput(f"all checkpoints in {self._root} are damaged: {damaged}; remove them to start anew.")
        return None

    def _restore(self, step: int, abstract: TrainState, placed: TrainState) -> Restored:
        meta = _read_meta(self._manager, step)
        wanted = _items(placed)
        _check_items(step, wanted, meta)
        args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**args, data=DataPosition(None)))
        except InvalidInput:
            raise
        except Exception as error:
            raise Damaged(_first_line(error)) from error
        items = {name: found[name] for name in wanted}
        for name, item in items.items():
            _check_fingerprints(name, item, meta)
        return Restored(_from_items(items, abstract), found["data"], step)

    def wait(self) -> None:
        """Returns when everything has been written."""
        self._manager.wait_until_finished()
        if self._snapshots is not None:
            self._snapshots.wait_until_finished()

    def close(self) -> None:
        """Finishes the writing and lets go of the threads."""
        self.wait()
        self._manager.close()
        if self._snapshots is not None:
            self._snapshots.close()


def write_config(workdir: str | os.PathLike, config: Any) -> None:
    """Writes `config` (plain values, or anything with `to_json`) as `config.json`; replaced in one go."""
    if jax.process_index() != 0:
        return
    root = _directory(workdir)
    text = config.to_json(indent=2) if hasattr(config, "to_json") else json.dumps(config, indent=2)
    draft = root / "config.json.tmp"
    draft.write_text(text + "\n")
    draft.replace(root / "config.json")


def read_config(workdir: str | os.PathLike) -> Any:
    """The run's configuration. Raises InvalidInput if there is none or it is not JSON."""
    path = _path(workdir) / "config.json"
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist: workdir must be the folder of a run.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON ({error}).") from None


def load_params(
    workdir: str | os.PathLike,
    ema: str | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Any:
    """Parameters for sampling, without optimiser or objective: nested dicts of arrays, laid out on `mesh`.

    ema: name of an average, None for the raw parameters. step: the newest undamaged checkpoint when absent.

    Raises InvalidInput if there is no checkpoint, no such step, no such average, or the checkpoint is damaged.
    """
    root = _path(workdir)
    manager = _readable(root / "checkpoints")
    name = "params" if ema is None else f"ema_{ema}"
    with manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None:
            if step not in steps:
                raise unknown("step", step, map(str, steps))
            steps = [step]
        for candidate in steps:
            try:
                meta = _read_meta(manager, candidate)
                if name not in meta["items"]:
                    tracks = [n.removeprefix("ema_") for n in meta["items"] if n.startswith("ema_")]
                    raise unknown("ema", ema, tracks)
                return _load_item(manager, candidate, name, meta, mesh, rules)
            except Damaged as problem:
                warnings.warn(f"Checkpoint {candidate} in {root} is damaged ({problem}).", stacklevel=2)
    raise InvalidInput(f"no undamaged checkpoint was found in {root}.")


def export_params(
    workdir: str | os.PathLike, destination: str | os.PathLike, ema: str | None = None, step: int | None = None
) -> None:
    """Copies parameters (an average when `ema` names one) and the configuration to a workdir of their own.

    `load_params(destination)` gives them back. Raises InvalidInput as `load_params` does.
    """
    params = load_params(workdir, ema, step)
    has_config = (_path(workdir) / "config.json").is_file()
    save_params(destination, params, read_config(workdir) if has_config else None)


def save_params(destination: str | os.PathLike, params: Any, config: Any = None, step: int = 0) -> None:
    """Writes parameters alone (and the configuration) in the layout that `load_params` reads."""
    root = _directory(destination)
    plain = _plain(params)
    with _manager(root / "checkpoints", None) as manager:
        meta = {"format": FORMAT, "items": {"params": _described(plain)}}
        args = ocp.args.Composite(params=ocp.args.StandardSave(plain), meta=ocp.args.JsonSave(meta))
        manager.save(step, args=args, force=True)
        manager.wait_until_finished()
    if config is not None:
        write_config(root, config)


def reconstruct_ema(workdir: str | os.PathLike, sigma_rel: float, step: int | None = None) -> Any:
    """The power-function average of any width from a run's snapshots; see `ema.reconstruct`.

    Raises InvalidInput if the run kept no snapshots.
    """
    root = _path(workdir)
    if not (root / "snapshots").is_dir():
        raise InvalidInput(f"{root} has no EMA snapshots; train with snapshot_every and power-function tracks.")
    with _readable(root / "snapshots") as manager:
        snapshots = []
        for at in sorted(manager.all_steps()):
            meta = _read_meta(manager, at)
            for name, width in meta["sigma_rel"].items():
                snapshots.append((at, width, _loader(manager, at, f"ema_{name}", meta)))
        return averages.reconstruct(snapshots, sigma_rel, step)


def _loader(manager: ocp.CheckpointManager, step: int, name: str, meta: Mapping[str, Any]):
    return lambda: _load_item(manager, step, name, meta, None, None)


def _path(workdir: str | os.PathLike) -> epath.Path:
    """A folder of this machine, made absolute, or of a bucket (`gs://...`)."""
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _directory(workdir: str | os.PathLike) -> epath.Path:
    root = _path(workdir)
    if root.exists() and not root.is_dir():
        raise invalid("workdir", str(workdir), "it must be a folder")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _manager(path: epath.Path, keep: int | None) -> ocp.CheckpointManager:
    # Folders of an interrupted save are cleared away; they never had a finished checkpoint's name.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(path, options=options, handler_registry=_registry())


def _readable(path: epath.Path) -> ocp.CheckpointManager:
    if not path.is_dir():
        raise InvalidInput(f"{path} does not exist: workdir must be the folder of a run.")
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager(path, options=options, handler_registry=_registry())


def _registry():
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("data", DataPosition, PositionHandler())
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    registry.add("meta", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    return registry


def _items(state: TrainState) -> dict[str, Any]:
    """The items that a state is stored as; leaves without entries are not stored."""
    rest = state._replace(params=(), ema=())
    return {
        "params": _plain(state.params),
        **{f"ema_{name}": _plain(track) for name, track in state.ema.items()},
        "rest": _flat(rest),
    }


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path).replace("/", "."): _storable(leaf) for path, leaf in leaves if np.prod(leaf.shape) > 0}


def _plain(tree: Any) -> Any:
    return jax.tree.map(_storable, tree)


def _storable(leaf: Any) -> Any:
    """Typed keys as their words; everything else as it is."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            words = jax.eval_shape(jax.random.key_data, leaf)
            return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)
    return leaf


def _from_items(items: Mapping[str, Any], abstract: TrainState) -> TrainState:
    def typed(leaf, like):
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(jnp.zeros(like.shape, like.dtype)))
        return leaf

    params = jax.tree.map(typed, items["params"], abstract.params)
    ema = {name: jax.tree.map(typed, items[f"ema_{name}"], track) for name, track in abstract.ema.items()}

    def pick(path, like):
        if np.prod(like.shape) == 0:
            return jnp.zeros(like.shape, like.dtype)
        return typed(items["rest"][path_name(path).replace("/", ".")], like)

    rest = jax.tree_util.tree_map_with_path(pick, abstract._replace(params=(), ema=()))
    return rest._replace(params=params, ema=ema)


def _placed(abstract: Any, mesh: Mesh | None, rules: Rules | None) -> Any:
    """`abstract` with the sharding each leaf shall have."""
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, mesh, rules),
    )


@jax.jit
def _sums(leaves: list) -> list:
    def words(leaf):
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag])
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(leaf.dtype.itemsize, jnp.uint32)
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32), dtype=jnp.uint32)

    return [words(leaf) for leaf in leaves]


def _fingerprints(item: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_flatten_with_path(item)[0]
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {path_name(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def _described(item: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and fingerprint of every array, by path."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(item)[0]}
    sums = _fingerprints(item)
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": sums[path]} for path, leaf in leaves.items()
    }


def _check_fingerprints(name: str, item: Any, meta: Mapping[str, Any]) -> None:
    for path, value in _fingerprints(item).items():
        if meta["items"][name][path]["sum"] != value:
            raise Damaged(f"{name}/{path} is not what was saved")


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except Exception as error:
        raise Damaged(_first_line(error)) from error
    if not isinstance(meta, dict) or "format" not in meta:
        raise Damaged("its meta file is incomplete")
    if meta["format"] != FORMAT:
        raise InvalidInput(f"checkpoint {step} has format {meta['format']}, but this version reads format {FORMAT}.")
    return meta


def _check_items(step: int, wanted: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raises InvalidInput, naming the first difference, if a healthy checkpoint belongs to another run."""
    for name, item in wanted.items():
        stored = meta["items"].get(name)
        if stored is None:
            raise InvalidInput(f"checkpoint {step} has no {name!r}: it is of a run with other settings.")
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(item)[0]}
        for path in sorted(set(leaves) ^ set(stored)):
            where = "the checkpoint" if path in leaves else "this run"
            raise InvalidInput(f"checkpoint {step} is of another run: {where} has no {name}/{path}.")
        for path, leaf in leaves.items():
            was = tuple(stored[path]["shape"])
            if was != tuple(leaf.shape):
                raise InvalidInput(
                    f"checkpoint {step} is of another run: {name}/{path} has shape {was}, "
                    f"but this run has {tuple(leaf.shape)}."
                )


def _load_item(
    manager: ocp.CheckpointManager,
    step: int,
    name: str,
    meta: Mapping[str, Any],
    mesh: Mesh | None,
    rules: Rules | None,
) -> Any:
    """One item as nested dicts, whose structure is that of the paths."""
    abstract: dict[str, Any] = {}
    for path, array in meta["items"][name].items():
        *parents, last = path.split("/")
        folder = abstract
        for parent in parents:
            folder = folder.setdefault(parent, {})
        folder[last] = jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["dtype"]))
    try:
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(_placed(abstract, mesh, rules))})
        item = manager.restore(step, args=args)[name]
    except Exception as error:
        raise Damaged(_first_line(error)) from error
    _check_fingerprints(name, item, meta)
    return item


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
