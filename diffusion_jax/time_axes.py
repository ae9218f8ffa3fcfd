"""Times whose shape is a prefix of the data's shape: functions that expand, broadcast and check them.

`batch_axes` gives the batch axes of the state of solvers and denoisers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid


def expand(t: Any, like: Any) -> Any:
    """Appends axes to `t` until it broadcasts against `like`: `[B, N]` against `[B, N, D]` becomes `[B, N, 1]`.

    With dicts, entry by entry; one array for a dict of data serves all entries.
    Axes of size 1 broadcast. Raises `InvalidInput` if `t` is not a prefix of the data's shape.
    """
    if isinstance(like, dict):
        return {name: expand(t[name] if isinstance(t, dict) else t, leaf) for name, leaf in like.items()}
    t = jnp.asarray(t)
    shape = like.shape
    if t.ndim > len(shape) or any(a not in (1, b) for a, b in zip(t.shape, shape, strict=False)):
        raise invalid("t.shape", t.shape, f"a time must have a prefix of the data's shape {shape}")
    return t.reshape(t.shape + (1,) * (len(shape) - t.ndim))


def fill(t: Any, like: Any) -> Any:
    """Broadcasts `t` to the full prefix shape, at least `[B]`, as networks need it."""
    if isinstance(like, dict):
        return {name: fill(t[name] if isinstance(t, dict) else t, leaf) for name, leaf in like.items()}
    t = jnp.asarray(t, jnp.result_type(float))
    expand(t, like)
    ndim = max(t.ndim, 1)
    return jnp.broadcast_to(t, like.shape[:ndim])


def batch_size(x: Any) -> int:
    """B."""
    return jax.tree.leaves(x)[0].shape[0]


def each(function: Callable[..., Any], like: Any, *trees: Any) -> Any:
    """Applies `function` entry by entry of a dict of data, or once to a plain array.

    Arguments that are not dicts are shared by all entries. `function(leaf, *values)`.
    """
    if not isinstance(like, dict):
        return function(like, *trees)
    return {
        name: function(leaf, *(tree[name] if isinstance(tree, dict) else tree for tree in trees))
        for name, leaf in like.items()
    }


def where(condition: Any, x: Any, y: Any) -> Any:
    """`jnp.where` with a prefix-shaped condition, entry by entry."""
    expanded = expand(condition, x)
    return jax.tree.map(jnp.where, expanded, x, y)


def batch_first(state: Any) -> Any:
    """`axes` of a solver or a denoiser whose every leaf has the batch first, or an axis of size 1 in its place."""
    return 0


def batch_axes(part: Any, state: Any) -> Any:
    """The batch axes of the state of a solver or the carry of a denoiser, see `typing.BatchAxes`.

    Raises InvalidInput where `part` remembers something and does not say, or says it of another tree.
    """
    if not jax.tree.leaves(state):
        return None
    kind = type(part).__name__
    if part.axes is None:
        raise InvalidInput(
            f"This {kind.lower()} remembers arrays but does not say where the batch stands in them: give "
            f"{kind}(..., axes=time_axes.batch_first), or a function of what is remembered that returns an axis or "
            "None a leaf."
        )
    axes = part.axes(state)
    try:
        map_axes(lambda axis, leaf: leaf, axes, state)
    except (ValueError, TypeError) as error:
        raise invalid(f"{kind}.axes", axes, f"a prefix tree of what is remembered was expected ({error})") from None
    return axes


def map_axes(function: Callable[..., Any], axes: Any, *trees: Any) -> Any:
    """`function(axis, *leaves)` for the leaves of `trees` that have a batch axis by the prefix tree `axes`.

    The leaves of the first tree where the axis is None.
    """

    def mapped(axis, first, *others):
        return first if axis is None else jax.tree.map(lambda *leaves: function(axis, *leaves), first, *others)

    return jax.tree.map(mapped, axes, *trees, is_leaf=lambda axis: axis is None)
