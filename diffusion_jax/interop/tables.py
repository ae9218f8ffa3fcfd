"""Where each of our parameters stands in somebody else's file: one table a network, read in both directions.

A table maps our path ("blocks/block/mlp/up/kernel") to a `Source`: their name, and how their array is laid out, as an
einops pattern. A pattern is its own inverse, so the same table loads and saves. What depends on an architecture is in
that architecture's file; how tensors get from the disk to a mesh is in `files` and `pretrained`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import einops
import jax
import numpy as np
from jax.typing import DTypeLike

from diffusion_jax.errors import InvalidInput

DENSE = "o i -> i o"
CONV = "o i p q -> p q i o"

ALIGNMENT = 64
"""Bytes."""


class StoredTensor(NamedTuple):
    """Where one of our tensors comes from.

    name: their tensor. "{}" stands for the number of a layer: ours has those layers on its first axis.
    layout: einops pattern from theirs to ours; empty where they are the same.
    part, parts: ours is part `part` of the `parts` that their tensor joins along its first axis (fused projections);
        parts of one tensor may differ in length.
    sizes: lengths of axes that the inverse pattern cannot know: `(("p", 2), ("q", 2))`.
    copies: their file holds this many equal copies, numbered by "{}", of our one tensor; 0 for none.
    swapped: the halves of their tensor along its first axis stand in the other order than ours (scale before shift).
    """

    name: str
    layout: str = ""
    part: int = 0
    parts: int = 1
    sizes: tuple[tuple[str, int], ...] = ()
    copies: int = 0
    swapped: bool = False


TensorTable = dict[str, StoredTensor]


def vector(ours: str, theirs: str, **source: Any) -> TensorTable:
    """A tensor that is laid out alike on both sides: a vector, an embedding, a table."""
    return {ours: StoredTensor(theirs, **source)}


def _layer(layout: str, ours: str, theirs: str, bias: bool, source: dict) -> TensorTable:
    table = {f"{ours}/kernel": StoredTensor(f"{theirs}.weight", layout, **source)}
    if bias:
        table[f"{ours}/bias"] = StoredTensor(f"{theirs}.bias", **{**source, "sizes": ()})
    return table


def dense(ours: str, theirs: str, bias: bool = True, **source: Any) -> TensorTable:
    """A linear layer: `theirs.weight [O, I]` and `theirs.bias`."""
    return _layer(DENSE, ours, theirs, bias, source)


def conv(ours: str, theirs: str, bias: bool = True, **source: Any) -> TensorTable:
    """A convolution: `theirs.weight [O, I, p, q]` and `theirs.bias`."""
    return _layer(CONV, ours, theirs, bias, source)


def norm(ours: str, theirs: str, bias: bool = True, **source: Any) -> TensorTable:
    """A norm's `theirs.weight` and `theirs.bias`, here `scale` and `bias`."""
    table = vector(f"{ours}/scale", f"{theirs}.weight", **source)
    return {**table, **vector(f"{ours}/bias", f"{theirs}.bias", **source)} if bias else table


