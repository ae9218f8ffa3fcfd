"""Dense predictions against the truth: overlap of masks, and depth up to an affine map."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Numbers


def mask_overlap(found: Bool[np.ndarray, "B ..."], true: Bool[np.ndarray, "B ..."]) -> Float[np.ndarray, " B"]:
    """Intersection over union of each pair of masks; 1 where both are empty."""
    found, true = (np.asarray(mask, bool).reshape(len(mask), -1) for mask in (found, true))
    if found.shape != true.shape:
        raise invalid("the shapes of two sets of masks", (found.shape, true.shape), "equal ones are needed")
    union = (found | true).sum(axis=1)
    return np.where(union > 0, (found & true).sum(axis=1) / np.maximum(union, 1), 1.0)


def affine_depth_error(found: Numbers, true: Numbers, valid: Any = None) -> Float[np.ndarray, " B"]:
    """AbsRel, the mean of |a d + b - d*| / d* over a map, with the a and b of least squares for each (Ke et al. 2024).

    found: d `[B, ...]`, in any unit. true: d*, positive where `valid` (everywhere unless given) and anything elsewhere.
    A constant map has the error of the best constant. Raises InvalidInput for a truth that is not positive.
    """
    found, true = (np.asarray(values, np.float64).reshape(len(values), -1) for values in (found, true))
    counts = np.ones_like(true) if valid is None else np.asarray(valid, np.float64).reshape(true.shape)
    if not (true[counts > 0] > 0).all():
        raise invalid("the least true depth", float(true[counts > 0].min()), "it must be positive")
    # What is unknown is often NaN, which a weight of 0 would not silence.
    found, true = (np.where(counts > 0, values, 1.0) for values in (found, true))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def mean(values):
        return (share * values).sum(axis=1, keepdims=True)

    apart = found - mean(found)
    spread = mean(apart**2)
    slope = mean(apart * (true - mean(true))) / np.where(spread > 1e-12, spread, np.inf)
    fitted = mean(true) + slope * apart
    return mean(np.abs(fitted - true) / true)[:, 0]
