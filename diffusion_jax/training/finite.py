"""Which arrays of a state are finite: what a run looks at before it keeps a state.

A step whose loss, gradient, update or parameters are not finite is skipped within the program. Moments and averages
are not looked at there, for that would double the time to compile a step; they are looked at here, before a checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.distributed import path_name
from diffusion_jax.training.storage import lies_on_host


@jax.jit
def _all_finite(leaves: list) -> list:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def paths_not_finite(tree: Any) -> list[str]:
    """The paths of the arrays in which an entry is NaN or infinite; looked at where they lie."""
    named = [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    leaves = [leaf for _, leaf in named]
    if all(map(lies_on_host, leaves)):
        found: Sequence[Any] = [np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves]
    else:
        found = jax.device_get(_all_finite(leaves))
    return [name for (name, _), finite in zip(named, found, strict=True) if not finite]
