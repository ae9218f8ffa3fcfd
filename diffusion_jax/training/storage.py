"""What a checkpoint is on disk: folders, items, fingerprints, and the reading of one item.

Layout of a workdir, also of an exported one:

    config.json                     the run's configuration, when given
    checkpoints/<step>/params       nested dict of arrays
    checkpoints/<step>/ema_<name>   one such dict for each track
    checkpoints/<step>/rest         the other fields of the state, flat by path
    checkpoints/<step>/meta         JSON: format, shape, dtype and fingerprint of every array, of the frozen trees too,
                                    and a digest of all that
    checkpoints/<step>/data         position in the data, one file for each process, with its digest
    snapshots/<step>/ema_<name>     power-function tracks, kept for `ema.reconstruct`
    lock                            who is training here (`lock`)

A fingerprint is the sum modulo 2^32 of an array's words: it does not depend on the mesh, and a flipped bit always
changes it. Files are data, never code: nothing is unpickled.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules, path_name, shardings
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.training.damage import Damaged, reading, system_error
from diffusion_jax.training.data_position import DataPosition, PositionHandler, digest
from diffusion_jax.training.state import TrainState

FORMAT = 2
"""What is written: 1 had no digests, so that parameters of it can be read, but no run can go on from it."""

EMPTY = {"empty": True}
"""What the metadata say of a dict without entries, which has a place in the tree and no array."""


def folder(workdir: str | os.PathLike) -> epath.Path:
    """A folder of this machine, made absolute, or of a bucket (`gs://...`)."""
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def made_folder(workdir: str | os.PathLike) -> epath.Path:
    root = folder(workdir)
    if root.exists() and not root.is_dir():
        raise invalid("workdir", str(workdir), "it must be a folder")
    root.mkdir(parents=True, exist_ok=True)
    return root


def writable(path: epath.Path, keep: int | None) -> ocp.CheckpointManager:
    # Folders of an interrupted save are cleared away; they never had a finished checkpoint's name.
    def opened(**more: Any) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, **more)
        return ocp.CheckpointManager(path, options=options, handler_registry=_registry())

    try:
        return opened()
    except Exception as error:
        if system_error(error):
            raise
        # What Orbax says of one checkpoint is damaged: it is not to stand in the way of the others.
        return opened(lightweight_initialize=True)


def readable(path: epath.Path) -> ocp.CheckpointManager:
    """For this process alone, so that what one of several cannot read does not leave the others waiting."""
    if not path.is_dir():
        raise InvalidInput(f"{path} does not exist: workdir must be the folder of a run.")
    # Orbax warns of each setting that goes without saying.
    quiet = {"create": False, "save_interval_steps": 0}
    options = ocp.CheckpointManagerOptions(
        read_only=True, lightweight_initialize=True, multiprocessing_options=_alone(), **quiet
    )
    with reading(str(path)):
        return ocp.CheckpointManager(path, options=options, handler_registry=_registry())


def _alone() -> ocp.options.MultiprocessingOptions:
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
    )


def _registry():
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("data", DataPosition, PositionHandler())
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    registry.add("meta", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    return registry


def items_of(state: TrainState) -> dict[str, Any]:
    """The items that a state is stored as; leaves without entries are not stored."""
    rest = state._replace(params=(), ema=())
    return {
        "params": plain(state.params),
        **{f"ema_{name}": plain(track) for name, track in state.ema.items()},
        "rest": _flat(rest),
    }


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path).replace("/", "."): _storable(leaf) for path, leaf in leaves if np.prod(leaf.shape) > 0}


def plain(tree: Any) -> Any:
    return jax.tree.map(_storable, tree)


def _storable(leaf: Any) -> Any:
    """Typed keys as their words; everything else as it is."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            words = jax.eval_shape(jax.random.key_data, leaf)
            return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)
    return leaf


def state_from_items(items: Mapping[str, Any], abstract: TrainState) -> TrainState:
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


def placed(abstract: Any, mesh: Mesh | None, rules: Rules | None) -> Any:
    """`abstract` with the sharding each leaf shall have."""
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, mesh, rules),
    )


def one_copy(tree: Any) -> Any:
    """`tree`, of arrays that several devices of this process hold whole, with the first one's copies alone.

    Orbax would have each device write a slice of them, and compile a program for each slice of each shape.
    """

    def one(leaf):
        several = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and leaf.is_fully_replicated
        return leaf.addressable_data(0) if several else leaf

    return jax.tree.map(one, tree)


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


def _sum_on_host(leaf: Any) -> np.uint32:
    flat = np.ravel(np.asarray(leaf))
    return np.sum(flat.view({1: np.uint8, 2: np.uint16}.get(flat.itemsize, np.uint32)), dtype=np.uint32)


def lies_on_host(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())
    )


