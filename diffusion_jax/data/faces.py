"""Faces: the subset of Labeled Faces in the Wild that ships inside scikit-image (100 faces and 100 other crops)."""

from pathlib import Path

import numpy as np

from diffusion_jax import pixels
from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.errors import InvalidInput, invalid


def faces(split: str = "train", size: int = 24, others: bool = False) -> ArraySource:
    """Grey faces `[N, size, size, 1]` in [-1, 1] (25 x 25 pixels originally); `label` is 1 for a face.

    Every fifth image is held out ("test"). others: adds as many crops without a face, with `label` 0.
    """
    check_split(split)
    if not 4 <= size <= 256:
        raise invalid("size", size, "it must lie in 4 .. 256")
    import skimage.data

    path = Path(skimage.data.__file__).parent / "lfw_subset.npy"
    if not path.is_file():
        raise InvalidInput(f"The faces are not inside this version of scikit-image ({path} is missing).")
    images = np.load(path, allow_pickle=False).astype(np.float32)[..., None] * 2.0 - 1.0
    labels = (np.arange(len(images)) < 100).astype(np.int32)
    keep = (np.arange(len(images)) % 5 == 4) == (split == "test")
    if not others:
        keep &= labels == 1
    images = np.stack([pixels.resize(image, size) for image in images[keep]])
    return ArraySource(images, {"label": labels[keep]}, f"faces/{split}", num_classes=2, class_names=("other", "face"))
