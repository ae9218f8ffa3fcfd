"""Image against image: PSNR and SSIM, per image of a batch, in JAX."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import invalid
from diffusion_jax.metrics.arrays import image_pair
from diffusion_jax.typing import Number, Numbers


def psnr(
    a: Numbers,
    b: Numbers,
    *,
    data_range: Number | None = None,
    mask: Numbers | None = None,
) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio in dB, `10 log10(range^2 / mean (a - b)^2)`; infinite for equal images.

    a, b: images `[B, H, W, C]`.
    data_range: largest minus smallest possible value. When None that of the type: 255 for bytes, 65535 for uint16, 1
        for bool, and 2 for floats, which lie in [-1, 1].
    mask: weights of pixels in the mean, `[B or 1, H, W, 1]`; all the same when None.

    Whatever the type, it is computed in float32. NaN for an image that holds one, or of which the mask shows nothing.
    Raises InvalidInput for shapes that differ, for types that differ or have no range of their own (int32) unless
    data_range is given, and, looking at values that are not traced, for images that span more than twice data_range
    and, unless it is given, for floats without a negative value, which are not in [-1, 1].
    """
    x, y, span = image_pair(a, b, data_range)
    weight = jnp.ones((1, *x.shape[1:3], 1)) if mask is None else jnp.asarray(mask, jnp.float32)
    if weight.shape not in [(size, *x.shape[1:3], 1) for size in (1, len(x))]:
        raise invalid(
            "mask.shape", weight.shape, f"a weight for each pixel, {(len(x), *x.shape[1:3], 1)}, was expected"
        )
    error = ((x - y) ** 2 * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * x.shape[-1])
    return 10.0 * jnp.log10(span**2 / error)


def psnr_by_region(x: Numbers, truth: Numbers, masks: Mapping[str, Numbers]) -> dict[str, float]:
    """The mean of `psnr(x, truth, mask=mask)` over images for each of `masks`, of those that have pixels in it."""
    found = {name: np.asarray(psnr(x, truth, mask=mask)) for name, mask in masks.items()}
    return {name: float(np.nanmean(values)) for name, values in found.items()}


def ssim(
    a: Numbers,
    b: Numbers,
    *,
    data_range: Number | None = None,
    gaussian: bool = False,
) -> Float[Array, " B"]:
    """Structural similarity, the mean over pixels and channels (Wang et al. 2004, equation 13), K1 = 0.01, K2 = 0.03.

    a, b: images `[B, H, W, C]`.
    gaussian: the paper's weights (sigma 1.5, 11 x 11) in place of a uniform window of 7 x 7 with sample covariances.
    Both equal scikit-image's `structural_similarity`, which leaves out the border that a window does not fit into.
    data_range, types, and what is refused: as for `psnr`.
    """
    x, y, span = image_pair(a, b, data_range)
    if gaussian:
        offsets = np.arange(-5, 6)
        window = np.exp(-0.5 * (offsets / 1.5) ** 2)
    else:
        window = np.ones(7)
    size = len(window)
    if min(x.shape[1:3]) < size:
        raise invalid("image size", x.shape[1:3], f"SSIM needs at least {size} x {size} pixels")
    window = jnp.asarray(window / window.sum(), jnp.float32)
    # Means are taken of deviations from the image's own mean, which keeps float32 variances accurate.
    centre = jnp.mean(x, axis=(1, 2), keepdims=True)
    x, y = x - centre, y - centre

    def local(values):
        batch, height, width, channels = values.shape
        planes = values.transpose(0, 3, 1, 2).reshape(batch * channels, 1, height, width)
        for kernel in (window.reshape(1, 1, -1, 1), window.reshape(1, 1, 1, -1)):
            planes = jax.lax.conv(planes, kernel, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
        return planes.reshape(batch, channels, *planes.shape[2:])

    mean_x, mean_y = local(x), local(y)
    correction = 1.0 if gaussian else size**2 / (size**2 - 1)
    var_x = correction * (local(x * x) - mean_x**2)
    var_y = correction * (local(y * y) - mean_y**2)
    covariance = correction * (local(x * y) - mean_x * mean_y)
    shift = centre.transpose(0, 3, 1, 2)
    mean_x, mean_y = mean_x + shift, mean_y + shift
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return jnp.mean(numerator / denominator, axis=(1, 2, 3))
