"""What metrics are given: numbers, sets of features and images, checked and made the same before anything is computed.

Integers are converted before any arithmetic, since theirs wraps, and half precision is computed in float32 or more.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.pixels import check_signed, scaled
from diffusion_jax.typing import Numbers


def real_numbers(field: str, values: Any) -> np.ndarray:
    """`values` as float64 on the host. Raises InvalidInput for what is no array of real numbers."""
    try:
        found = np.asarray(values)
        if np.issubdtype(found.dtype, np.complexfloating) or found.dtype.kind in "mMSU":
            raise TypeError
        return found.astype(np.float64)
    except (TypeError, ValueError):
        told = getattr(values, "dtype", type(values).__name__)
        raise invalid(f"the type of {field}", str(told), "an array of real numbers was expected") from None


def feature_set(field: str, values: Any, least: int = 1) -> np.ndarray:
    """`[N, D]` in float64. Raises InvalidInput for another shape, fewer than `least` rows, a NaN or an infinity."""
    found = real_numbers(field, values)
    if found.ndim != 2 or len(found) < least or not found.shape[1]:
        raise invalid(f"{field}.shape", found.shape, f"expected [N, D] with N at least {least}")
    if not np.isfinite(found).all():
        raise InvalidInput(f"{field} holds a NaN or an infinity: a distance to it means nothing.")
    return found


def two_sets(x: Numbers, y: Numbers, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`feature_set` of both, which must have as many columns."""
    first, second = feature_set("the first set", x, least), feature_set("the second set", y, least)
    if first.shape[1] != second.shape[1]:
        raise invalid("shapes of the two sets", (first.shape, second.shape), "expected [N, D] and [M, D]")
    return first, second


def labels_within(labels: Any, count: int, classes: int) -> np.ndarray:
    """`[count]` whole numbers from 0 to `classes` - 1. Raises InvalidInput for anything else."""
    found = np.asarray(labels)
    if found.shape != (count,):
        raise invalid("labels.shape", found.shape, f"one label for each of {count} examples was expected")
    if not np.issubdtype(found.dtype, np.integer):
        raise invalid("the type of labels", str(found.dtype), "a class is a whole number")
    wrong = found[(found < 0) | (found >= classes)]
    if wrong.size:
        raise invalid("a label", int(wrong[0]), f"the classifier knows the classes 0 .. {classes - 1}")
    return found.astype(np.int64)


def signed_images(field: str, images: Any) -> np.ndarray:
    """`pixels.scaled` images, of which floats may leave [-1, 1], as what a bad model draws does.

    Raises InvalidInput for floats without a negative value (`pixels.check_signed`).
    """
    found = scaled(images, field)
    check_signed(found, field)
    return found


def image_pair(a: Any, b: Any, data_range: Any) -> tuple[Any, Any, Any]:
    """Two batches of images `[B, H, W, C]` in float32, and the range of their values: see `psnr`.

    Known values are looked at, those of a traced array are not. Raises InvalidInput as `psnr` says.
    """
    kinds = [_kind(name, one) for name, one in (("a", a), ("b", b))]
    shapes = [np.shape(one) for one in (a, b)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or 0 in shapes[0]:
        raise invalid("shapes of a and b", tuple(shapes), "two batches of one shape [B, H, W, C] were expected")
    told = data_range is not None
    data_range = data_range if told else _range_of(kinds)
    if isinstance(data_range, int | float) and not (math.isfinite(data_range) and data_range > 0):
        raise invalid("data_range", data_range, "a positive number was expected")
    known = [np.asarray(one, np.float32) for one in (a, b) if not isinstance(one, Tracer)]
    if known and isinstance(data_range, int | float):
        _check_span(min(one.min() for one in known), max(one.max() for one in known), data_range, kinds, told)
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), data_range


def _kind(name, images):
    """The type of the images where it is an integer's, else "float"."""
    dtype = jnp.result_type(images) if isinstance(images, Tracer) else np.asarray(images).dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return "float"
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return np.dtype(dtype).name
    raise invalid(f"the type of {name}", str(dtype), "images of real numbers were expected")


def type_range(dtype: Any) -> float:
    """The largest value of bool or of an unsigned integer type."""
    return 1.0 if dtype == np.bool_ else float(np.iinfo(dtype).max)


def _range_of(kinds):
    if kinds[0] != kinds[1] or kinds[0].startswith("int"):
        raise InvalidInput(
            f"a is {kinds[0]} and b is {kinds[1]}: give data_range, the largest minus the smallest possible value."
        )
    return 2.0 if kinds[0] == "float" else type_range(np.dtype(kinds[0]))


def _check_span(low, high, data_range, kinds, told):
    if high - low > 2 * data_range:
        raise invalid("data_range", data_range, f"the images span {low:g} .. {high:g}")
    if not told and kinds[0] == "float" and low >= 0 and high > 0:
        raise InvalidInput(
            f"The images span {low:g} .. {high:g}, nothing negative, but [-1, 1] was expected: give data_range "
            "(1 for [0, 1], 255 for 0 .. 255, 2 for bright images in [-1, 1])."
        )
