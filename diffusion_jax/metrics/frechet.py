"""Fréchet distance between Gaussians fitted to features, and the streaming moments it is computed from.

Everything is float64 on the host: covariances of thousands of features lose too much in float32. Where the features
come from is the business of `features` and `inception`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.arrays import feature_set, real_numbers
from diffusion_jax.typing import Numbers

CHUNK = 4096
"""Rows that are float64 at once while moments are summed up."""


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
    rows = feature_set("features", features)
    mean = rows.mean(axis=0)
    apart = rows - mean
    return Moments(len(rows), mean, apart.T @ apart)


def moments_in_chunks(features: Numbers) -> Moments:
    """`moments` of many rows, of which few are float64 at once."""
    features = np.asarray(features)
    found = moments(features[:CHUNK])
    for start in range(CHUNK, len(features), CHUNK):
        found = merge(found, moments(features[start : start + CHUNK]))
    return found


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together; associative and commutative up to round-off (Chan et al. 1983)."""
    if a.mean.shape != b.mean.shape:
        raise invalid("features", b.mean.shape[0], f"the other moments have {a.mean.shape[0]} features")
    count = a.count + b.count
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + np.outer(apart, apart) * (a.count * b.count / count))


def gaussian_frechet_distance(mean_a: Numbers, covariance_a: Numbers, mean_b: Numbers, covariance_b: Numbers) -> float:
    """`|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Dowson and Landau 1982; squared, as usual for FID).

    The trace of the root is the nuclear norm of `R_a^T R_b` with `S = R R^T`, which needs no root of a product, is
    never complex, and loses no digits when a covariance is singular. Raises InvalidInput for shapes that do not fit
    and for a NaN or an infinity.
    """
    mean_a, mean_b = real_numbers("mean_a", mean_a), real_numbers("mean_b", mean_b)
    covariances = real_numbers("covariance_a", covariance_a), real_numbers("covariance_b", covariance_b)
    shapes = [one.shape for one in (mean_a, mean_b, *covariances)]
    if mean_a.ndim != 1 or shapes != [mean_a.shape] * 2 + [2 * mean_a.shape] * 2:
        raise invalid("shapes of the means and covariances", shapes, "[D], [D], [D, D] and [D, D] were expected")
    if not all(np.isfinite(one).all() for one in (mean_a, mean_b, *covariances)):
        raise InvalidInput("The moments hold a NaN or an infinity: a distance to them means nothing.")
    return distance_of_roots(root_of_gaussian(mean_a, covariances[0]), root_of_gaussian(mean_b, covariances[1]))


class GaussianRoot(NamedTuple):
    """A Gaussian by its mean `[D]` and a root R `[D, K]` of its covariance, `S = R R^T`; trace: of S."""

    mean: Float[np.ndarray, " D"]
    root: Float[np.ndarray, "D K"]
    trace: float


def root_of_gaussian(mean: Float[np.ndarray, " D"], covariance: Float[np.ndarray, "D D"]) -> GaussianRoot:
    """By the eigenvectors of the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    # What is 0 but for rounding would be a root of 1e-8, and thousands of those add up.
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return GaussianRoot(mean, vectors[:, kept] * np.sqrt(values[kept]), float(np.trace(covariance)))


def root_of_features(features: Numbers) -> GaussianRoot:
    """Of the Gaussian fitted to features `[N, D]`: of fewer examples than features the root is the deviations
    themselves, and nothing of size `[D, D]` is made."""
    count, dimension = np.shape(features)
    if not 1 < count <= dimension:
        found = moments_in_chunks(features)
        return root_of_gaussian(found.mean, found.covariance)
    rows = feature_set("features", features)
    mean = rows.mean(axis=0)
    root = (rows - mean).T / np.sqrt(count - 1)
    return GaussianRoot(mean, root, float((root**2).sum()))


def distance_of_roots(a: GaussianRoot, b: GaussianRoot) -> float:
    """`gaussian_frechet_distance` of two Gaussians of which roots are known."""
    cross = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    apart = a.mean - b.mean
    return float(max(apart @ apart + a.trace + b.trace - 2.0 * cross, 0.0))


def frechet_distance(a: Numbers | Moments, b: Numbers | Moments) -> float:
    """Fréchet distance between two sets of features `[N, D]`, or their `Moments` (Heusel et al. 2017).

    It is biased upwards by about D^2 / N for small sets: compare only at equal sizes.
    """
    first, second = (features if isinstance(features, Moments) else moments(features) for features in (a, b))
    if first.mean.shape != second.mean.shape:
        raise invalid("features", second.mean.shape[0], f"the other set has {first.mean.shape[0]} features")
    return gaussian_frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
