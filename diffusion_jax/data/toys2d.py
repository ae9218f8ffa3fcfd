"""Distributions in the plane, and Gaussian mixtures of any dimension with their exact density.

Everything is scaled to a standard deviation of about one. The exact denoiser of a mixture lives in `denoisers`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.errors import InvalidInput, invalid, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """`p(x) = sum_k weights_k N(x; means_k, covariances_k)` in float64."""

    weights: Float[np.ndarray, " K"]
    means: Float[np.ndarray, "K D"]
    covariances: Float[np.ndarray, "K D D"]

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        """E[x]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Cov[x], within the components and between them."""
        apart = self.means - self.mean
        return np.einsum("k,kij->ij", self.weights, self.covariances) + np.einsum(
            "k,ki,kj->ij", self.weights, apart, apart
        )

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`count` draws `[count, D]` and the component each came from `[count]`."""
        label = rng.choice(len(self.weights), count, p=self.weights)
        roots = np.linalg.cholesky(self.covariances)
        noise = rng.standard_normal((count, self.means.shape[1]))
        return self.means[label] + np.einsum("nij,nj->ni", roots[label], noise), label

    def log_density(self, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
        """log p(x), exact."""
        roots = np.linalg.cholesky(self.covariances)
        apart = np.asarray(x, np.float64)[:, None] - self.means
        white = np.linalg.solve(roots, apart[..., None])[..., 0]
        log_det = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(-1)
        logs = np.log(self.weights) - 0.5 * (white**2).sum(-1) - log_det - 0.5 * x.shape[1] * np.log(2 * np.pi)
        top = logs.max(axis=1, keepdims=True)
        return top[:, 0] + np.log(np.exp(logs - top).sum(axis=1))


def gaussian_blobs(
    weights: tuple[float, ...] = (0.5, 0.3, 0.2),
    means: tuple[tuple[float, ...], ...] = ((-1.5, 0.0), (1.5, 1.0), (0.5, -1.5)),
    stds: tuple[float, ...] | float = 0.3,
    split: str = "train",
    num_examples: int = 20_000,
    seed: int = 0,
) -> ArraySource:
    """Draws `[N, D]` of an isotropic Gaussian mixture; `label` is the component, `source.density` the exact `Mixture`.

    stds: standard deviation of each component, or one for all.
    """
    share, mean = np.asarray(weights, np.float64), np.asarray(means, np.float64)
    if mean.ndim != 2 or share.shape != mean.shape[:1]:
        raise invalid("means.shape", mean.shape, f"it must be (components, dimensions) with {len(share)} components")
    if (share <= 0).any() or abs(share.sum() - 1) > 1e-6:
        raise invalid("weights", weights, "they must be positive and sum to 1")
    std = np.broadcast_to(np.asarray(stds, np.float64), share.shape)
    if not (std > 0).all():
        raise invalid("stds", stds, "they must be positive")
    density = Mixture(share / share.sum(), mean, std[:, None, None] ** 2 * np.eye(mean.shape[1]))
    return _drawn("gaussian_mixture", split, num_examples, seed, density.sample, len(share), density)


def toys2d(
    name: str = "two_moons", split: str = "train", num_examples: int = 20_000, noise: float = 0.05, seed: int = 0
) -> ArraySource:
    """Draws `[N, 2]` of "two_moons", "checkerboard", "spirals", "gaussians" (a ring of eight) or "pinwheel".

    `label` is the moon, the square, the arm or the Gaussian. Train and test come from independent generators.
    noise: standard deviation of the noise across the curves of moons and spirals; other shapes ignore it.
    """
    if name not in TOYS:
        raise unknown("name", name, TOYS)
    if noise < 0:
        raise invalid("noise", noise, "it must not be negative")
    if name == "gaussians":
        density = _ring()
        return _drawn(name, split, num_examples, seed, density.sample, 8, density)
    draw, classes = TOYS[name]
    return _drawn(name, split, num_examples, seed, lambda count, rng: draw(count, rng, noise), classes, None)


def _drawn(name, split, num_examples, seed, draw, classes, density):
    check_split(split)
    if num_examples < 1:
        raise InvalidInput(f"num_examples is {num_examples}, but at least one is needed.")
    # One stream per split and seed: continuous draws of independent streams are disjoint.
    rng = np.random.default_rng((seed, ("train", "test").index(split)))
    x, label = draw(num_examples, rng)
    return ArraySource(
        x.astype(np.float32), {"label": label.astype(np.int32)}, f"{name}/{split}", num_classes=classes, density=density
    )


def _two_moons(count, rng, noise):
    label = rng.integers(2, size=count)
    angle = rng.uniform(0, np.pi, count)
    x = np.where(label == 0, np.cos(angle) - 0.5, 0.5 - np.cos(angle))
    y = np.where(label == 0, np.sin(angle) - 0.25, 0.25 - np.sin(angle))
    return 1.3 * (np.stack([x, y], axis=1) + noise * rng.standard_normal((count, 2))), label


def _checkerboard(count, rng, noise):
    label = rng.integers(8, size=count)
    row = label // 2
    column = 2 * (label % 2) + row % 2
    corner = np.stack([column, row], axis=1) - 2.0
    return 0.9 * (corner + rng.uniform(size=(count, 2))), label


def _spirals(count, rng, noise):
    label = rng.integers(2, size=count)
    radius = np.sqrt(rng.uniform(0.02, 1, count))
    angle = 3 * np.pi * radius + np.pi * label
    x = 2.0 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return x + noise * rng.standard_normal((count, 2)), label


def _pinwheel(count, rng, noise):
    label = rng.integers(5, size=count)
    along = 1.3 + 0.35 * rng.standard_normal(count)
    across = 0.1 * rng.standard_normal(count)
    angle = 2 * np.pi * label / 5 + 0.6 * np.exp(along - 0.8)
    turn = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    side = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
    return along[:, None] * turn + across[:, None] * side, label


def _ring():
    angle = 2 * np.pi * np.arange(8) / 8
    means = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return Mixture(np.full(8, 1 / 8), means, np.tile(0.15**2 * np.eye(2), (8, 1, 1)))


TOYS = {
    "two_moons": (_two_moons, 2),
    "checkerboard": (_checkerboard, 8),
    "spirals": (_spirals, 2),
    "gaussians": (None, 8),
    "pinwheel": (_pinwheel, 5),
}
