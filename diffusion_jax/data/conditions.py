"""Which conditions samples are generated under: functions from a sample's global index to its condition.

Sources know the conditions of data that exist; these speak of data still to be made.
"""

from collections.abc import Callable

import numpy as np

from diffusion_jax.data.sources import Source
from diffusion_jax.errors import invalid

Conditions = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Global sample indices `[B]` to a batch of conditions."""


def cycled_labels(num_classes: int | None = None) -> Conditions:
    """`label = index mod num_classes`: every class equally often, one after the other.

    num_classes: those of the data when left out of a config; needed elsewhere.
    """
    if num_classes is None or num_classes < 1:
        raise invalid("num_classes", num_classes, "at least one class is needed")
    return lambda index: {"label": (np.asarray(index) % num_classes).astype(np.int32)}


def conditions_of(source: Source) -> Conditions:
    """The conditions of the examples of a source, in its order and again from the start when it ends.

    In a config that gives no source it is that of the held-out data.
    """
    rows = getattr(source, "cond", None)

    def conditions(index):
        if rows:
            return {name: np.asarray(values[np.asarray(index) % len(source)]) for name, values in rows.items()}
        picked = [source[int(i) % len(source)]["cond"] for i in np.asarray(index)]
        return {name: np.stack([cond[name] for cond in picked]) for name in picked[0]}

    return conditions
