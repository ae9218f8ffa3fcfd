"""Bounds on the predicted clean data: clipping, and dynamic thresholding.

The noise half follows from x_t, so that the pair stays one of x_t; or it is kept, as diffusers' DDIM and TCD do.

Only Gaussian modalities are bounded; log-probabilities of discrete ones are left alone. Where nothing exceeds the
bounds the prediction is returned bit for bit.
"""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.denoisers.base import map_prediction, replace_x0
from diffusion_jax.denoisers.scales import is_static
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes import by_modality, is_gaussian, members
from diffusion_jax.time_axes import each
from diffusion_jax.typing import Denoiser, Number


def clipped(denoiser: Denoiser, low: Any = -1.0, high: Any = 1.0, keep_noise: bool = False) -> Denoiser:
    """x0 within [low, high], elementwise (Ho et al. 2020). keep_noise: leaves the noise half as it is."""
    if is_static(low) and is_static(high) and not low < high:
        raise invalid("low, high", (low, high), "low must be below high")
    return _bounded("clipped", denoiser, lambda x0: jnp.clip(x0, low, high), keep_noise)


def thresholded(
    denoiser: Denoiser,
    percentile: Number = 0.995,
    floor: Number = 1.0,
    ceiling: Number | None = None,
    keep_noise: bool = False,
) -> Denoiser:
    """Dynamic thresholding: `clip(x0, -s, s) / s * floor` with s a percentile of |x0| per sample (Saharia et al. 2022).

    percentile: from 0 to 1.
    floor: the bound of the data; s is never below it, so that an x0 within the bounds is left alone.
    ceiling: s is never above it; None for no limit. The result is within [-floor, floor] in any case.
    keep_noise: leaves the noise half as it is.
    """
    if not is_static(percentile) or not 0 < percentile <= 1:
        raise invalid("percentile", percentile, "a number above 0 and at most 1 was expected")
    if not is_static(floor) or not floor > 0:
        raise invalid("floor", floor, "a positive bound was expected")
    if ceiling is not None and (not is_static(ceiling) or not ceiling >= floor):
        raise invalid("ceiling", ceiling, f"None or a number of at least floor = {floor} was expected")

    def bound(x0):
        size = jnp.quantile(jnp.abs(x0.reshape(x0.shape[0], -1)), percentile, axis=1)
        size = jnp.clip(size, floor, ceiling).reshape(-1, *(1,) * (x0.ndim - 1))
        return jnp.where(size == floor, jnp.clip(x0, -floor, floor), jnp.clip(x0, -size, size) * (floor / size))

    return _bounded("thresholded", denoiser, bound, keep_noise)


def _bounded(name: str, denoiser: Denoiser, bound: Any, keep_noise: bool) -> Denoiser:
    process = denoiser.process
    if not any(is_gaussian(member) for member in members(process).values()):
        raise InvalidInput(f"{name} bounds continuous data; {type(process).__name__} predicts log-probabilities.")

    def function(prediction, x, step):
        x0 = each(lambda x0, process: bound(x0) if is_gaussian(process) else x0, prediction.x0, by_modality(process))
        if keep_noise:
            return prediction._replace(x0=x0)
        return replace_x0(process, prediction, x0, x, step.t)

    return map_prediction(denoiser, function)
