"""Arithmetic on pixels that sources share: uint8 to [-1, 1], resizing, cropping and cutting into patches."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from diffusion_jax.errors import InvalidInput, invalid


def from_uint8(image: np.ndarray) -> np.ndarray:
    """uint8 in 0 .. 255 to float32 in [-1, 1]; a missing channel axis is added to a grey image `[H, W]`."""
    image = np.asarray(image, np.float32) / 127.5 - 1.0
    return image[..., None] if image.ndim == 2 else image


def resize(image: Float[np.ndarray, "H W C"], size: int | tuple[int, int]) -> Float[np.ndarray, "h w C"]:
    """Bicubic resize of floats with antialiasing, clipped to the range of the input."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise invalid("size", size, "it must be at least 1")
    if image.shape[:2] == (height, width):
        return image
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        for c in range(image.shape[-1])
    ]
    return np.clip(np.stack(channels, axis=-1), image.min(), image.max())


def centre_crop(image: Float[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "size size C"]:
    """The shorter side is resized to `size`, and the middle of the longer one is kept."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    image = resize(image, (max(size, round(height * scale)), max(size, round(width * scale))))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def cut(image: Float[np.ndarray, "H W C"], size: int, stride: int, split: str) -> Float[np.ndarray, "N size size C"]:
    """Patches on a grid: the right quarter of the image is the test split, the rest train, so they share no pixel."""
    border = round(image.shape[1] * 0.75)
    part = image[:, :border] if split == "train" else image[:, border:]
    height, width = part.shape[:2]
    if height < size or width < size:
        raise InvalidInput(
            f"size is {size}, but the {split} part of an image of shape {image.shape[:2]} holds no such patch: "
            "use a smaller size or a smaller downscale."
        )
    windows = np.lib.stride_tricks.sliding_window_view(part, (size, size), axis=(0, 1))[::stride, ::stride]
    return np.ascontiguousarray(windows.transpose(0, 1, 3, 4, 2).reshape(-1, size, size, part.shape[-1]))
