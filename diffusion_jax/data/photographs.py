"""Photographs and textures that ship inside scikit-image and scikit-learn, cut into patches; nothing is downloaded.

The right quarter of every photograph is held out, so that train and test patches share no pixel. Faces have a module
of their own.
"""

import functools
from pathlib import Path

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.errors import InvalidInput, invalid, unknown

_BUNDLED = {
    "astronaut": "astronaut.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "hubble": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
    "histology": "ihc.png",
    "motorcycle": "motorcycle_left.png",
    "coins": "coins.png",
    "moon": "moon.png",
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
}
PHOTOGRAPHS = (*_BUNDLED, "china", "flower")
"""Names of the photographs; china and flower are scikit-learn's."""


@functools.lru_cache(maxsize=32)
def photograph(name: str) -> np.ndarray:
    """One whole photograph as float32 `[H, W, C]` in [-1, 1]; C is 1 for grey ones. Do not write to it."""
    if name not in PHOTOGRAPHS:
        raise unknown("photograph", name, PHOTOGRAPHS)
    if name in _BUNDLED:
        import skimage.data
        import skimage.io

        path = Path(skimage.data.__file__).parent / _BUNDLED[name]
        if not path.is_file():
            raise InvalidInput(
                f"The photograph {name!r} is not inside this version of scikit-image ({path} is missing)."
            )
        image = skimage.io.imread(path)
    else:
        from sklearn.datasets import load_sample_image

        image = load_sample_image(f"{name}.jpg")
    image = pixels.scaled(image[..., :3] if image.ndim == 3 else image[..., None], name)
    image.setflags(write=False)
    return image


def patches(
    split: str = "train",
    size: int = 32,
    names: tuple[str, ...] = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower"),
    stride: int | None = None,
    downscale: int = 2,
    channels: int = 3,
) -> ArraySource:
    """Patches `[N, size, size, channels]` of photographs, in [-1, 1]; `label` is the photograph's place in `names`.

    stride: pixels between patches; half the size when None.
    downscale: photographs are shrunk by this factor first, so that a patch shows more than a smooth surface.
    channels: 3, or 1 for grey (the mean of the three).
    """
    check_split(split)
    if channels not in (1, 3):
        raise invalid("channels", channels, "photographs have 1 (grey) or 3 (colour)")
    return _patches("patches", split, size, tuple(names), stride, downscale, channels)


def textures(split: str = "train", size: int = 32, stride: int | None = None, downscale: int = 2) -> ArraySource:
    """Grey patches `[N, size, size, 1]` of brick, grass and gravel, in [-1, 1]; `label` 0 .. 2 in this order."""
    check_split(split)
    return _patches("textures", split, size, ("brick", "grass", "gravel"), stride, downscale, 1)


def _patches(kind, split, size, names, stride, downscale, channels):
    if size < 1 or downscale < 1 or (stride is not None and stride < 1):
        raise invalid("size, stride, downscale", (size, stride, downscale), "each must be at least 1")
    if not names:
        raise InvalidInput("names is empty: at least one photograph is needed.")
    stride = max(1, size // 2) if stride is None else stride
    cuts = []
    for name in names:
        image = photograph(name)
        image = pixels.resize(image, (image.shape[0] // downscale, image.shape[1] // downscale))
        if channels == 1:
            image = image.mean(axis=-1, keepdims=True)
        elif image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        cuts.append(pixels.cut(image, size, stride, split))
    labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(cut) for cut in cuts])
    return ArraySource(
        np.concatenate(cuts), {"label": labels}, f"{kind}/{split}", num_classes=len(names), class_names=names
    )
