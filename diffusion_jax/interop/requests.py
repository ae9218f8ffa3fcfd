"""What may be asked of a pipeline: each argument of `generate` as it is used, or one sentence, before anything runs."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.interop.image_inputs import array_of
from diffusion_jax.interop.pipelines import Pipeline
from diffusion_jax.interop.prompt_weights import WEIGHTINGS
from diffusion_jax.interop.prompts import MOST_CHUNKS, PromptReading

MOST_STEPS = 100_000
MOST_PIXELS = 16_384
"""Of a side."""


def number(
    field: str, value: Any, expected: str, least: int | float = -math.inf, most: int | float = math.inf
) -> float:
    """A finite real number within bounds, of Python, NumPy or JAX."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and np.shape(value) == ():
        real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
    try:
        found = float(value) if real else math.nan
    except OverflowError:
        found = math.nan
    if not (math.isfinite(found) and least <= found <= most):
        raise invalid(field, value, expected)
    return found


def whole(field: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds; 3.0 is none."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        raise invalid(field, value, f"a whole number, {least} to {most}, is needed")
    return int(value)


def asked_for(prompts: Any, negative: Any, repeats: Any) -> tuple[list, list]:
    """A prompt and a negative one (or None) for each image."""
    prompts = _listed("prompts", prompts, str | int | np.integer, "a text, or the number or name of a class, is needed")
    if not prompts:
        raise invalid("prompts", prompts, "at least one is needed")
    if negative is None or isinstance(negative, str):
        negatives = [negative] * len(prompts)
    else:
        negatives = _listed("negative", negative, str | None, "a text or None is needed")
    if len(negatives) != len(prompts):
        told = f"one for all or one for each of the {len(prompts)} prompts is needed"
        raise invalid("the number of negative prompts", len(negatives), told)
    repeats = whole("images_per_prompt", repeats, 1, 100_000)
    return [p for p in prompts for _ in range(repeats)], [n for n in negatives for _ in range(repeats)]


def _listed(field, value, kinds, expected):
    """One alone is a list of one."""
    if hasattr(value, "dtype"):
        value = np.asarray(value).tolist()
    if isinstance(value, kinds) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray | Mapping | Set):
        raise invalid(field, value, f"{expected}, or a list of them")
    value = list(value)
    for number, one in enumerate(value):
        if not isinstance(one, kinds) or isinstance(one, bool):
            raise invalid(f"{field}[{number}]", one, expected)
    return value


def check_key(key: Any) -> None:
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        told = f"an array {list(key.shape)} of {key.dtype}" if hasattr(key, "dtype") else key
        raise invalid("key", told, "one typed key is needed, such as jax.random.key(0)")


def strength_of(strength: Any, image: Any, mask: Any) -> float:
    """How much of the steps is made: all without an image or with a mask, unless `strength` says."""
    if strength is not None:
        strength = number("strength", strength, "it must be in (0, 1]", 0, 1)
        if not strength:
            raise invalid("strength", strength, "it must be in (0, 1]")
    if mask is not None and image is None:
        raise InvalidInput("mask= says what of an image is painted anew, but image= was not given.")
    if image is None and strength is not None:
        raise InvalidInput("strength= is for a run that starts from an image, but image= was not given.")
    if strength is None:
        return 0.8 if image is not None and mask is None else 1.0
    return strength


def check_painting(pipelines: Sequence[Pipeline], image: Any, mask: Any) -> None:
    """Raises InvalidInput where a network that was trained to inpaint lacks an image or a mask."""
    if not any(pipeline.inpaints for pipeline in pipelines):
        return
    if len(pipelines) > 1:
        raise InvalidInput("A network that was trained to inpaint takes no refiner and is none.")
    if image is None or mask is None:
        missing = "image= and mask=" if image is None else "mask= with image="
        raise InvalidInput(f"This network was trained to inpaint: give {missing}.")


def checked_pair(pipeline: Pipeline, refiner: Any, handover: Any) -> tuple[Pipeline, Pipeline]:
    """Raises InvalidInput unless the second can go on with latents of the first."""
    number("handover", handover, "a time from 0 (clean) to 1 (noise) is needed", 0, 1)
    if not isinstance(refiner, Pipeline):
        raise invalid("refiner", type(refiner).__name__, "a pipeline of load_pipeline is needed")
    for field, mine, other in (
        ("channels of the latents", pipeline.channels, refiner.channels),
        (
            "factor of the autoencoder",
            pipeline.autoencoder.network.module.factor,
            refiner.autoencoder.network.module.factor,
        ),
        ("mesh", pipeline.mesh, refiner.mesh),
    ):
        if mine != other:
            raise invalid(f"the refiner's {field}", other, f"{mine!r} is needed, that of the pipeline before it")
    return pipeline, refiner


