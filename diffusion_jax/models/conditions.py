"""Conditions as plain dicts: which keys there are, and the empty condition.

    label         int [B], in 0 .. num_classes; num_classes itself is the null class
    pooled        float [B, P], one vector per sample
    context       float [B, M, C], a sequence to attend to, with context_mask bool [B, M] (True where it counts)
    size          float [B, 2], height and width in pixels of the picture that a sample was made from or is to have
    aspect        float [B], its height over its width
    tokens        int [B, M], text for the model's own encoder, with tokens_mask bool [B, M]
    time_ids      float [B, n], numbers that are embedded as times are: sizes and crops of the image (SDXL)
    concat        float [B, H, W, C'], channels that join those of x: a mask and the image behind it (inpainting)
    control       float [B, f H, f W, C], in [0, 1]: the picture that a ControlNet follows; a tuple for several
    residuals     a tuple of float [B, h, w, C], added to the skip connections and, the last, to the middle of a U-Net
    audio         float [B, F, M, C], the M audio features that belong to each frame of a clip; [B, F, C] where M is 1
    reference     float [B, H, W, C] or [B, R, H, W, C], clean frames that every frame of a clip may look at

How a network digests them is in `layers.conditioning`. Nothing here knows flax.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, nearest, unknown

KEYS = (
    "label",
    "pooled",
    "context",
    "context_mask",
    "tokens",
    "tokens_mask",
    "size",
    "aspect",
    "time_ids",
    "concat",
    "control",
    "residuals",
    "audio",
    "reference",
)
"""Every condition a network of this library takes by itself."""

OPTIONAL = ("context_mask", "tokens_mask", "residuals", "reference")
"""Those that may be left out where a network takes them."""


def empty_condition(cond: Mapping[str, Any] | None, num_classes: int = 0) -> dict[str, Any] | None:
    """The condition that says nothing, with the structure and shapes of `cond`.

    Labels become the null class `num_classes`, vectors, sequences and tokens become zeros, and masks hide everything.
    Size and aspect stay: they tell the shape of the picture, not what is in it.
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
        elif name in ("size", "aspect"):
            null[name] = jnp.asarray(value)
        else:
            null[name] = jax.tree.map(jnp.zeros_like, value)
    return null


def check_condition(cond: Mapping[str, Any] | None, taken: tuple[str, ...]) -> dict[str, Any]:
    """The condition as a dict, once every key in `taken` is there and no other (`OPTIONAL` may be left out)."""
    cond = {} if cond is None else dict(cond)
    for name in cond:
        if name not in taken:
            what = f"it takes {', '.join(taken)}" if taken else "it takes no condition"
            match = nearest(name, taken)
            hint = f"; did you mean {match!r}?" if match else "."
            raise InvalidInput(f"The network was given the condition {name!r}, but {what}{hint}")
    for name in taken:
        if name not in cond and name not in OPTIONAL:
            raise InvalidInput(f"The network needs the condition {name!r}, but was given {sorted(cond) or 'none'}.")
    return cond