def _fingerprints(item: Any) -> dict[str, int]:
    """The sum of each array's words; where it lies, so that nothing large is moved and a host compiles nothing."""
    leaves = jax.tree_util.tree_flatten_with_path(item)[0]
    arrays = [leaf for _, leaf in leaves]
    host = all(map(lies_on_host, arrays))
    sums = list(map(_sum_on_host, arrays)) if host else jax.device_get(_sums(arrays))
    return {path_name(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def described(item: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and fingerprint of every array, by path; `EMPTY` of a dict without entries."""
    leaves = jax.tree_util.tree_flatten_with_path(item, is_leaf=lambda node: isinstance(node, dict) and not node)[0]
    named, sums = {path_name(path): leaf for path, leaf in leaves}, _fingerprints(item)
    return {
        path: EMPTY
        if isinstance(leaf, dict)
        else {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": sums[path]}
        for path, leaf in named.items()
    }


def params_digest(params: Any) -> str:
    """What tells parameters from others, wherever they lie: of shapes, dtypes and fingerprints."""
    return digest(described(params))[:16]


def check_fingerprints(name: str, item: Any, meta: Mapping[str, Any]) -> None:
    for path, value in _fingerprints(item).items():
        if meta["items"][name][path]["sum"] != value:
            raise Damaged(f"{name}/{path} is not what was saved")


def meta_of(items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What is stored beside `items`, with a digest of itself; `more` are further plain values."""
    described_items = {name: described(item) for name, item in items.items()}
    meta = {"format": FORMAT, "items": described_items, **more}
    return {**meta, "sha256": digest(meta)}


def read_meta(manager: ocp.CheckpointManager, step: int, formats: Sequence[int] = (1, FORMAT)) -> dict[str, Any]:
    """What `meta_of` made. Raises Damaged if it is anything else, InvalidInput for another format than `formats`."""
    _check_files(epath.Path(manager.directory) / str(step))
    with reading(f"checkpoint {step} in {manager.directory}"):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
        raise Damaged("its meta file is incomplete")
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    if meta.get("sha256", None if meta["format"] == 1 else "missing") not in (None, digest(rest)):
        raise Damaged("its meta file is not what was saved")
    if meta["format"] not in formats:
        read = " and ".join(map(str, formats))
        raise InvalidInput(
            f"checkpoint {step} in {manager.directory} has format {meta['format']}, but format {read} is needed."
        )
    if not _describes_items(meta.get("items")):
        raise Damaged("its meta file does not describe arrays")
    return meta


def _check_files(checkpoint: epath.Path) -> None:
    """Raises Damaged for a fifo or a device among the files of this machine: reading it would never end."""
    if "://" in os.fspath(checkpoint):
        return
    for root, _, names in os.walk(checkpoint):
        for name in names:
            # What cannot be looked at is told by whoever reads it.
            path = os.path.join(root, name)
            if os.path.exists(path) and not os.path.isfile(path):
                raise Damaged(f"{path} is no regular file")


def _describes_items(items: Any) -> bool:
    def is_array(entry):
        return entry == EMPTY or (
            isinstance(entry, dict)
            and isinstance(entry.get("shape"), list)
            and all(type(size) is int and size >= 0 for size in entry["shape"])
            and isinstance(entry.get("dtype"), str)
            and isinstance(entry.get("sum"), int)
        )

    return (
        isinstance(items, dict)
        and bool(items)
        and all(isinstance(item, dict) and all(map(is_array, item.values())) for item in items.values())
    )


def check_items(step: int, wanted: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raises InvalidInput, naming the first difference, if a healthy checkpoint belongs to another run."""
    for name, item in wanted.items():
        if name not in meta["items"]:
            raise InvalidInput(f"checkpoint {step} has no {name!r}: it is of a run with other settings.")
        stored = {path: array for path, array in meta["items"][name].items() if array != EMPTY}
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


def check_frozen(step: int, frozen: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raises InvalidInput, naming the first difference, if a run was trained beside other frozen trees.

    frozen: `described` of each, by its path in the objective's state.
    """
    was, now = (
        {f"{name}/{path}": array for name, tree in trees.items() for path, array in tree.items()}
        for trees in (meta.get("frozen", {}), frozen)
    )
    for path in sorted(was.keys() | now.keys()):
        if was.get(path) != now.get(path):
            how = "has other values" if path in was and path in now else "is there in one of them alone"
            raise InvalidInput(
                f"checkpoint {step} was trained beside other frozen parameters than those of this run: {path} {how}."
            )


def load_item(
    manager: ocp.CheckpointManager,
    step: int,
    name: str,
    meta: Mapping[str, Any],
    mesh: Mesh | None,
    rules: Rules | None,
) -> Any:
    """One item as nested dicts, whose structure is that of the paths."""
    abstract: dict[str, Any] = {}
    with reading(f"{name} of checkpoint {step} in {manager.directory}"):
        for path, array in meta["items"][name].items():
            *parents, last = path.split("/")
            branch = abstract
            for parent in parents:
                branch = branch.setdefault(parent, {})
            whole = array != EMPTY
            branch[last] = jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["dtype"])) if whole else {}
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(placed(abstract, mesh, rules))})
        item = manager.restore(step, args=args)[name]
        check_fingerprints(name, item, meta)
    return item
