"""Shardings as a pure function of (abstract tree, rules, mesh), and the way of host batches onto the mesh.

A rule speaks about a tensor's path and its trailing dimensions, so it serves the parameters, their averages and
their optimiser moments alike (all have the parameter's path as a suffix), stacked over depth or not.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.distributed.mesh import AXES, automatic
from diffusion_jax.errors import InvalidInput, invalid, unknown

BATCH_AXES = ("data", "fsdp")
"""Mesh axes along which the batch is split."""

TRANSFORMER = (
    (r"(^|/)(q|k|v|query|key|value|qkv|gate|up|mlp_in|fc1)/kernel$", (None, "tensor")),
    (r"(^|/)(q|k|v|query|key|value|qkv|gate|up|mlp_in|fc1)/bias$", ("tensor",)),
    (r"(^|/)(out|o|proj|down|mlp_out|fc2)/kernel$", ("tensor", None)),
)
"""Tensor parallelism after Shoeybi et al. 2019 (section 3): projections into heads or hidden units are split by
column, those out of them by row, so a residual branch needs one all-reduce."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """How tensors are laid out.

    patterns: `(regex, axes)` pairs; the first regex found in a tensor's path ("blocks/attention/q/kernel") wins.
        `axes` names a mesh axis, a tuple of them, or None for each of the *last* dimensions; leading ones (depth) are
        not split.
    fsdp_min_size: tensors with fewer entries are not split along `fsdp`: gathering them costs more than it saves.
    """

    patterns: tuple = TRANSFORMER
    fsdp_min_size: int = 2**16

    def __post_init__(self):
        if self.fsdp_min_size < 0:
            raise invalid("fsdp_min_size", self.fsdp_min_size, "it must not be negative")
        for pattern, axes in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise invalid("rules.patterns", pattern, f"a regular expression is needed ({error})") from None
            for axis in axes:
                for name in axis if isinstance(axis, tuple) else (axis,):
                    if name is not None and name not in AXES:
                        raise unknown(f"mesh axis in the rule {pattern!r}", name, AXES)


def path_name(path: tuple) -> str:
    """`blocks/attention/q/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh, *, strict: bool = False) -> PartitionSpec:
    """The layout of one tensor: the first matching pattern, then `fsdp` along the largest dimension that divides.

    Where a pattern's axis does not divide its dimension, the dimension is left whole, or, if `strict`, InvalidInput
    is raised (parameters are strict; factored optimiser moments have other shapes than their parameter).
    """
    axes: list = [None] * len(shape)
    for pattern, wanted in rules.patterns:
        if not re.search(pattern, path):
            continue
        if len(wanted) <= len(shape):
            for dim, axis in enumerate(wanted, start=len(shape) - len(wanted)):
                size = _size(mesh, axis)
                if size > 1 and shape[dim] % size == 0:
                    axes[dim] = axis
                elif size > 1 and strict:
                    raise InvalidInput(
                        f"{path} has shape {shape}: dimension {dim} does not divide by mesh axis {axis}={size}."
                    )
        break
    used = {name for axis in axes if axis for name in (axis if isinstance(axis, tuple) else (axis,))}
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and "fsdp" not in used and math.prod(shape) >= rules.fsdp_min_size:
        candidates = [dim for dim, size in enumerate(shape) if axes[dim] is None and size % fsdp == 0]
        if candidates:
            axes[max(candidates, key=lambda dim: (shape[dim], dim))] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _size(mesh: Mesh, axis: str | tuple | None) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def shardings(tree: Any, mesh: Mesh, rules: Rules | None = None, *, strict: bool = False) -> Any:
    """A tree of `NamedSharding` for a tree of arrays, tracers or `ShapeDtypeStruct`."""
    rules, mesh = Rules() if rules is None else rules, automatic(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), np.shape(leaf), rules, mesh, strict=strict)), tree
    )


def constrain(tree: Any, mesh: Mesh | None, rules: Rules | None = None) -> Any:
    """Inside a jitted function: lays `tree` out by the rules; the identity without a mesh."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, rules))


def init_sharded(function: Callable[..., Any], *args: Any, mesh: Mesh | None, rules: Rules | None = None) -> Any:
    """`function(*args)` under jit, each output made where the rules place it: no device ever holds the whole tree.

    Arrays that the function closes over (the parameters of a checkpoint) are handed to the program, not built into it,
    and the result never shares their memory.
    """
    closed, made = jax.make_jaxpr(function, return_shape=True)(*args)

    def run(held, *args):
        leaves = eval_jaxpr(closed.jaxpr, [jax.numpy.copy(value) for value in held], *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(made), leaves)

    if mesh is None:
        return jax.jit(run)(closed.consts, *args)
    held = [_on(mesh, value) for value in closed.consts]
    return jax.jit(run, out_shardings=shardings(made, mesh, rules))(held, *args)


def _on(mesh: Mesh, value: Any) -> Any:
    """The value, put whole on every device of the mesh unless it is on the mesh already."""
    if isinstance(value, jax.Array) and value.sharding.device_set == set(mesh.devices.flat):
        return value
    return jax.device_put(value, NamedSharding(automatic(mesh), PartitionSpec()))


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """Every array whole on each device of the mesh, so that each of several processes can read it; the arrays as they
    are where one process has them all."""
    if mesh is None or jax.process_count() == 1:
        return tree
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(automatic(mesh), PartitionSpec()))(tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension along (data, fsdp), the others whole."""
    return NamedSharding(automatic(mesh), PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(size: int, mesh: Mesh | None, accumulate: int = 1) -> None:
    """Raises InvalidInput unless a global batch of `size` divides by accumulation steps and devices."""
    parts = accumulate * (1 if mesh is None else batch_shards(mesh))
    if size % parts:
        told = f"accumulate={accumulate}" if mesh is None else _told(mesh, accumulate)
        raise invalid("batch_size", size, f"it must be a multiple of {parts} ({told})")


def _told(mesh: Mesh, accumulate: int) -> str:
    parts = [f"mesh.{axis}={mesh.shape[axis]}" for axis in BATCH_AXES]
    return " x ".join(parts + ([f"accumulate={accumulate}"] if accumulate > 1 else []))


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a host batch on the mesh; with several processes each gives its own part and gets the global arrays.

    Every leaf is `[b, ...]` with b the process's share of the batch. Raises InvalidInput if the batch does not
    divide.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    place = batch_sharding(mesh)
    processes = jax.process_count()

    def put(leaf):
        if np.ndim(leaf) < 1:
            raise InvalidInput(f"a leaf of the batch has shape {np.shape(leaf)}, but its first dimension is the batch.")
        check_batch(np.shape(leaf)[0] * processes, mesh)
        if isinstance(leaf, jax.Array) and (leaf.sharding == place or not leaf.is_fully_addressable):
            return leaf
        if processes == 1:
            return jax.device_put(leaf, place)
        return jax.make_array_from_process_local_data(place, np.asarray(leaf))

    return jax.tree.map(put, batch)