def height_and_width(field: str, size: Any) -> tuple[int, int]:
    """Height and width; one number is a square."""
    if isinstance(size, int | np.integer):
        size = (size, size)
    size = size.tolist() if isinstance(size, np.ndarray) else size
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise invalid(field, size, "height and width are needed")
    return whole(f"{field}[0]", size[0], 1, MOST_PIXELS), whole(f"{field}[1]", size[1], 1, MOST_PIXELS)


def checked_size(size: Any, step: int) -> tuple[int, int]:
    """Height and width, both multiples of `step`."""
    if size is None:
        raise InvalidInput("size is None, but this checkpoint names no size: give size=(height, width).")
    size = height_and_width("size", size)
    if any(side % step for side in size):
        near = " x ".join(str(max(step, round(side / step) * step)) for side in size)
        raise invalid("size", size, f"height and width must be multiples of {step}, such as {near}")
    return size


def next_smaller(size: tuple[int, int], step: int) -> tuple[int, int]:
    """The largest size of multiples of `step` within `size`."""
    height, width = (max(step, side - side % step) for side in size)
    return height, width


def one_a_sample(name: str, values: np.ndarray, count: int, repeats: int) -> np.ndarray:
    """`[B, ...]` from one for all, one a prompt, or one a sample."""
    if len(values) == count:
        return values
    if len(values) == 1:
        return np.broadcast_to(values, (count, *values.shape[1:]))
    if len(values) * repeats != count:
        told = f"one for all or one for each of {count // repeats} prompts is needed"
        raise invalid(f"the number of {name}s", len(values), told)
    return np.repeat(values, repeats, axis=0)


def indices(index: Any, count: int) -> Any:
    """The global index of each sample, 0 .. B - 1 unless given."""
    if index is None:
        return jnp.arange(count)
    found = array_of("index", index)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise invalid("index", f"an array {list(found.shape)} of {found.dtype}", f"{count} whole numbers are needed")
    if found.min() < 0 or found.max() >= 2**31:
        raise invalid("index", [int(found.min()), int(found.max())], "indices lie in 0 .. 2^31 - 1")
    return jnp.asarray(found, jnp.int32)


def noise_of(noise: Any, shape: tuple[int, ...]) -> Any:
    """Noise that was given, as float32."""
    found = noise if isinstance(noise, jax.Array) else array_of("noise", noise)
    if tuple(found.shape) != shape:
        raise invalid("noise.shape", tuple(found.shape), f"{shape} is needed")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise invalid("noise.dtype", str(found.dtype), "floating-point numbers are needed")
    found = jnp.asarray(found, jnp.float32)
    if not bool(jnp.isfinite(found).all()):
        raise InvalidInput("noise is not finite (NaN or infinity).")
    return found


def count_chunks(chunks: Any, pipelines: Sequence[Pipeline], texts: Sequence[Any], reading: PromptReading) -> int:
    """How many chunks of their encoders prompts fill: as many as are asked for, or as the longest needs."""
    if reading.weighting is not None and not (isinstance(reading.weighting, str) and reading.weighting in WEIGHTINGS):
        raise unknown("weighting", reading.weighting, WEIGHTINGS)
    if not (isinstance(chunks, str) and chunks == "auto"):
        if isinstance(chunks, str):
            raise invalid("chunks", chunks, f"'auto' or a whole number, 1 to {MOST_CHUNKS}, is needed")
        return whole("chunks", chunks, 1, MOST_CHUNKS)
    needed = max(pipeline.prompter.chunks(texts, reading) for pipeline in pipelines)
    if needed > MOST_CHUNKS:
        raise invalid("chunks", chunks, f"a prompt fills {needed} chunks, and {MOST_CHUNKS} are the most: shorten it")
    return needed


def condition(field: str, cond: Any) -> dict[str, Any]:
    """Entries of a condition; none where it is None."""
    if cond is None:
        return {}
    if not isinstance(cond, Mapping) or not all(isinstance(name, str) for name in cond):
        raise invalid(field, cond, "a dict of names and arrays is needed")
    return dict(cond)