class Slot(NamedTuple):
    """One of our tensors as a place to be filled: its `Source` and shape, and where its part starts in their tensor."""

    path: str
    source: StoredTensor
    shape: tuple[int, ...]
    start: int

    @property
    def stacked(self) -> bool:
        return "{}" in self.source.name and not self.source.copies

    @property
    def names(self) -> list[str]:
        """Their tensors, one a layer; all copies."""
        count = self.source.copies or (self.shape[0] if self.stacked else 1)
        return [self.source.name.replace("{}", str(i)) for i in range(count)]

    @property
    def item(self) -> tuple[int, ...]:
        """The shape of one layer of ours."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def their_part(self) -> tuple[int, ...]:
        """The shape, in their layout, of what ours is of their tensor."""
        return _their_shape(self.source, self.item)

    def ours(self, part: np.ndarray) -> np.ndarray:
        """One layer of ours from their part."""
        part = _swap(part) if self.source.swapped else part
        return einops.rearrange(part, self.source.layout) if self.source.layout else part

    def theirs(self, layer: np.ndarray) -> np.ndarray:
        """Their part from one layer of ours."""
        part = _inverse(self.source)(layer)
        return _swap(part) if self.source.swapped else part

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the two factors of a change of their part stand in ours: `(inputs, outputs)`.

        Their weight is `[O, *I]`, a change of it `B A` with A `[rank, *I]` and B `[O, rank]`; ours is
        `a = A.reshape(rank, -1)[:, inputs]`, `[rank, ...]` in the shape of our kernel without its last axis, and
        `b = B[outputs]`.
        """
        outputs, *inputs = self.their_part
        row = np.arange(outputs, dtype=np.int32).reshape(-1, *(1,) * len(inputs))
        column = np.arange(math.prod(inputs), dtype=np.int32).reshape(1, *inputs)
        return (
            self.ours(np.broadcast_to(column, self.their_part))[..., 0],
            self.ours(np.broadcast_to(row, self.their_part))[(0,) * (len(self.item) - 1)],
        )

    def fill(self, read: Callable[[str, tuple], np.ndarray], index: tuple[slice, ...], dtype: DTypeLike) -> np.ndarray:
        """The entries of ours at `index`, read through `read(name, index)`; no more is read than the layout forces."""
        index = tuple(slice(*entry.indices(size)[:2]) for entry, size in zip(index, self.shape, strict=True))
        out = aligned_empty([entry.stop - entry.start for entry in index], dtype)
        if not self.stacked:
            out[...] = self._layer(read, self.names[0], index)
            return out
        for row, name in enumerate(self.names[index[0]]):
            out[row] = self._layer(read, name, index[1:])
        return out

    def whole(self, read: Callable[[str, tuple], np.ndarray], dtype: DTypeLike) -> np.ndarray:
        """All of ours."""
        return self.fill(read, (slice(None),) * len(self.shape), dtype)

    def _layer(self, read, name, index):
        axes = _permutation(self.source.layout, len(self.item))
        if axes is None or self.source.swapped:
            whole = tuple(slice(0, size) for size in self.their_part)
            return self.ours(read(name, self._shifted(whole)))[index]
        theirs = tuple(index[axes.index(axis)] for axis in range(len(axes)))
        return self.ours(read(name, self._shifted(theirs)))

    def _shifted(self, index):
        if not index:
            return index
        return (slice(index[0].start + self.start, index[0].stop + self.start), *index[1:])


def _swap(part: np.ndarray) -> np.ndarray:
    return np.roll(part, len(part) // 2, axis=0)


def aligned_empty(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """An array at an address that JAX's CPU backend can use as it is, without another copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _permutation(layout: str, ndim: int) -> list[int] | None:
    """For each of our axes the number of theirs; None where the pattern does more than permute."""
    if not layout:
        return list(range(ndim))
    left, right = (side.split() for side in layout.split("->"))
    if "(" in layout or sorted(left) != sorted(right):
        return None
    return [left.index(name) for name in right]


def _inverse(source: StoredTensor) -> Callable[[Any], Any]:
    if not source.layout:
        return lambda layer: layer
    left, right = source.layout.split("->")
    return lambda layer: einops.rearrange(layer, f"{right.strip()} -> {left.strip()}", **dict(source.sizes))


@lru_cache(maxsize=2**14)
def _their_shape(source: StoredTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    struct = jax.ShapeDtypeStruct(shape, np.float32)
    return tuple(jax.eval_shape(_inverse(source), struct).shape)


def slots(table: TensorTable, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """The table with the shapes of our tensors, by our path. Raises InvalidInput where the two do not match.

    shapes: our tensors by path, `models.by_path(tree of ShapeDtypeStruct)`.
    """
    lacking, idle = sorted(set(shapes) - set(table)), sorted(set(table) - set(shapes))
    if lacking or idle:
        raise InvalidInput(f"The table does not fit the network: it lacks {lacking} and has no use for {idle}.")
    joined: dict[str, list[str]] = {}
    for path, source in table.items():
        joined.setdefault(source.name, []).append(path)
    starts = {}
    for name, paths in joined.items():
        paths.sort(key=lambda path: table[path].part)
        if [table[path].part for path in paths] != list(range(table[paths[0]].parts)):
            raise InvalidInput(f"The table names {name} for {paths}: each of its parts must be there once.")
        start = 0
        for path in paths:
            starts[path] = start
            slot = Slot(path, table[path], tuple(shapes[path]), start)
            start += slot.their_part[0] if slot.their_part else 0
    return {path: Slot(path, source, tuple(shapes[path]), starts[path]) for path, source in table.items()}


def their_shapes(places: Mapping[str, Slot]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that their file has."""
    result: dict[str, tuple[int, ...]] = {}
    for slot in places.values():
        part = slot.their_part
        for name in slot.names:
            there = result.get(name)
            result[name] = part if there is None else (there[0] + part[0], *part[1:])
    return result


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as a nested dict: the inverse of `models.by_path`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree
