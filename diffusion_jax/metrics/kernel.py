"""Kernel distances between samples: the KID of feature space, and the exact MMD for low-dimensional data."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.metrics.arrays import two_sets
from diffusion_jax.typing import Numbers

KERNELS = ("gaussian", "laplace", "polynomial")


class KernelDistance(NamedTuple):
    """An unbiased estimate of the squared MMD of two distributions, and its standard error over draws of both sets.

    The error is nan for subsets of less than four examples, which do not tell it.
    """

    mean: float
    standard_error: float


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`|x_i - y_j|^2`, `[N, M]`, to twelve digits wherever the points lie; exactly 0 for equal ones."""
    centre = (x.mean(axis=0) + y.mean(axis=0)) / 2
    x, y = x - centre, y - centre
    size = (x**2).sum(1)[:, None] + (y**2).sum(1)
    squared = size - 2 * x @ y.T
    # Of near pairs that difference has few digits left.
    return exact_where(squared <= 1e-4 * size, squared, x, y)


def exact_where(mask: np.ndarray, squared: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances `[N, M]`, of which those under `mask` are computed as they stand, pair by pair, in place."""
    for row in np.flatnonzero(mask.any(axis=1)):
        columns = mask[row]
        squared[row, columns] = ((x[row] - y[columns]) ** 2).sum(axis=1)
    return squared


def _mmd2(kxx, kyy, kxy, unbiased):
    n, m = len(kxx), len(kyy)
    if not unbiased:
        return float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    inside_x = (kxx.sum() - np.trace(kxx)) / (n * (n - 1))
    inside_y = (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return float(inside_x + inside_y - 2 * kxy.mean())


def _polynomial(x, y, centre):
    """`(x.y / D + 1)^3 - (c.c / D + 1)^3`, whose constant drops out of every MMD; without it digits are kept.

    With `e = (x.y - c.c) / D` and `s = c.c / D + 1` that is `e (e^2 + 3 s e + 3 s^2)`.
    """
    u, v = x - centre, y - centre
    start = centre @ centre / x.shape[1] + 1.0
    e = ((u @ centre)[:, None] + v @ centre + u @ v.T) / x.shape[1]
    return e * (e**2 + 3 * start * e + 3 * start**2)


def kernel_distance(
    x: Numbers, y: Numbers, subsets: int = 50, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Kernel inception distance of features `[N, D]`, `[M, D]`: unbiased `MMD^2` with the kernel `(x.y / D + 1)^3`.

    Averaged over random subsets (Binkowski et al. 2018, section 4); a subset is never larger than the smaller set. The
    more subsets, the closer that is to the estimate from all examples, which one subset of all is.

    The standard error is that over draws of both sets, independent of each other, and of the subsets. With
    `a(x) = E k(x, X') - E k(x, Y)`, b(y) likewise, and g a kernel without its means over either argument,

        error^2 = 4 Var a / N + 4 Var b / M + 2 E g_xx^2 / N (N - 1) + 2 E g_yy^2 / M (M - 1) + 4 E g_xy^2 / N M  (1)

    (Hoeffding 1948), plus the variance between subsets over their number, which subsets of all examples do not have. So
    it holds for equal distributions too, where a and b vanish (and where it is rather too large, since their estimated
    variances are taken as 0 when negative), and no number of subsets brings it below (1).
    """
    x, y = two_sets(x, y, least=2)
    if subsets < 1 or subset_size < 2:
        raise invalid("subsets, subset_size", (subsets, subset_size), "at least 1 subset of at least 2 is needed")
    size = min(subset_size, len(x), len(y))
    if size == len(x) == len(y):
        subsets = 1
    rng, centre = np.random.default_rng(seed), (x.mean(axis=0) + y.mean(axis=0)) / 2
    values, parts = [], []
    for _ in range(subsets):
        a, b = x[rng.permutation(len(x))[:size]], y[rng.permutation(len(y))[:size]]
        kernels = _polynomial(a, a, centre), _polynomial(b, b, centre), _polynomial(a, b, centre)
        values.append(_mmd2(*kernels, True))
        parts.append(_variances(*kernels))
    if size < 4:
        return KernelDistance(float(np.mean(values)), float("nan"))
    var_a, var_b, g_xx, g_yy, g_xy = np.mean(parts, axis=0)
    n, m = len(x), len(y)
    variance = max(4 * var_a / n + 4 * var_b / m, 0.0)
    variance += 2 * g_xx / (n * (n - 1)) + 2 * g_yy / (m * (m - 1)) + 4 * g_xy / (n * m)
    if subsets > 1:
        variance += np.var(values, ddof=1) / subsets
    return KernelDistance(float(np.mean(values)), float(np.sqrt(variance)))


def _variances(kxx, kyy, kxy):
    """Var a, Var b, E g_xx^2, E g_yy^2 and E g_xy^2 of equation (1), unbiased, from the kernels of two sets of n."""
    n = len(kxx)
    if n < 4:
        return [np.nan] * 5
    across = kxy - kxy.mean(axis=1, keepdims=True) - kxy.mean(axis=0) + kxy.mean()
    g_xy = (across**2).sum() / (n - 1) ** 2
    first, second = [], []
    for within, crossed in ((kxx, kxy.mean(axis=1)), (kyy, kxy.mean(axis=0))):
        within = within - np.diag(np.diag(within))
        rows = within.sum(axis=1) / (n - 2)
        # Means that leave the diagonal out, so that the squares are unbiased (Szekely and Rizzo 2014, U-centring).
        inner = within - rows[:, None] - rows + rows.sum() / (n - 1)
        np.fill_diagonal(inner, 0.0)
        g = (inner**2).sum() / (n * (n - 3))
        # What the g of the other examples add to the variance of the means is taken out again.
        first.append(np.var(rows - crossed, ddof=1) - g * (n - 1) / (n - 2) ** 2 - g_xy / n)
        second.append(g)
    return [*first, *second, g_xy]


def mmd2(
    x: Numbers, y: Numbers, kernel: str = "gaussian", bandwidth: float | None = None, unbiased: bool = True
) -> float:
    """Squared maximum mean discrepancy between all of `x [N, D]` and `y [M, D]` (Gretton et al. 2012, lemma 6).

    kernel: "gaussian" `exp(-d^2 / 2 h^2)`, "laplace" `exp(-d / h)`, or "polynomial" `(x.y / D + 1)^3`.
    bandwidth: h; the median distance between the two sets when None.
    unbiased: without the diagonal, so that it is zero in the mean, and may be negative, for equal distributions.
    """
    x, y = two_sets(x, y, least=2)
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    if kernel == "polynomial":
        centre = (x.mean(axis=0) + y.mean(axis=0)) / 2
        return _mmd2(_polynomial(x, x, centre), _polynomial(y, y, centre), _polynomial(x, y, centre), unbiased)
    across = squared_distances(x, y)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(across))) or 1.0
    if not 0 < bandwidth < np.inf:
        raise invalid("bandwidth", bandwidth, "it must be a positive number")

    def k(squared):
        return np.exp(-squared / (2 * bandwidth**2)) if kernel == "gaussian" else np.exp(-np.sqrt(squared) / bandwidth)

    return _mmd2(k(squared_distances(x, x)), k(squared_distances(y, y)), k(across), unbiased)
