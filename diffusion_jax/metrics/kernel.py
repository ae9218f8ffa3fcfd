"""Kernel distances between samples: the KID of feature space, and the exact MMD for low-dimensional data."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.typing import Numbers

KERNELS = ("gaussian", "laplace", "polynomial")


class KernelDistance(NamedTuple):
    """Mean over subsets of the unbiased squared MMD, and the standard error of that mean."""

    mean: float
    standard_error: float


def _pair(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise invalid("shapes of the two sets", (x.shape, y.shape), "expected [N, D] and [M, D]")
    if min(len(x), len(y)) < 2:
        raise invalid("sizes of the two sets", (len(x), len(y)), "each needs at least two examples")
    return x, y


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`|x_i - y_j|^2`, `[N, M]`."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0.0)


def _mmd2(kxx, kyy, kxy, unbiased):
    n, m = len(kxx), len(kyy)
    if not unbiased:
        return float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    inside_x = (kxx.sum() - np.trace(kxx)) / (n * (n - 1))
    inside_y = (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return float(inside_x + inside_y - 2 * kxy.mean())


def _polynomial(x, y):
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kernel_distance(
    x: Numbers, y: Numbers, subsets: int = 50, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Kernel inception distance of features `[N, D]`, `[M, D]`: unbiased `MMD^2` with the kernel `(x.y / D + 1)^3`.

    Averaged over random subsets (Binkowski et al. 2018, section 4); a subset is never larger than the smaller set.
    """
    x, y = _pair(x, y)
    if subsets < 1 or subset_size < 2:
        raise invalid("subsets, subset_size", (subsets, subset_size), "at least 1 subset of at least 2 is needed")
    size = min(subset_size, len(x), len(y))
    if size == len(x) == len(y):
        subsets = 1
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = x[rng.permutation(len(x))[:size]], y[rng.permutation(len(y))[:size]]
        values.append(_mmd2(_polynomial(a, a), _polynomial(b, b), _polynomial(a, b), True))
    spread = np.std(values) / np.sqrt(subsets)
    return KernelDistance(float(np.mean(values)), float(spread))


def mmd2(
    x: Numbers, y: Numbers, kernel: str = "gaussian", bandwidth: float | None = None, unbiased: bool = True
) -> float:
    """Squared maximum mean discrepancy between all of `x [N, D]` and `y [M, D]` (Gretton et al. 2012, lemma 6).

    kernel: "gaussian" `exp(-d^2 / 2 h^2)`, "laplace" `exp(-d / h)`, or "polynomial" `(x.y / D + 1)^3`.
    bandwidth: h; the median distance between the two sets when None.
    unbiased: without the diagonal, so that it is zero in the mean, and may be negative, for equal distributions.
    """
    x, y = _pair(x, y)
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    if kernel == "polynomial":
        return _mmd2(_polynomial(x, x), _polynomial(y, y), _polynomial(x, y), unbiased)
    across = squared_distances(x, y)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(across))) or 1.0
    if bandwidth <= 0:
        raise invalid("bandwidth", bandwidth, "it must be positive")

    def k(squared):
        return np.exp(-squared / (2 * bandwidth**2)) if kernel == "gaussian" else np.exp(-np.sqrt(squared) / bandwidth)

    return _mmd2(k(squared_distances(x, x)), k(squared_distances(y, y)), k(across), unbiased)
