"""All distances between two sets of features, what could not be measured, and how far the numbers can be trusted.

The distances themselves are in `frechet`, `kernel` and `manifold`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.arrays import feature_set
from diffusion_jax.metrics.frechet import distance_of_roots, root_of_features, root_of_gaussian
from diffusion_jax.metrics.kernel import kernel_distance
from diffusion_jax.metrics.manifold import manifold
from diffusion_jax.metrics.statistics import Gaussian
from diffusion_jax.typing import Numbers

NEIGHBOURS = 5
"""k of precision, recall, density and coverage, as Naeem et al. 2020 use it."""

MOST_NEIGHBOURS = 10_000
"""Examples of each set that precision, recall, density and coverage are computed from: their time grows with the
product of both."""

SUBSETS, SUBSET_SIZE = 50, 1000
"""Of the kernel distance."""

OF_FEATURES = ("kernel_distance", "kernel_distance_standard_error", "precision", "recall", "density", "coverage")
"""What needs the features of both sets; the Fréchet distance needs their means and covariances alone."""


class FeatureComparison(NamedTuple):
    """values: the measured numbers by name. not_measured: names of the others, each with the reason.
    warnings: sentences on how far the numbers can be trusted. settings: what else decides them."""

    values: dict[str, float]
    not_measured: dict[str, str]
    warnings: list[str]
    settings: dict[str, int]


def compare_features(
    features: Numbers,
    reference: Numbers | Gaussian,
    *,
    gaussian_reference: Gaussian | None = None,
    reference_count: int | None = None,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
) -> FeatureComparison:
    """Fréchet and kernel distance, precision, recall, density and coverage of `features [N, D]`.

    reference: the features `[M, D]` to compare with, or only their mean and covariance, from which the Fréchet distance
        alone can be measured. gaussian_reference: mean and covariance for the Fréchet distance in place of those of
        `reference`, such as those of a whole data set. reference_count: of how many examples these are, where known.
    neighbours: k of the last four. seed: of random subsets.

    Raises InvalidInput for sets of different features, and for fewer than two examples.
    """
    for name, rows in (("features", features), ("reference", reference)):
        if not isinstance(rows, Gaussian) and len(rows) < 2:
            raise InvalidInput(f"A distance needs at least 2 images on each side, but the {name} are of {len(rows)}.")
    alone = isinstance(reference, Gaussian)
    whole = reference if alone else gaussian_reference
    if whole is None:
        reference_count = len(reference)
    ours = np.shape(features)[-1]
    theirs = len(whole.mean) if whole is not None else np.shape(reference)[-1]
    if ours != theirs:
        raise invalid("the number of features", ours, f"the reference has {theirs}: they come of different networks")
    values = {"frechet_distance": frechet_to(features, reference if whole is None else whole)}
    settings: dict[str, int] = {"seed": seed}
    not_measured: dict[str, str] = {}
    warnings = _warnings_of_size(len(features), reference_count, ours, alone)
    if alone:
        reason = "the reference is a statistics file of mean and covariance; give the images themselves"
        return FeatureComparison(values, dict.fromkeys(OF_FEATURES, reason), warnings, settings)

    size = min(SUBSET_SIZE, len(features), len(reference))
    kernel = kernel_distance(reference, features, SUBSETS, size, seed)
    values["kernel_distance"] = kernel.mean
    if np.isnan(kernel.standard_error):
        not_measured["kernel_distance_standard_error"] = "at least 4 images are needed on each side"
    else:
        values["kernel_distance_standard_error"] = kernel.standard_error
    settings |= {"kernel_subsets": SUBSETS, "kernel_subset_size": size}
    if min(len(features), len(reference)) <= neighbours:
        reason = f"more than {neighbours} images are needed on each side"
        return FeatureComparison(values, not_measured | dict.fromkeys(OF_FEATURES[2:], reason), warnings, settings)
    rng = np.random.default_rng(seed)
    theirs, own = (_some_rows(rows, rng) for rows in (reference, features))
    values |= manifold(theirs, own, neighbours)._asdict()
    settings |= {"neighbours": neighbours, "neighbour_images": len(own), "neighbour_reference": len(theirs)}
    if max(len(features), len(reference)) > MOST_NEIGHBOURS:
        warnings.append(
            f"Precision, recall, density and coverage are of {len(own)} and {len(theirs)} random images of the sides."
        )
    if len(own) != len(theirs):
        warnings.append(
            f"Precision, recall, density and coverage depend on the sizes of both sets, here {len(own)} and "
            f"{len(theirs)}: compare them only with numbers from the same sizes."
        )
    return FeatureComparison(values, not_measured, warnings, settings)


def frechet_to(features: Numbers, reference: Numbers | Gaussian) -> float:
    """The Fréchet distance of features `[N, D]` to others, or to a mean and covariance."""
    other = root_of_gaussian(*reference) if isinstance(reference, Gaussian) else root_of_features(reference)
    return distance_of_roots(root_of_features(features), other)


def _warnings_of_size(count: int, of_reference: int | None, dimension: int, alone: bool) -> list[str]:
    sides = {"images": count, "reference images": dimension + 1 if of_reference is None else of_reference}
    small = [f"{number} {name}" for name, number in sides.items() if number <= dimension]
    if not small:
        return []
    instead = "" if alone else " The kernel distance is unbiased at any size: use it for sets like these."
    return [
        f"The Fréchet distance is biased upwards here: {' and '.join(small)} are too few for {dimension} features, "
        "since a covariance of fewer images than features is singular. Compare it only with values from the same "
        f"numbers of images.{instead}"
    ]


def _some_rows(rows: Numbers, rng: np.random.Generator) -> np.ndarray:
    rows = np.asarray(rows)
    if len(rows) <= MOST_NEIGHBOURS:
        return rows
    return rows[np.sort(rng.choice(len(rows), MOST_NEIGHBOURS, replace=False))]


def clip_scores(images: Numbers, texts: Numbers) -> np.ndarray:
    """`100 max(cos(image, text), 0)` of each pair of CLIP's vectors `[N, D]` (Hessel et al. 2021, on the scale of
    0 to 100 that is usual now): `[N]`. Raises InvalidInput for shapes that differ, and for a vector of zeros."""
    a, b = feature_set("images", images), feature_set("texts", texts)
    if a.shape != b.shape:
        raise invalid("shapes of images and texts", (a.shape, b.shape), "one text an image is needed")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if (lengths == 0).any():
        raise invalid("the length of a vector", 0.0, "a vector of zeros has no direction")
    return 100.0 * np.maximum((a * b).sum(axis=1) / lengths, 0.0)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean of independent values and its standard error, nan for a single one."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(values.mean()), error
