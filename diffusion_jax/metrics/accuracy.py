"""Does a sample show what it was asked for: class accuracy by a classifier that took no part in the training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.arrays import labels_within, real_numbers
from diffusion_jax.typing import Numbers


class ClassAccuracy(NamedTuple):
    """Share of samples whose predicted class is the one asked for, over all and per class (nan for absent classes)."""

    mean: float
    per_class: np.ndarray


def class_accuracy(logits: Callable[[Any], Any] | Any, images: Numbers | None, labels: Numbers) -> ClassAccuracy:
    """Accuracy of `labels [N]` under a classifier.

    logits: a function of the images (such as `Judge.logits`), or the logits `[N, K]` themselves.
    labels: whole numbers from 0 to K - 1. Raises InvalidInput for others, for no samples, and for logits with a NaN.
    """
    scores = real_numbers("logits", logits(images) if callable(logits) else logits)
    if scores.ndim != 2 or not scores.size:
        raise invalid("logits.shape", scores.shape, "[N, K] with at least one sample was expected")
    if np.isnan(scores).any():
        raise InvalidInput("logits hold a NaN: they name no class.")
    labels = labels_within(labels, *scores.shape)
    right = scores.argmax(axis=1) == labels
    per_class = [right[labels == c].mean() if (labels == c).any() else np.nan for c in range(scores.shape[1])]
    return ClassAccuracy(float(right.mean()), np.asarray(per_class))
