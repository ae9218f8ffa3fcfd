"""Pixels as this library has them, float32 in [-1, 1] with channels last, made of whatever holds a picture.

    bool, unsigned integers   scaled by the range of their type: 0 .. 255 of uint8, 0 .. 65535 of uint16
    floats                    taken as they are: they lie in [-1, 1]
    signed integers           never pixels but numbers: tokens, labels, indices
    Pillow images and files   turned as their EXIF says, by the range of their depth, in front of a background where
                              they are transparent; a float picture lies in [0, 1]

Whoever takes a picture asks `as_image`, whoever takes arrays of them `scaled`. What could be meant in two ways is
refused or told: floats in [0, 1] or 0 .. 255, several frames, 32-bit integers.
"""

import math
import os
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageColor, ImageOps

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.reading import check_frames, first_line, read_image, read_image_header
from diffusion_jax.typing import Number

GREY = np.asarray([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""

BITS_PER_SAMPLE = 258
"""A tag of TIFF."""

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
"""A tag of EXIF, and those of its values by which height and width change places."""

FITS = ("crop", "stretch", "pad")
"""How a picture of another aspect is brought to a size: its middle, all of it out of shape, or all and a border."""

OVERSHOOT = 2.0
"""Floats up to this size are pixels with an overshoot, as networks give them; larger ones have another range."""

MEANT = "pixels are unsigned integers, scaled by the range of their type, or floats in [-1, 1]"


def as_image(
    value: Any, name: str = "image", *, channels: int | None = None, background: str | tuple[int, ...] | None = None
) -> Float[np.ndarray, "H W C"]:
    """One picture as float32 `[H, W, C]` in [-1, 1].

    value: a file, a Pillow image, or an array `[H, W, C]` (of NumPy, JAX or another library) of 1, 3 or 4 channels.
    name: what messages call it. channels: 1 or 3, into which it is turned; those that it has when None.
    background: what is seen where the picture is transparent, a colour of CSS or its red, green and blue in 0 .. 255.
        None refuses transparent pixels, since the colours hidden there are not what anybody saw.

    Raises InvalidInput for what is no picture, several frames, and floats whose range is not [-1, 1]: those in [0, 1]
    could be meant either way.
    """
    return image_and_alpha(value, name, channels=channels, background=background)[0]


def image_and_alpha(
    value: Any, name: str = "image", *, channels: int | None = None, background: str | tuple[int, ...] | None = None
) -> tuple[Float[np.ndarray, "H W C"], Float[np.ndarray, "H W 1"]]:
    """`as_image`, and how opaque each pixel is, from 0 to 1; 1 in a picture that says nothing of it."""
    if isinstance(value, str | os.PathLike):
        value, name = read_image(value), str(value)
    elif isinstance(value, Image.Image):
        check_frames(value, name)
    pixels, alpha = _decoded(value, name) if isinstance(value, Image.Image) else _of_array(value, name)
    if alpha is None:
        alpha = np.ones((*pixels.shape[:2], 1), np.float32)
    elif (alpha < 1).any():
        if background is None:
            raise InvalidInput(f"{name} is transparent in places: give background='white', say, to be seen there.")
        pixels = alpha * pixels + (1 - alpha) * colour(background)
    return pixels if channels is None else to_channels(pixels, channels), alpha


class Header(NamedTuple):
    """What a file says of its picture. size: height and width, upright. transparent: whether it may be in places."""

    size: tuple[int, int]
    grey: bool
    transparent: bool


def read_header(path: str | os.PathLike) -> Header:
    """The header of a picture file, of which nothing is decoded. Raises InvalidInput as `reading.read_image` does."""
    image = read_image_header(path)
    sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
    size = image.size if sideways else image.size[::-1]
    return Header(size, image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"), image.has_transparency_data)


def colour(value: str | tuple[int, ...]) -> Float[np.ndarray, "3"]:
    """A colour of CSS (`"white"`, `"#808080"`), or red, green and blue in 0 .. 255, in [-1, 1]."""
    try:
        rgb = ImageColor.getrgb(value) if isinstance(value, str) else tuple(value)
    except ValueError:
        raise invalid("background", value, "a colour such as 'white', '#808080' or (128, 128, 128) is needed") from None
    if len(rgb) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in rgb):
        raise invalid("background", value, "a colour such as 'white', '#808080' or (128, 128, 128) is needed")
    return np.asarray(rgb, np.float32) / 127.5 - 1.0


def scaled(values: Any, name: str, value_range: tuple[Number, Number] | None = None) -> np.ndarray:
    """An array of pixels as float32, of the same shape: bool and unsigned by the range of their type, floats unchanged.

    value_range: the values that become -1 and 1, of whatever real numbers there are.

    Raises InvalidInput for signed integers without a range, for what is not real, and for values outside of the range.
    """
    values = np.asarray(values)
    if value_range is not None:
        return _of_range(values, name, value_range)
    if values.dtype == bool:
        return np.where(values, np.float32(1), np.float32(-1))
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 127.5 - 1.0
    if np.issubdtype(values.dtype, np.unsignedinteger):
        return (values / (np.iinfo(values.dtype).max / 2) - 1.0).astype(np.float32)
    if jnp.issubdtype(values.dtype, np.floating):
        return _to_float32(values, name)
    raise invalid(name, _type(values), f"{MEANT}{'; signed integers are tokens' * (values.dtype.kind == 'i')}")


def _type(values):
    return f"an array {list(values.shape)} of {values.dtype}"


def _to_float32(values, name):
    """Floats as float32; one that float32 does not hold is refused rather than made infinite."""
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore"):
        made = values.astype(np.float32)
    if values.dtype.itemsize > 4 and (np.isinf(made) & np.isfinite(values)).any():
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise invalid(f"the largest value of {name}", largest, "it is beyond float32")
    return made


def _of_range(values, name, value_range):
    low, high = _checked_range(value_range)
    if values.dtype.kind not in "buif" and not jnp.issubdtype(values.dtype, np.floating):
        raise invalid(name, _type(values), "real numbers are needed")
    values = values.astype(np.float64)
    if values.size and not (values.min() >= low and values.max() <= high):
        if np.isnan(values).any():
            raise InvalidInput(f"{name} holds a NaN: mend or remove it.")
        reach = f"its values reach from {values.min():g} to {values.max():g}"
        raise invalid(f"value_range of {name}", value_range, reach)
    return ((values - low) * (2 / (high - low)) - 1).astype(np.float32)


def _checked_range(value_range):
    try:
        low, high = (float(bound) for bound in value_range)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise invalid("value_range", value_range, "two finite numbers, the smaller first, are needed, such as (0, 255)")
    return low, high


def check_range(values: np.ndarray, name: str, *, unsure: str = "refuse") -> None:
    """Raises InvalidInput unless floats can be pixels in [-1, 1].

    unsure: what happens to values that all lie in [0, 1], which may be meant so: "refuse", or "warn".
    """
    if not values.size:
        return
    low, high = float(np.min(values)), float(np.max(values))
    reach = f"from {low:g} to {high:g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidInput(f"{name} is not finite (NaN or infinity): mend or remove it.")
    if max(-low, high) > OVERSHOOT:
        hint = "give x / 127.5 - 1 of values in 0 .. 255, or uint8"
        raise invalid(f"the range of {name}", reach, f"pixels as floats lie in [-1, 1]: {hint}")
    if low >= 0:
        told = f"{name} holds floats {reach}: pixels as floats lie in [-1, 1], and these look like values in [0, 1]"
        if unsure == "refuse":
            raise InvalidInput(
                f"{told}: give 2 * x - 1, or uint8 (pictures.to_uint8 of what lies in [-1, 1] and is just bright)."
            )
        warnings.warn(f"{told}; 2 * x - 1 makes pixels of those.", stacklevel=3)


def check_signed(values: np.ndarray, name: str) -> None:
    """Raises InvalidInput for floats without a negative value, which cannot be a batch of images in [-1, 1].

    They may leave that range, as what a network predicts does; grey, a constant 0, passes.
    """
    if values.size and (low := float(values.min())) >= 0 and (high := float(values.max())) > 0:
        hint = "give 2 * x - 1 of values in [0, 1], x / 127.5 - 1 of those in 0 .. 255, or uint8"
        raise invalid(f"the range of {name}", f"from {low:g} to {high:g}", f"images lie in [-1, 1]: {hint}")


def _of_array(value, name):
    """Pixels and alpha (or None) of an array."""
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever another library's array raises
        raise InvalidInput(f"{name} is no array of pixels: {first_line(error)}.") from None
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        hint = ", channels last: np.moveaxis(x, 0, -1)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise invalid(name, _type(array), f"one picture [H, W, C] with 1, 3 or 4 channels is needed{hint}")
    if 0 in array.shape:
        raise invalid(name, _type(array), "it holds no pixel")
    pixels = scaled(array, name)
    if array.dtype.kind not in "bu":
        check_range(pixels[..., :3], name)
    if array.shape[-1] < 4:
        return pixels, None
    if array.dtype.kind not in "bu":
        if (pixels[..., 3:] != 1).any():
            raise invalid(name, _type(array), "transparency is read of uint8, Pillow images and files alone")
        return pixels[..., :3], None
    return pixels[..., :3], pixels[..., 3:] / 2 + 0.5


def _decoded(image, name):
    """Pixels `[H, W, 1 or 3]` and alpha `[H, W, 1]` (or None) of a Pillow image."""
    try:
        limit = _largest(image, name)
        image = ImageOps.exif_transpose(image)
        mode = image.mode
        if limit is not None:
            return scaled(np.asarray(image)[..., None], name, (0, limit)), None
        transparent = image.has_transparency_data
        if transparent:
            image = image.convert("RGBA")
        elif mode == "1":
            image = image.convert("L")
        elif mode not in ("L", "RGB"):
            image = image.convert("RGB")
    except InvalidInput:
        raise
    except Exception as error:  # decoders raise whatever their parsing comes upon
        raise InvalidInput(f"{name} cannot be decoded as a picture: {first_line(error)}.") from None
    values = scaled(np.asarray(image), name)
    values = values[..., None] if values.ndim == 2 else values
    if not transparent:
        return values, None
    return values[..., :3], values[..., 3:] / 2 + 0.5


def _largest(image, name):
    """What is white in a grey picture of more than 8 bits; None for all others, whose depth Pillow has made 8."""
    if image.mode == "F":
        return 1.0
    if image.mode == "I" and image.format != "PNG":
        raise InvalidInput(
            f"{name} holds 32-bit integers, whose range is not known: store 8 or 16 bits, or floats in [0, 1]."
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        return 2**bits - 1
    return None


def to_channels(image: Float[np.ndarray, "H W C"], channels: int) -> Float[np.ndarray, "H W channels"]:
    """A grey or coloured picture with 1 or 3 channels."""
    if channels == image.shape[-1]:
        return image
    return np.repeat(image, 3, axis=-1) if channels == 3 else (image @ GREY)[..., None]


def resize(image: Float[np.ndarray, "H W C"], size: int | tuple[int, int]) -> Float[np.ndarray, "h w C"]:
    """Bicubic resize of floats with antialiasing, clipped to the range of the input."""
    return np.clip(resample(image, size), image.min(), image.max())


def resample(image: Float[np.ndarray, "H W C"], size: int | tuple[int, int]) -> Float[np.ndarray, "h w C"]:
    """Pillow's bicubic filter with antialiasing on floats, one channel at a time; edges may overshoot the range."""
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
    return np.stack(channels, axis=-1)


def centre_crop(image: Float[np.ndarray, "H W C"], size: int | tuple[int, int]) -> Float[np.ndarray, "h w C"]:
    """Resized until it just covers a square of `size`, or a height and width; the middle of the longer side is kept."""
    target = (size, size) if isinstance(size, int) else size
    image = resize(image, _scaled_to(image.shape[:2], target, max))
    top, left = (image.shape[0] - target[0]) // 2, (image.shape[1] - target[1]) // 2
    return image[top : top + target[0], left : left + target[1]]


def to_size(
    image: Float[np.ndarray, "H W C"], size: int | tuple[int, int], fit: str = "crop", border: Any = -1.0
) -> Float[np.ndarray, "h w C"]:
    """A picture brought to a square of `size`, or to a height and width.

    fit: "crop" keeps its middle (`centre_crop`); "stretch" changes its shape; "pad" keeps all of it, in the middle of a
        border of the value, or of the values of the channels, `border`.
    """
    if fit not in FITS:
        raise unknown("fit", fit, FITS)
    if fit == "crop":
        return centre_crop(image, size)
    target = (size, size) if isinstance(size, int) else size
    if fit == "stretch":
        return resize(image, target)
    image = resize(image, _scaled_to(image.shape[:2], target, min))
    whole = np.empty((*target, image.shape[-1]), np.float32)
    whole[:] = border
    top, left = (target[0] - image.shape[0]) // 2, (target[1] - image.shape[1]) // 2
    whole[top : top + image.shape[0], left : left + image.shape[1]] = image
    return whole


def _scaled_to(shape, target, choose) -> tuple[int, int]:
    """Height and width in the old aspect that cover the target (choose: max) or lie within it (min)."""
    scale = choose(there / here for here, there in zip(shape, target))
    limit = max if choose is max else min
    height, width = (max(1, limit(there, round(here * scale))) for here, there in zip(shape, target))
    return height, width


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
