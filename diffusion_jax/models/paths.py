"""Trees of parameters and collections, by the paths of a network's modules: `"blocks/block/attention"`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.typing import Anatomy


def at_path(tree: Any, path: str | Sequence[str]) -> Any:
    """The subtree under a path, `"condition/time"` or its parts; an empty one where there is none."""
    for name in path.split("/") if isinstance(path, str) else path:
        tree = tree.get(name, {})
    return tree


def replaced_at(tree: Any, path: str | Sequence[str], value: Any) -> Any:
    """A copy of the tree with `value` under the path, which need not be there."""
    parts = path.split("/") if isinstance(path, str) else path
    return {**tree, parts[0]: replaced_at(tree.get(parts[0], {}), parts[1:], value)} if parts else value


def by_path(collection: Mapping[str, Any]) -> dict[str, Any]:
    """A collection as `{"blocks/block/attention/output": array}`."""
    leaves = jax.tree_util.tree_leaves_with_path(collection)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def depth_axes(collection: Mapping[str, Any], anatomy: Anatomy | None = None) -> Any:
    """How many leading axes of each leaf are depth: 1 within a stack of blocks, 0 elsewhere; see `Anatomy.scanned`."""
    scanned = (anatomy or Anatomy()).scanned
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sum(getattr(part, "key", None) in scanned for part in path), collection
    )


def per_layer(collection: Any, values: Any) -> Any:
    """A collection whose every entry is filled with `values`, one per layer `[L]` (or one scalar for all)."""
    values = jnp.asarray(values)

    def filled(leaf):
        return jnp.broadcast_to(values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim)), leaf.shape).astype(
            leaf.dtype
        )

    return jax.tree.map(filled, collection)
