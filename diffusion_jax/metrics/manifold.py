"""Fidelity and diversity by nearest neighbours in a feature space: precision, recall, density, coverage."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.metrics.arrays import two_sets
from diffusion_jax.metrics.kernel import exact_where, squared_distances
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


def manifold(real: Numbers, samples: Numbers, k: int = 5, *, closed: bool = False) -> Manifold:
    """The four numbers from features `real [N, D]` and `samples [M, D]`; float64, memory of order N M.

    closed: whether what lies exactly on the surface of a ball is inside of it. It is not in the code of Naeem et al.
    (prdc), which computes all four; it is in that of Kynkäänniemi et al. Only ties differ, which discrete features and
    repeated examples have: k + 1 equal examples have balls of radius 0, which, open, hold nothing.
    """
    a, b = two_sets(real, samples)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k < min(len(a), len(b)):
        raise invalid(
            "k", k, f"a whole number from 1 to less than the smaller set, {min(len(a), len(b))}, was expected"
        )
    across = squared_distances(a, b)

    def inside(reach):
        # Ties are ties of exact distances: what is equal to rounding is computed as it stands.
        exact_where(np.abs(across - reach) <= 1e-9 * reach, across, a, b)
        return across <= reach if closed else across < reach

    inside_real, inside_samples = inside(_reach(a, k)[:, None]), inside(_reach(b, k))
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
    neighbour = np.argpartition(within, k, axis=1)[:, k]
    return ((features - features[neighbour]) ** 2).sum(axis=1)
