"""Fréchet distance between Gaussians fitted to features, and the streaming moments it is computed from.

Everything is float64 on the host: covariances of thousands of features lose too much in float32. Where the features
come from is the business of `features` and `inception`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Numbers


class Moments(NamedTuple):
    """Count, mean `[D]` and scatter `[D, D]` (sum of outer products of deviations) of features seen so far."""

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Unbiased covariance; raises InvalidInput for fewer than two examples."""
        if self.count < 2:
            raise InvalidInput(f"A covariance needs at least two examples; {self.count} were seen.")
        return self.scatter / (self.count - 1)


def moments(features: Numbers) -> Moments:
    """Moments of a batch of features `[N, D]`. Raises InvalidInput when one is not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise invalid("features.shape", features.shape, "expected [N, D] with at least one row")
    if not np.isfinite(features).all():
        raise InvalidInput("The features hold a NaN or an infinity: a distance to them means nothing.")
    mean = features.mean(axis=0)
    apart = features - mean
    return Moments(len(features), mean, apart.T @ apart)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together; associative and commutative up to round-off (Chan et al. 1983)."""
    if a.mean.shape != b.mean.shape:
        raise invalid("features", b.mean.shape[0], f"the other moments have {a.mean.shape[0]} features")
    count = a.count + b.count
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + np.outer(apart, apart) * (a.count * b.count / count))


def gaussian_frechet_distance(
    mean_a: Float[np.ndarray, " D"],
    covariance_a: Float[np.ndarray, "D D"],
    mean_b: Float[np.ndarray, " D"],
    covariance_b: Float[np.ndarray, "D D"],
) -> float:
    """`|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Dowson and Landau 1982; squared, as usual for FID).

    The trace of the root is the nuclear norm of `R_a^T R_b` with `S = R R^T`, which needs no root of a product, is
    never complex, and loses no digits when a covariance is singular.
    """
    root_a, root_b = _root(covariance_a), _root(covariance_b)
    cross = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    apart = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    distance = apart @ apart + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross
    return float(max(distance, 0.0))


def _root(covariance):
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def frechet_distance(a: Numbers | Moments, b: Numbers | Moments) -> float:
    """Fréchet distance between two sets of features `[N, D]`, or their `Moments` (Heusel et al. 2017).

    It is biased upwards by about D^2 / N for small sets: compare only at equal sizes.
    """
    first, second = (features if isinstance(features, Moments) else moments(features) for features in (a, b))
    if first.mean.shape != second.mean.shape:
        raise invalid("features", second.mean.shape[0], f"the other set has {first.mean.shape[0]} features")
    return gaussian_frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
