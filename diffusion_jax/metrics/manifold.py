"""Fidelity and diversity by nearest neighbours in a feature space: precision, recall, density, coverage."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.metrics.arrays import two_sets
from diffusion_jax.metrics.kernel import exact_where, squared_distances
from diffusion_jax.typing import Numbers

BLOCK = 1024
"""Rows of a matrix of distances that are in memory at once."""


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
    """The four numbers from features `real [N, D]` and `samples [M, D]`; float64, `BLOCK` rows of distances at once.

    closed: whether what lies exactly on the surface of a ball is inside of it. It is not in the code of Naeem et al.
    (prdc), which computes all four; it is in that of Kynkäänniemi et al. Only ties differ, which discrete features and
    repeated examples have: k + 1 equal examples have balls of radius 0, which, open, hold nothing.
    """
    a, b = two_sets(real, samples)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k < min(len(a), len(b)):
        raise invalid(
            "k", k, f"a whole number from 1 to less than the smaller set, {min(len(a), len(b))}, was expected"
        )
    reach_real, reach_samples = _reach(a, k), _reach(b, k)
    hits, recalled, covered = np.zeros(len(b), np.int64), 0, 0
    for rows in _blocks(len(a)):
        across = squared_distances(a[rows], b)
        inside_real, inside_samples = (
            _inside(across, reach, a[rows], b, closed) for reach in (reach_real[rows, None], reach_samples)
        )
        hits += inside_real.sum(axis=0)
        covered += int(inside_real.any(axis=1).sum())
        recalled += int(inside_samples.any(axis=1).sum())
    return Manifold(
        precision=float((hits > 0).mean()),
        recall=recalled / len(a),
        density=float(hits.mean() / k),
        coverage=covered / len(a),
    )


def _blocks(count):
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _inside(across, reach, a, b, closed):
    # Ties are ties of exact distances: what is equal to rounding is computed as it stands.
    exact_where(np.abs(across - reach) <= 1e-9 * reach, across, a, b)
    return across <= reach if closed else across < reach


def _reach(features, k):
    """Squared distance of each to its k-th neighbour other than itself."""
    reach = np.empty(len(features))
    for rows in _blocks(len(features)):
        within = squared_distances(features[rows], features)
        within[np.arange(len(within)), np.arange(rows.start, rows.stop)] = -1.0
        neighbour = np.argpartition(within, k, axis=1)[:, k]
        reach[rows] = ((features[rows] - features[neighbour]) ** 2).sum(axis=1)
    return reach
