"""Where the adapters of others' files belong in our parameters: found in the network's own table, both ways.

A change of a tensor of theirs becomes a change of ours by the layout of the table row, whatever it is: joined
projections, patches as convolutions, halves in another order, layers stacked over depth.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.interop.families import FAMILIES
from diffusion_jax.interop.pretrained import Pretrained
from diffusion_jax.interop.tables import Slot, slots, their_shapes
from diffusion_jax.models import by_path


class Target(NamedTuple):
    """A tensor of theirs that an adapter changes.

    name, shape: theirs. slots: our parameters that it joins. layer: which layer of each of them, None where they are
    not stacked over depth.
    """

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    layer: int | None

    @property
    def low_rank(self) -> bool:
        """Whether our parameters are kernels, for which factors stay factors."""
        return all(slot.path.endswith("/kernel") for slot in self.slots)

    @property
    def copies(self) -> tuple[str, ...]:
        """The tensors of theirs that are this one here, where their file repeats it for every layer."""
        return tuple(self.slots[0].names) if self.slots[0].source.copies else ()

    def parts(self, value: np.ndarray):
        """Each slot with its part of a tensor of theirs, in our layout."""
        for slot in self.slots:
            size = slot.their_part[0] if slot.their_part else None
            yield slot, slot.ours(value if size is None else value[slot.start : slot.start + size])

    def theirs(self, leaves: Mapping[str, Any]) -> np.ndarray:
        """Their tensor, float32, of our parameters by path."""
        parts = []
        for slot in self.slots:
            leaf = leaves[slot.path]
            parts.append(slot.theirs(np.asarray(leaf if self.layer is None else leaf[self.layer], np.float32)))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Module(NamedTuple):
    """A layer of theirs: its name, and its weight and bias, None where it has none."""

    name: str
    weight: Target | None
    bias: Target | None


def modules_of(pretrained: Pretrained) -> dict[str, Module]:
    """Every layer of the network, by its name in their files with underscores for dots."""
    entry = FAMILIES[pretrained.family]
    shapes = {path: leaf.shape for path, leaf in by_path(entry.shapes(pretrained.network)).items()}
    places = slots(entry.table(pretrained.network.module), shapes)
    whole = their_shapes(places)
    joined: dict[str, list[Slot]] = {}
    for slot in places.values():
        joined.setdefault(slot.source.name, []).append(slot)
    found: dict[str, Module] = {}
    for group in joined.values():
        group.sort(key=lambda slot: slot.start)
        for layer, name in enumerate(group[0].names):
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "bias"):
                target = Target(name, whole[name], tuple(group), layer if group[0].stacked else None)
                key = module.replace(".", "_")
                found[key] = found.get(key, Module(module, None, None))._replace(**{kind: target})
    return found


def place_factors(leaves: dict[str, np.ndarray], target: Target, down: np.ndarray, up: np.ndarray, rank: int) -> None:
    """Writes `up [O, r] down [r, *I]`, theirs, into our factors of `rank`, which are made on the way."""
    own = len(down)
    for slot in target.slots:
        inputs, outputs = slot.factors()
        a = np.moveaxis(down.reshape(own, -1)[:, inputs], 0, -1)
        b = up[slot.start + outputs].T
        stack = slot.shape[:1] if slot.stacked else ()
        module = slot.path.removesuffix("/kernel")
        first = leaves.setdefault(f"{module}/a", np.zeros((*stack, *a.shape[:-1], rank), np.float32))
        second = leaves.setdefault(f"{module}/b", np.zeros((*stack, rank, b.shape[-1]), np.float32))
        at = () if target.layer is None else (target.layer,)
        first[(*at, ..., slice(0, own))] = a
        second[(*at, slice(0, own), slice(None))] = b


def place_change(leaves: dict[str, np.ndarray], target: Target, change: np.ndarray) -> None:
    """Writes a change of their tensor as changes of our parameters, which are made on the way."""
    for slot, part in target.parts(change):
        leaf = leaves.setdefault(slot.path, np.zeros(slot.shape, np.float32))
        leaf[() if target.layer is None else target.layer] = part


def joined_factors(leaves: Mapping[str, Any], target: Target) -> tuple[np.ndarray, np.ndarray] | None:
    """Their two factors of a weight, `down [r, *I]` and `up [O, r, ...]`, None where there are none of it.

    Where the weight joins several of ours, theirs stand side by side, or are shared where ours are equal.
    """
    downs: list[np.ndarray] = []
    ups: list[np.ndarray] = []
    for slot in target.slots:
        module = slot.path.removesuffix("/kernel")
        if f"{module}/a" not in leaves:
            continue
        a, b = (np.asarray(leaves[f"{module}/{name}"], np.float32) for name in "ab")
        if target.layer is not None:
            a, b = a[target.layer], b[target.layer]
        inputs, outputs = slot.factors()
        down = np.zeros((a.shape[-1], math.prod(target.shape[1:])), np.float32)
        down[:, inputs] = np.moveaxis(a, -1, 0)
        up = np.zeros((target.shape[0], len(b)), np.float32)
        up[slot.start + outputs] = b.T
        if downs and np.array_equal(downs[-1], down):
            ups[-1] = ups[-1] + up
        else:
            downs.append(down)
            ups.append(up)
    if not downs:
        return None
    down, up = np.concatenate(downs), np.concatenate(ups, axis=1)
    # Zeros fill up what has a smaller rank than the largest.
    used = down.any(axis=1) | up.any(axis=0)
    if not used.any():
        return None
    down, up = down[used].reshape(-1, *target.shape[1:]), up[:, used]
    return down, up.reshape(*up.shape, *(1,) * (down.ndim - 2))


def joined_change(leaves: Mapping[str, Any], target: Target) -> np.ndarray | None:
    """Their tensor's change, None where none of our parameters that it joins is changed."""
    there = [slot for slot in target.slots if slot.path in leaves]
    if not there:
        return None
    every = {slot.path: leaves.get(slot.path, np.zeros(slot.shape, np.float32)) for slot in target.slots}
    return target.theirs(every)
