"""Transforms of single examples, `(example, generator) -> example`, for `data.pipeline(transforms=...)`.

Randomness comes from the generator alone, which belongs to the example's position in the stream. Dropping conditions
for guidance is part of the objective and is not here.
"""

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.pipeline import Transform
from diffusion_jax.errors import invalid


def flip(probability: float = 0.5) -> Transform:
    """Mirrors `x0 [H, W, C]` left to right with this probability."""
    if not 0 <= probability <= 1:
        raise invalid("probability", probability, "it must lie in [0, 1]")

    def apply(example, rng):
        mirrored = rng.random() < probability
        return {**example, "x0": np.ascontiguousarray(example["x0"][:, ::-1])} if mirrored else example

    return apply


def normalise(mean: float | tuple[float, ...] = 0.0, std: float | tuple[float, ...] = 1.0) -> Transform:
    """`x0 <- (x0 - mean) / std`, per channel when tuples are given; for latents, whose scale is not that of images."""
    shift, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not (scale > 0).all():
        raise invalid("std", std, "it must be positive")
    return lambda example, rng: {**example, "x0": ((example["x0"] - shift) / scale).astype(np.float32)}


def resize(size: int = 32) -> Transform:
    """Resizes the shorter side of `x0 [H, W, C]` to `size` (bicubic, antialiased) and keeps the middle square."""
    if size < 1:
        raise invalid("size", size, "it must be at least 1")
    return lambda example, rng: {**example, "x0": pixels.centre_crop(example["x0"], size)}


def random_crop(size: int = 32) -> Transform:
    """A square of `size` pixels at a random place of `x0 [H, W, C]`."""
    if size < 1:
        raise invalid("size", size, "it must be at least 1")

    def apply(example, rng):
        height, width = example["x0"].shape[:2]
        if min(height, width) < size:
            raise invalid("size of random_crop", size, f"an image of {height} x {width} pixels is smaller")
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        return {**example, "x0": example["x0"][top : top + size, left : left + size]}

    return apply
