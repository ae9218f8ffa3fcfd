"""The judge of handwritten digits that studies of cheaper sampling share."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from diffusion_jax.data import digits
from diffusion_jax.metrics import class_accuracy, feature_network, frechet_distance


class Judged(NamedTuple):
    """accuracy: share of samples that the judge reads as their label. distance: Fréchet, to the held-out digits."""

    accuracy: float
    distance: float


def judged(images: Array | np.ndarray, labels: Any) -> Judged:
    """What a classifier that was trained on real digits alone says of `images [N, 8, 8, 1]` and their `labels [N]`."""
    judge, images = feature_network("digits"), np.asarray(images)
    accuracy = class_accuracy(judge.logits, images, np.asarray(labels)).mean
    return Judged(float(accuracy), float(frechet_distance(judge.features(images), _held_out_features())))


@cache
def _held_out_features() -> np.ndarray:
    return feature_network("digits").features(digits(split="test").x0)
