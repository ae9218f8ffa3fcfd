"""Fidelity and diversity by nearest neighbours in a feature space: precision, recall, density, coverage."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.metrics.kernel import squared_distances
from diffusion_jax.typing import Numbers


class Manifold(NamedTuple):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    precision: share of samples inside the ball of some real example. recall: share of real examples inside the ball of
    some sample. density: how many real balls a sample lies in, over k; may exceed 1. coverage: share of real balls
    that hold a sample. The ball of an example reaches to its k-th nearest neighbour in its own set.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Numbers, samples: Numbers, k: int = 5) -> Manifold:
    """The four numbers from features `real [N, D]` and `samples [M, D]`; float64, memory of order N M."""
    a, b = np.asarray(real, np.float64), np.asarray(samples, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise invalid("shapes of the two sets", (a.shape, b.shape), "expected [N, D] and [M, D]")
    if not 1 <= k < min(len(a), len(b)):
        raise invalid("k", k, f"it must be at least 1 and less than the smaller set, {min(len(a), len(b))}")
    # Around a common centre the expansion of the squared distance loses fewer digits.
    centre = a.mean(axis=0)
    a, b = a - centre, b - centre
    across = squared_distances(a, b)
    inside_real = across <= _reach(a, k)[:, None]
    inside_samples = across <= _reach(b, k)
    return Manifold(
        precision=float(inside_real.any(axis=0).mean()),
        recall=float(inside_samples.any(axis=1).mean()),
        density=float(inside_real.sum(axis=0).mean() / k),
        coverage=float(inside_real.any(axis=1).mean()),
    )


def _reach(features, k):
    """Squared distance of each to its k-th neighbour other than itself."""
    within = squared_distances(features, features)
    np.fill_diagonal(within, -1.0)
    return np.partition(within, k, axis=1)[:, k]
