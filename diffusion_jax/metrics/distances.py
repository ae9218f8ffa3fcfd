"""Distances between samples of low-dimensional data, exact for the samples given: Wasserstein, sliced and energy.

Kernel discrepancies are in `kernel`. Everything is float64 on the host.
"""

import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.metrics.arrays import two_sets
from diffusion_jax.typing import Numbers


def _check_power(p):
    if not 1 <= p < np.inf:
        raise invalid("p", p, "a number of at least 1 was expected")


def wasserstein_1d(x: Numbers, y: Numbers, p: float = 2.0) -> np.ndarray:
    """`W_p^p` between the columns of `x [N, K]` and `y [M, K]`, each an empirical distribution on the line: `[K]`.

    Exact for any two sizes: the integral of `|F^-1 - G^-1|^p` over the merged steps of both quantile functions.
    """
    _check_power(p)
    x, y = (np.sort(one, axis=0) for one in two_sets(x, y))
    if len(x) == len(y):
        return (np.abs(x - y) ** p).mean(axis=0)
    steps = np.unique(np.concatenate([np.arange(1, len(x) + 1) / len(x), np.arange(1, len(y) + 1) / len(y)]))
    widths = np.diff(steps, prepend=0.0)
    middles = steps - widths / 2
    at_x = np.minimum((middles * len(x)).astype(np.int64), len(x) - 1)
    at_y = np.minimum((middles * len(y)).astype(np.int64), len(y) - 1)
    return (np.abs(x[at_x] - y[at_y]) ** p * widths[:, None]).sum(axis=0)


def sliced_wasserstein(x: Numbers, y: Numbers, projections: int = 256, p: float = 2.0, seed: int = 0) -> float:
    """`(E_theta W_p^p(theta.x, theta.y))^(1/p)` over random directions of the unit sphere (Bonneel et al. 2015)."""
    x, y = two_sets(x, y)
    if projections < 1:
        raise invalid("projections", projections, "at least 1 is needed")
    directions = np.random.default_rng(seed).standard_normal((x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    # Around their own centre, projections keep the digits that a common offset would take.
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    return float(wasserstein_1d(x @ directions, y @ directions, p).mean() ** (1 / p))


def wasserstein(x: Numbers, y: Numbers, p: float = 2.0) -> float:
    """`W_p` between two sets of equal size by the exact optimal assignment; O(N^3), for some thousand points."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    _check_power(p)
    x, y = two_sets(x, y)
    if len(x) != len(y):
        raise invalid("sizes of the two sets", (len(x), len(y)), "the assignment needs equal sizes")
    cost = cdist(x, y) ** p
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean() ** (1 / p))


def energy_distance(x: Numbers, y: Numbers) -> float:
    """`2 E|X - Y| - E|X - X'| - E|Y - Y'|` with all pairs counted (Székely and Rizzo 2013); zero iff x and y agree."""
    from scipy.spatial.distance import cdist

    x, y = two_sets(x, y)
    return float(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean())
