"""What an image to start from and a mask are, from whatever holds a picture, and how they are brought to a size."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from diffusion_jax import pixels
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.reading import first_line

FITS = ("crop", "stretch")
"""How an image of another size is made to fit: the middle of it in the right proportions, or all of it out of them."""

COLOURED = 0.1
"""Channels of a mask that differ by more than this are colours, and what those mean is not known."""


def read_images(value: Any, name: str = "image", background: Any = None) -> Float[np.ndarray, "N H W 3"]:
    """One picture or several of one size, as `pixels.as_image` takes them; several are a list or `[N, H, W, C]`."""
    read = partial(pixels.as_image, channels=3, background=background)
    if not _several(value) and _axes(value) != 4:
        return read(value, name)[None]
    value = value if _several(value) else np.asarray(value)
    if not isinstance(value, np.ndarray) or value.shape[-1] not in (1, 3) or 0 in value.shape:
        return _stacked([read(one, f"{name}[{i}]") for i, one in enumerate(value)], name)
    images = pixels.scaled(value, name)
    if value.dtype.kind not in "bu":
        # The range of all of them: one may well be bright alone.
        pixels.check_range(images, name)
    return np.broadcast_to(images, (*images.shape[:3], 3))


def read_masks(value: Any, size: tuple[int, int], name: str = "mask") -> Float[np.ndarray, "N H W"]:
    """Masks in [0, 1] of pictures of `size`: files and Pillow images by their brightness, arrays `[H, W]`, `[N, H, W]`,
    or the same with one channel, of bool, unsigned integers (0 .. 255, or 0 and 1) or floats in [0, 1]."""
    if _several(value) and not isinstance(value[0], Sequence):
        masks = [read_masks(one, size, f"{name}[{i}]") for i, one in enumerate(value)]
        if any(len(mask) != 1 for mask in masks):
            raise invalid(name, f"{len(masks)} arrays", "each of a list must be one mask")
        return np.concatenate(masks)
    if isinstance(value, str | os.PathLike | Image.Image):
        value = _brightness(value, name)
    mask = array_of(name, value)
    if mask.shape[-2:] != size and mask.shape[-3:-1] == size and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim not in (2, 3) or mask.shape[-2:] != size:
        raise invalid(f"{name}.shape", mask.shape, f"it must be that of the image, {size}, with one channel or none")
    return _unit_interval(mask, name).reshape(-1, *size)


def _several(value):
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(one, str | os.PathLike | Image.Image) or _axes(one) > 1 for one in value)


def _axes(value):
    try:
        return np.ndim(value)
    except Exception:
        # Rows of different lengths, or whatever an object of another library raises.
        return 0


def array_of(name: str, value: Any) -> np.ndarray:
    """A NumPy array of it. Raises InvalidInput where there is none."""
    try:
        return np.asarray(value)
    except Exception as error:
        raise InvalidInput(f"{name} is no array: {first_line(error)}.") from None


def _stacked(images, name):
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise invalid(f"the sizes of {name}", sorted(sizes), "those of one call must be equal")
    return np.stack(images)


def _brightness(value, name):
    picture, alpha = pixels.image_and_alpha(value, name, background="black")
    if (alpha < 1).any():
        raise InvalidInput(f"{name} has transparent pixels: give one that is white where the image is painted anew.")
    picture = picture / 2 + 0.5
    if (picture.max(-1) - picture.min(-1)).max() > COLOURED:
        raise InvalidInput(
            f"{name} is coloured: give one that is white where the image is painted anew, black elsewhere."
        )
    # Rounded as 8 bits are.
    return np.clip(np.round(picture.mean(-1) * 255) / 255, 0.0, 1.0)


def _unit_interval(mask, name):
    kind = mask.dtype.kind
    if kind not in "buif" or (kind == "i" and mask.size and not 0 <= mask.min() <= mask.max() <= 1):
        raise invalid(
            name, f"an array of {mask.dtype}", "bool, unsigned integers, 0 and 1, or floats in [0, 1] are needed"
        )
    if kind == "u" and mask.max(initial=0) > 1:
        return (mask / np.iinfo(mask.dtype).max).astype(np.float32)
    mask = mask.astype(np.float32)
    if not ((mask >= 0) & (mask <= 1)).all():
        raise invalid(f"the range of {name}", f"{mask.min():g} to {mask.max():g}", "floats of a mask lie in [0, 1]")
    return mask


def fitted(images: Float[np.ndarray, "N H W C"], size: tuple[int, int], fit: str) -> Float[np.ndarray, "N h w C"]:
    """Images brought to `size` as `FITS` says, resampled bicubically."""
    if fit not in FITS:
        raise unknown("fit", fit, FITS)
    height, width = images.shape[1:3]
    if fit == "crop":
        scale = max(size[0] / height, size[1] / width)
        kept = min(height, max(1, round(size[0] / scale))), min(width, max(1, round(size[1] / scale)))
        top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
        images = images[:, top : top + kept[0], left : left + kept[1]]
    return np.stack([pixels.resize(image, size) for image in images])


def fitted_masks(masks: Float[np.ndarray, "N H W"], size: tuple[int, int], fit: str) -> Float[np.ndarray, "N h w"]:
    """The same for masks; one of black and white stays so."""
    found = fitted(masks[..., None], size, fit)[..., 0]
    hard = ((masks == 0) | (masks == 1)).all()
    return (found >= 0.5).astype(np.float32) if hard else found
