"""Conditions as plain dicts: which keys there are, and the empty condition.

    label         int [B], in 0 .. num_classes; num_classes itself is the null class
    pooled        float [B, P], one vector per sample
    context       float [B, M, C], a sequence to attend to, with context_mask bool [B, M] (True where it counts)
    tokens        int [B, M], text for the model's own encoder, with tokens_mask bool [B, M]

How a network digests them is in `layers.conditioning`. Nothing here knows flax.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, nearest, unknown

KEYS = ("label", "pooled", "context", "context_mask", "tokens", "tokens_mask")
"""Every condition a network of this library takes by itself."""


def empty_condition(cond: Mapping[str, Any] | None, num_classes: int = 0) -> dict[str, Any] | None:
    """The condition that says nothing, with the structure and shapes of `cond`.

    Labels become the null class `num_classes`, vectors, sequences and tokens become zeros, and masks hide everything.
    """
    if cond is None:
        return None
    null = {}
    for name, value in cond.items():
        if name not in KEYS:
            raise unknown("condition", name, KEYS)
        if name == "label":
            if num_classes < 1:
                raise InvalidInput(
                    "empty_condition needs num_classes= to know the null class of a condition with labels."
                )
            null[name] = jnp.full_like(value, num_classes)
        else:
            null[name] = jnp.zeros_like(value)
    return null


def check_condition(cond: Mapping[str, Any] | None, taken: tuple[str, ...]) -> dict[str, Any]:
    """The condition as a dict, once every key in `taken` is there and no other (masks are optional)."""
    cond = {} if cond is None else dict(cond)
    optional = [name for name in taken if name.endswith("_mask")]
    for name in cond:
        if name not in taken:
            what = f"it takes {', '.join(taken)}" if taken else "it takes no condition"
            match = nearest(name, taken)
            hint = f"; did you mean {match!r}?" if match else "."
            raise InvalidInput(f"The network was given the condition {name!r}, but {what}{hint}")
    for name in taken:
        if name not in cond and name not in optional:
            raise InvalidInput(f"The network needs the condition {name!r}, but was given {sorted(cond) or 'none'}.")
    return cond
