"""Data and solver states with an axis of entries (frames, actions) behind the batch: what streams and clips share."""

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.time_axes import batch_axes, map_axes


def check_entries(x, entries):
    for leaf in jax.tree.leaves(x):
        if jnp.ndim(leaf) < 2 or leaf.shape[1] != entries:
            raise invalid(
                "known.shape", jnp.shape(leaf), f"a buffer of {entries} entries, [B, {entries}, ...], was expected"
            )


def by_entry(solver, entries, function, *states):
    """`function(*leaves, axis)` for the leaves of solver states with an axis of entries, behind that of the batch.

    The leaves of the first state elsewhere; the last one holds all entries.
    """

    def moved(axis, *leaves):
        shape = leaves[-1].shape
        size = shape[axis + 1] if len(shape) > axis + 1 else 1
        if size not in (1, entries):
            raise InvalidInput(
                f"A leaf {list(shape)} of what a solver remembers has {size} entries in axis {axis + 1}, behind the "
                f"batch, where {entries} or 1 were expected; its axes name the batch, or None for what all share."
            )
        return function(*leaves, axis + 1) if size == entries else leaves[0]

    return map_axes(moved, batch_axes(solver, states[-1]), *states)
