"""What is done to images before a vision encoder sees them, as its checkpoint's preprocessor_config.json says.

A pure function of arrays, so that gradients pass: no image library, no rounding to 8 bits on the way.
"""

import os
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax import pixels
from diffusion_jax.errors import invalid
from diffusion_jax.interop.fields import MOST_SIDE, SMALLEST, Fields
from diffusion_jax.interop.files import local_folder, read_json
from diffusion_jax.models.layers.embeddings import bicubic_matrix

BICUBIC = 3
"""How their configs number the filters of Pillow."""


@dataclass(frozen=True)
class Preprocessor:
    """`preprocess(images)`: images `[B, H, W, 3]` in [-1, 1], or uint8, to the `(resized - mean) / std` of the encoder.

    shortest: what the shorter side becomes, the other in proportion, in pixels; 0 leaves the size. size: height and
    width instead. Resampling is bicubic and filtered. crop: height and width of the middle that is kept, or None.
    mean, std: of each colour on the scale from 0 to 1.
    """

    shortest: int = 0
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image of that size before it is cropped."""
        if self.size is not None:
            return self.size
        if not self.shortest:
            return height, width
        short, long = sorted((height, width))
        other = int(self.shortest * long / short)
        return (self.shortest, other) if height <= width else (other, self.shortest)

    def __call__(self, images: Any) -> Any:
        """Raises InvalidInput for images of another shape, some that are smaller than the crop, and known ones that
        have another range: floats without a negative value."""
        if not isinstance(images, Tracer):
            given = np.asarray(images)
            images = pixels.scaled(given, "images")
            if given.dtype.kind not in "bu":
                pixels.check_signed(images, "images")
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[3] != len(self.mean) or not jnp.issubdtype(images.dtype, jnp.floating):
            given = f"{images.dtype}{list(images.shape)}"
            raise invalid("images", given, f"floating-point [B, H, W, {len(self.mean)}] in [-1, 1] are needed")
        x = images.astype(jnp.float32) / 2 + 0.5
        height, width = x.shape[1:3]
        size = self.resized(height, width)
        if size != (height, width):
            down, across = bicubic_matrix(height, size[0], True), bicubic_matrix(width, size[1], True)
            # What overshoots at edges is cut off, rows first, as it is in images of 8 bits.
            x = jnp.clip(jnp.einsum("cj,bijd->bicd", across, x, precision="highest"), 0.0, 1.0)
            x = jnp.clip(jnp.einsum("ri,bicd->brcd", down, x, precision="highest"), 0.0, 1.0)
        if self.crop is not None:
            top, left = (whole - kept for whole, kept in zip(size, self.crop))
            if top < 0 or left < 0:
                raise invalid("images.shape", images.shape, f"at {size} they are smaller than the crop, {self.crop}")
            x = x[:, top // 2 : top // 2 + self.crop[0], left // 2 : left // 2 + self.crop[1]]
        return (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def load_preprocessor(folder: str | os.PathLike) -> Preprocessor:
    """The preprocessing that a folder's preprocessor_config.json describes.

    Raises InvalidInput where the file is missing, or says something that is not known here.
    """
    path = local_folder(folder)
    file = path / "preprocessor_config.json" if path.is_dir() else path
    config = Fields(read_json(file), str(file))
    mean, std = ((0.0,) * 3, (1.0,) * 3)
    if config.flag("do_normalize", True):
        mean, std = (config.numbers(name, (0.5,) * 3, 3) for name in ("image_mean", "image_std"))
        if min(std) < SMALLEST:
            raise config.wrong("image_std", "numbers above 0 are needed")
    config.choice("do_rescale", (True,))
    config.choice("rescale_factor", (1 / 255,))
    crop = _pair(config, "crop_size") if config.flag("do_center_crop", None) else None
    if not config.flag("do_resize", True):
        return Preprocessor(0, None, crop, mean, std)
    config.choice("resample", (BICUBIC,))
    size = config.raw("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        return Preprocessor(config.section("size").whole("shortest_edge", 224, most=MOST_SIDE), None, crop, mean, std)
    if not isinstance(size, dict):
        return Preprocessor(config.whole("size", None, most=MOST_SIDE) or 224, None, crop, mean, std)
    return Preprocessor(0, _pair(config, "size"), crop, mean, std)


def _pair(config: Fields, name: str) -> tuple[int, int]:
    value = config.raw(name)
    if isinstance(value, dict):
        if not {"height", "width"} <= value.keys():
            raise config.wrong(name, "a height and a width are needed")
        sides = config.section(name)
        return sides.whole("height", 224, most=MOST_SIDE), sides.whole("width", 224, most=MOST_SIDE)
    side = config.whole(name, None, most=MOST_SIDE) or 224
    return side, side
