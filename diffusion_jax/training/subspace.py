"""Noisy gradients without the directions in which the parameters have not moved (Seo et al. 2025, ZOODiP).

Every w steps the last w values of the parameters, B [w, d], standardised per feature, are decomposed, B = U S V', and

    i*  =  the smallest i with  sum_(j <= i) S_j^2 / sum_j S_j^2  >  1 - nu,      P = rows i* + 1, ... of V'        (1)
    g'  =  g (I - P' P)                                                                                           (2)

holds in the next w. Directions outside of the span of B are kept, and so are those in which B has no variance at all
(one always: B is centred), which the decomposition chooses by rounding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Number

LEAST = 1e-5
"""Singular values below this share of the largest are rounding."""


class SubspaceState(NamedTuple):
    """inner: the state of the optimiser. trail: the last w parameters, `[w, d]`. removed: P, the rows that are not
    removed being 0, `[min(w, d), d]`. count: steps so far."""

    inner: Any
    trail: Float[Array, "w d"]
    removed: Float[Array, "m d"]
    count: Any


def subspace_gradient(
    optimizer: optax.GradientTransformation, window: int = 128, share: float = 1e-3, directions: int | None = None
) -> optax.GradientTransformation:
    """`optimizer`, given the gradient of equation (2); in the first `window` steps nothing is removed.

    window, share: w and nu. directions: n of a zeroth-order gradient, which is then divided by sqrt((d' + n - 1) / n),
    d' = d - rows of P, as in the published code; None for no scale. It matters where the epsilon of Adam is large.

    All parameters are one vector and a copy of them is kept for each step of the window: it is meant for few (a word's
    vectors). Raises InvalidInput for a window below 2, a share outside of (0, 1), and no directions.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise invalid("window", window, "it must be a whole number of at least 2")
    if not 0 < share < 1:
        raise invalid("share", share, "it must lie between 0 and 1")
    if directions is not None and not directions >= 1:
        raise invalid("directions", directions, "it must be at least 1, or None for no scale")

    def init(params):
        flat = ravel_pytree(params)[0]
        rows = min(window, flat.size)
        return SubspaceState(
            optimizer.init(params), jnp.zeros((window, flat.size)), jnp.zeros((rows, flat.size)), jnp.int32(0)
        )

    def update(updates, state, params=None):
        if params is None:
            raise invalid("params", None, "the parameters are needed")
        flat, back = ravel_pytree(updates)
        if directions is not None:
            free = flat.size - jnp.any(state.removed != 0, axis=1).sum()
            flat = flat / jnp.sqrt((free + directions - 1) / directions)
        kept = flat - jnp.dot(state.removed @ flat, state.removed, precision="highest")
        moves, inner = optimizer.update(back(kept), state.inner, params)
        after = ravel_pytree(optax.apply_updates(params, moves))[0]
        trail = state.trail.at[state.count % window].set(after)
        count = state.count + 1
        removed = jax.lax.cond(count % window == 0, lambda: still_directions(trail, share), lambda: state.removed)
        return moves, SubspaceState(inner, trail, removed, count)

    return optax.GradientTransformation(init, update)


def still_directions(trail: Float[Array, "w d"], share: Number | Array) -> Float[Array, "m d"]:
    """P of equation (1), `[min(w, d), d]`: orthonormal rows, and rows of 0 in place of what is kept."""
    centred = trail - trail.mean(axis=0)
    spread = centred.std(axis=0)
    standardised = jnp.where(spread > 0, centred / jnp.where(spread > 0, spread, 1.0), 0.0)
    _, singular, rows = jnp.linalg.svd(standardised, full_matrices=False)
    variance = jnp.square(singular)
    explained = jnp.cumsum(variance) > (1.0 - share) * variance.sum()
    first = jnp.where(explained.any(), jnp.argmax(explained), len(variance))
    still = (jnp.arange(len(variance)) > first) & (singular > LEAST * singular[0])
    return jnp.where(still[:, None], rows, 0.0)
