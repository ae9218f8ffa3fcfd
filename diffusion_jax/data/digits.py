"""Handwritten digits: 1797 real images of 8 x 8 pixels from scikit-learn (UCI optical recognition of digits)."""

import functools

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.errors import invalid


def digits(split: str = "train", size: int = 8, padding: int = 0) -> ArraySource:
    """Digits `[N, size, size, 1]` in [-1, 1] with `label` 0 .. 9.

    The split is fixed and stratified: of every class a random 22 % are held out ("test": 395, "train": 1402).
    size: side in pixels; larger than 8 resizes (bicubic).
    padding: pixels of background added on each side, within `size`.
    """
    check_split(split)
    if not 8 + 2 * padding <= size <= 256 or padding < 0:
        raise invalid("size, padding", (size, padding), "size must lie in 8 + 2 padding .. 256, padding from 0")
    images, labels = _halves()[split]
    inner = size - 2 * padding
    if inner != 8:
        images = np.stack([pixels.resize(image, inner) for image in images])
    if padding:
        images = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-1.0)
    return ArraySource(
        images, {"label": labels}, f"digits/{split}", num_classes=10, class_names=tuple(map(str, range(10)))
    )


@functools.lru_cache(maxsize=1)
def _halves():
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    images = (data.reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
    labels = target.astype(np.int32)
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        held_out[rng.permutation(members)[: round(0.22 * len(members))]] = True
    return {
        "train": (images[~held_out], labels[~held_out]),
        "test": (images[held_out], labels[held_out]),
    }
