"""Data sets of tensorflow-datasets by random access (`tfds.data_source`), without TensorFlow in the input path."""

import dataclasses
import re
from typing import Any

from diffusion_jax import pixels
from diffusion_jax.data.sources import as_labels
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.reading import first_line


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """Images of a tensorflow-datasets data set; see `tfds`."""

    records: Any
    image_key: str
    label_key: str | None
    size: int | None
    num_classes: int | None
    name: str
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        where = f"record {index} of {self.name}"
        try:
            record = self.records[index]
        except Exception as error:  # the reader is C++ and raises whatever it likes
            raise InvalidInput(f"{where} cannot be read ({first_line(error)}).") from None
        image = pixels.scaled(record[self.image_key], f"{self.image_key} of {where}")
        image = image[..., None] if image.ndim == 2 else image
        if self.size is not None:
            image = pixels.centre_crop(image, self.size)
        if self.label_key is None:
            return {"x0": image}
        label = as_labels(record[self.label_key], f"{self.label_key} of {where}", self.num_classes)
        return {"x0": image, "cond": {"label": label}}

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

    Raises InvalidInput when tensorflow-datasets is not installed or lacks a feature that is asked for, and for a name
    with a namespace ("huggingface:..."), for those run code.
    """
    if re.match(r"[^/]*:\D", name):
        raise invalid("name", name, "datasets of other namespaces run code of theirs when they are read")
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
    feature = features.get(label_key) if label_key else None
    classes, names = getattr(feature, "num_classes", None), getattr(feature, "names", None)
    names = tuple(names) if names else None
    return TfdsSource(records, image_key, label_key, size, classes, f"{name}/{split}", names)
