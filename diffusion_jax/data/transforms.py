"""Transforms of single examples, `(example, generator) -> example`, for `data.pipeline(transforms=...)`.

Randomness comes from the generator alone, which belongs to the example's position in the stream. What moves pixels
moves all that lies on them: `x0 [H, W, C]`, its `weight [H, W]`, and conditions `[H, W, C]` of its height and width.
Dropping conditions for guidance is part of the objective and is not here.
"""

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.pipeline import Transform
from diffusion_jax.errors import invalid


def _on_pixels(example, function):
    """The example with `function`, of arrays `[H, W, C]`, applied to x0 and to what lies on its pixels."""
    size, changed = example["x0"].shape[:2], {**example, "x0": function(example["x0"])}
    if "weight" in example:
        changed["weight"] = function(example["weight"][..., None])[..., 0]
    if "cond" in example:
        on_pixels = {key: np.ndim(value) == 3 and value.shape[:2] == size for key, value in example["cond"].items()}
        changed["cond"] = {key: function(value) if on_pixels[key] else value for key, value in example["cond"].items()}
    return changed


def flip(probability: float = 0.5) -> Transform:
    """Mirrors `x0 [H, W, C]` left to right with this probability."""
    if not 0 <= probability <= 1:
        raise invalid("probability", probability, "it must lie in [0, 1]")

    def apply(example, rng):
        if rng.random() >= probability:
            return example
        return _on_pixels(example, lambda image: np.ascontiguousarray(image[:, ::-1]))

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
    return lambda example, rng: _on_pixels(example, lambda image: pixels.centre_crop(image, size))


def random_crop(size: int = 32) -> Transform:
    """A square of `size` pixels at a random place of `x0 [H, W, C]`."""
    if size < 1:
        raise invalid("size", size, "it must be at least 1")

    def apply(example, rng):
        height, width = example["x0"].shape[:2]
        if min(height, width) < size:
            raise invalid("size of random_crop", size, f"an image of {height} x {width} pixels is smaller")
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        return _on_pixels(example, lambda image: image[top : top + size, left : left + size])

    return apply
