"""Data sets whose items are pairs `(x, y)`, as those of torch and torchvision, read as a source."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax import pixels
from diffusion_jax.data.files import as_array, as_condition, as_data, check_image_range
from diffusion_jax.data.sources import Source
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Number

LOOKED_AT = 16
"""Examples whose range is looked at when the source is made."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The items `(x, y)` of a data set as examples; see `from_pairs`."""

    dataset: Any
    condition: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    value_range: tuple[Number, Number] | None
    channels_first: bool

    @property
    def name(self) -> str:
        return type(self.dataset).__name__

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[int(index)]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InvalidInput(f"Item {index} of {self.name} is a {type(item).__name__}, but a pair (x, y) is needed.")
        x, y = item
        where = f"x of item {index} of {self.name}"
        if isinstance(x, Image.Image):
            x0 = pixels.as_image(x, where)
        else:
            values = as_array(x, where)
            if self.channels_first:
                values = np.moveaxis(values, 0, -1) if values.ndim else values
            elif values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
                raise invalid(
                    f"the shape of {where}", values.shape, "channels come last; give channels_first=True for [C, H, W]"
                )
            x0 = as_data(values, where, self.value_range)
        if y is None:
            return {"x0": x0}
        target = as_array(y, f"y of item {index} of {self.name}")
        if self.condition == "label" and target.ndim:
            given = f"{target.dtype}{list(target.shape)}"
            hint = "the number of a class is needed: y.argmax() of one-hot rows, or another name as condition="
            raise invalid(f"y of item {index} of {self.name}", given, hint)
        cond = as_condition(target, self.condition, f"y of item {index} of {self.name}", self.num_classes, axes=0)
        return {"x0": x0, "cond": {self.condition: cond}}


def from_pairs(
    dataset: Any,
    *,
    condition: str = "label",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    value_range: tuple[Number, Number] | None = None,
    channels_first: bool = False,
) -> Source:
    """A source of a data set with `len(dataset)` and `dataset[i] -> (x, y)`, such as a map-style one of torch.

    x: a Pillow image or an array. Unsigned integers are pixels, scaled by the range of their type to [-1, 1]; signed
        integers are tokens; floats are taken as they are.
    y: the condition, a class number unless `condition` says otherwise. Where it is None, there is no condition.
    condition: the key under which the network finds y in `cond`.
    num_classes: checked for every label. class_names: in the order of their numbers; `dataset.classes` when None.
    value_range: which values of x are -1 and 1, as in `arrays`: (0, 1) for what torchvision's ToTensor makes.
    channels_first: whether arrays are `[C, H, W]`.

    The data set must return the same item for the same number: random augmentation belongs into `transforms` of
    `pipeline`, where a resumed run repeats it. Raises InvalidInput for items that are no pairs and images with channels
    first or beyond [-1, 1], when the source is made or when the item is read. Images in [0, 1] are told in a warning.
    """
    names = getattr(dataset, "classes", None) if class_names is None and condition == "label" else class_names
    names = None if names is None else tuple(map(str, names))
    count = len(names) if num_classes is None and names is not None else num_classes
    source = Pairs(dataset, condition, count, names, value_range, channels_first)
    if not len(source):
        raise InvalidInput(f"{source.name} holds no example: at least one is needed.")
    rows = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(np.int64))
    looked_at = [np.asarray(source[int(row)]["x0"]) for row in rows]
    if len({one.shape for one in looked_at}) == 1:
        check_image_range(np.stack(looked_at), source.name, value_range)
    return source
