"""The data of an experiment: what is trained on, what is held out, what is found in them, and a sample's shape."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.errors import invalid
from diffusion_jax.places import MOST_AT_ONCE, part_of


def sampled_shape(config: ConfigDict, source: Any) -> Any:
    """The shape of one sample: that of the data (where those have several sizes, of the largest group of them), in the
    size that `config.sampling.size` says."""
    shape = source.shape if data.rows_of_each_size(source) else jax.tree.map(np.shape, source[0]["x0"])
    size = config.sampling.get("size")
    if size is None:
        return shape
    if not isinstance(shape, tuple) or len(shape) != 3:
        raise invalid("config.sampling.size", size, f"samples are no pictures, but of shape {shape}")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or not all(1 <= side <= MOST_AT_ONCE for side in sides):
        raise invalid("config.sampling.size", size, "a side, or height and width, is needed, such as (48, 64)")
    return (*sides, shape[-1])


FOUND = ("class_names", "size", "channels", "length")
"""Arguments of data that are found in them where they are None, and then stored with a run."""


def with_data(config: ConfigDict, source: Any = None, held_out: Any = None) -> tuple[ConfigDict, Any, Any]:
    """The data to train on, the held-out data, and the config with what was found in them (`FOUND`).

    So a run stores which number is which class, and held-out data are numbered as the data to train on, which they may
    also be a part of (`data.held_out`). source, held_out: stand in place of what the config describes.
    """
    config = config.copy_and_resolve_references()
    names = getattr(source, "class_names", None)
    made = {"data": source, "held_out": held_out}
    for name, given in made.items():
        if given is not None:
            continue
        entry = config[name]
        if isinstance(entry, ConfigDict) and "class_names" in entry and entry.class_names is None:
            entry.class_names = names
        made[name] = part_of(name, config, source=made["data"])
        names = names or getattr(made[name], "class_names", None)
        if name == "data" and isinstance(entry, ConfigDict):
            for field in FOUND:
                if field in entry and entry[field] is None:
                    entry[field] = getattr(made[name], field, None)
    return config, made["data"], made["held_out"]
