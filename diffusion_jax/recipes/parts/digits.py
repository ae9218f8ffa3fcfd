"""The judge of handwritten digits that studies of cheaper sampling share."""

from typing import Any

import numpy as np
from jaxtyping import Array

from diffusion_jax import metrics


def judged(images: Array | np.ndarray, labels: Any) -> metrics.Judged:
    """What a judge that was trained on real digits alone says of `images [N, 8, 8, 1]` and their `labels [N]`."""
    return metrics.judged(metrics.feature_network("digits"), np.asarray(images), np.asarray(labels))
