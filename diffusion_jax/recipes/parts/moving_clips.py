"""Clips of moving shapes, 8 frames of 16 x 16 pixels: the measures that recipes about them share."""

import numpy as np
from jaxtyping import Array

from diffusion_jax import data
from diffusion_jax.metrics import frechet_distance


def truth(count: int, frames: int = 8, split: str = "test") -> np.ndarray:
    """The first clips `[count, frames, 16, 16, 3]` of the data; longer ones go on as the law of motion says."""
    return data.moving_shapes(split, length=max(count, 1), frames=frames, classes=()).take(range(count))["x0"]


def distances(clips: Array | np.ndarray, real: Array | np.ndarray) -> dict[str, float]:
    """Fréchet distances to the clips `real` of as many frames: of single "frames" and of their changes, "motion"."""
    return {
        "frames": frechet_distance(data.moving.frame_features(clips), data.moving.frame_features(real)),
        "motion": frechet_distance(data.moving.difference_features(clips), data.moving.difference_features(real)),
    }


def identity_share(
    clips: Array | np.ndarray, real: Array | np.ndarray, frames: slice | list[int] = slice(1, None)
) -> float:
    """The share of `frames` in which a clip shows shape and colour of the first frame of the clip in `real`."""
    reading, reference = data.moving.read(clips), data.moving.read(real)
    return float(data.moving.keeps_identity(reading, reference)[:, frames].mean())


def colour(clips: Array | np.ndarray, real: Array | np.ndarray, frames: slice | list[int] = slice(1, None)) -> float:
    """The share of `frames` in which a clip shows the colour of the first frame of the clip in `real`."""
    reading, reference = data.moving.read(clips), data.moving.read(real)
    return float((reading.colour == reference.colour[:, :1])[:, frames].mean())


def mean_position_error(
    clips: Array | np.ndarray, real: Array | np.ndarray, frames: slice | list[int] = slice(1, None)
) -> float:
    """Mean distance in pixels from the object's true place, over `frames`."""
    reading, reference = data.moving.read(clips), data.moving.read(real)
    return float(data.moving.position_error(reading, reference)[:, frames].mean())
