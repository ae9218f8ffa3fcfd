"""Data sets of tensorflow-datasets by random access (`tfds.data_source`), without TensorFlow in the input path."""

import dataclasses
from typing import Any

import numpy as np

from diffusion_jax.data import pixels
from diffusion_jax.errors import InvalidInput


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """Images of a tensorflow-datasets data set; see `tfds`."""

    records: Any
    image_key: str
    label_key: str | None
    size: int | None
    num_classes: int | None
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        image = pixels.from_uint8(record[self.image_key])
        if self.size is not None:
            image = pixels.centre_crop(image, self.size)
        if self.label_key is None:
            return {"x0": image}
        return {"x0": image, "cond": {"label": np.int32(record[self.label_key])}}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self[0]["x0"].shape)


def tfds(
    name: str = "cifar10",
    split: str = "train",
    data_dir: str | None = None,
    *,
    image_key: str = "image",
    label_key: str | None = "label",
    size: int | None = None,
) -> TfdsSource:
    """Images in [-1, 1] and labels of `tfds.data_source(name, split)`, prepared beforehand in ArrayRecord format.

    size: resizes the shorter side and keeps the middle square; needed when the images differ in size.

    Raises InvalidInput when tensorflow-datasets is not installed or lacks a feature that is asked for.
    """
    try:
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]: an extra
    except ImportError:
        raise InvalidInput(
            "data.tfds needs tensorflow-datasets, which is not installed: pip install 'diffusion_jax[tfds]'."
        ) from None
    records = tensorflow_datasets.data_source(name, split=split, data_dir=data_dir)
    for key in (image_key, label_key):
        if key is not None and len(records) and key not in records[0]:
            raise InvalidInput(f"{name!r} has the features {sorted(records[0])}, but {key!r} was asked for.")
    features = getattr(getattr(records, "dataset_info", None), "features", {})
    classes = getattr(features.get(label_key), "num_classes", None) if label_key else None
    return TfdsSource(records, image_key, label_key, size, classes, f"{name}/{split}")
