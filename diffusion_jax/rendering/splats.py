"""Gaussian splatting (Kerbl et al. 2023) without a rasteriser: every pixel sees every Gaussian, in order of depth.

A Gaussian of mean m and covariance S has in an image, with J the derivative of the projection at m (Zwicker et al.
2001), the covariance S' = J S J' + b^2 I. With d the distance of a pixel from where m appears, and Gaussians in order
of depth,

    a_i = o_i exp(-d' S'^-1 d / 2),        T_i = prod_{k < i} (1 - a_k),
    colour = sum_i T_i a_i c_i + T_N background.                                                                    (1)

It is one scan over the Gaussians. N of them in an image of H x W cost N H W operations, and for a gradient as many
numbers of memory: meant for thousands of Gaussians and small images.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.rendering.cameras import NEAREST, Camera, in_camera_axes, quaternion_matrix

MOST_OPAQUE = 0.99
"""No Gaussian hides all that is behind it, so that every one keeps a gradient (as in the published renderer)."""


class Splats(NamedTuple):
    """N coloured Gaussians, of any leading axes.

    means: `[..., N, 3]`. scales: `[..., N, 3]`, standard deviations along their own axes, positive. rotations:
    `[..., N, 4]`, quaternions, real part first, of any length but 0. opacities: `[..., N]`, in [0, 1].
    colours: `[..., N, C]`, such as pixels in [-1, 1].
    """

    means: Any
    scales: Any
    rotations: Any
    opacities: Any
    colours: Any


class Rendered(NamedTuple):
    """colour: `[..., H, W, C]`. depth: `[..., H, W]`, the mean of what is seen, 0 where nothing is. opacity:
    `[..., H, W]`, the share of a pixel that is not background."""

    colour: Any
    depth: Any
    opacity: Any


def render_splats(
    splats: Splats, camera: Camera, shape: tuple[int, int], background: Any = -1.0, blur: float = 0.3
) -> Rendered:
    """Images of `shape` (H, W) by equation (1); leading axes of `splats` and `camera` broadcast.

    For scenes `[B, N, ...]` and cameras `[B, F]` insert an axis: `jax.tree.map(lambda leaf: leaf[:, None], splats)`.
    background: a colour, `[C]` or a number. blur: b, in pixels; what is smaller than a pixel is not lost between two.

    Values and derivatives are finite, also for Gaussians behind a camera, which are not seen.
    Raises InvalidInput for means and colours of different numbers.
    """
    if splats.means.shape[-1] != 3 or splats.means.shape[:-1] != splats.colours.shape[:-1]:
        shapes = {"means": splats.means.shape, "colours": splats.colours.shape}
        raise invalid("shapes of splats", shapes, "[..., N, 3] and [..., N, C] were expected")
    height, width = shape
    seen = in_camera_axes(camera, splats.means)
    order, ahead = jnp.argsort(seen[..., 2], axis=-1), seen[..., 2] > NEAREST
    opacities = jnp.where(ahead, splats.opacities, 0.0)
    # What is not seen is anywhere: its own numbers may be too large for a product with 0.
    seen = jnp.where(ahead[..., None], seen, jnp.asarray([0.0, 0.0, 1.0]))

    def sorted_by_depth(leaf):
        leaf = jnp.broadcast_to(leaf, (*order.shape, leaf.shape[-1]))
        return jnp.take_along_axis(leaf, order[..., None], axis=-2)

    unit, centre = camera.focal[..., None] * height / 2, (width / 2, height / 2)
    spread = _image_covariance(splats, camera, seen, unit, blur)
    z = jnp.maximum(seen[..., 2], NEAREST)
    at = unit[..., None] * seen[..., :2] / z[..., None] + jnp.asarray(centre)
    packed = sorted_by_depth(jnp.concatenate([at, spread, opacities[..., None]], axis=-1))
    colours = jnp.broadcast_to(splats.colours, (*order.shape, splats.colours.shape[-1]))
    # A one of each adds up to what is covered, without the rounding of 1 - through.
    values = jnp.concatenate([colours, z[..., None], jnp.ones_like(z)[..., None]], axis=-1)
    values = sorted_by_depth(values)
    x, y = jnp.arange(width) + 0.5, (jnp.arange(height) + 0.5)[:, None]

    def behind(carry, one):
        """One Gaussian behind those before it: what shows through them, and what is seen so far."""
        through, so_far = carry
        numbers, value = one
        column, line, xx, xy, yy, opacity = (numbers[..., i, None, None] for i in range(6))
        dx, dy = x - column, y - line
        # Not below 0, where rounding takes that of an elongated Gaussian close to the camera.
        power = jnp.maximum(0.5 * (xx * jnp.square(dx) + yy * jnp.square(dy)) + xy * dx * dy, 0.0)
        alpha = jnp.minimum(opacity * jnp.exp(-power), MOST_OPAQUE)
        return (through * (1 - alpha), so_far + (through * alpha)[..., None] * value[..., None, None, :]), None

    nothing = jnp.zeros((*order.shape[:-1], height, width, values.shape[-1]), values.dtype)
    each = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -2, 0), (packed, values))
    # What is kept for the gradient is one image a Gaussian; the rest is computed again.
    (through, sums), _ = jax.lax.scan(jax.checkpoint(behind), (jnp.ones_like(nothing[..., 0]), nothing), each)
    colour, opacity = sums[..., :-2], sums[..., -1]
    colour = colour + through[..., None] * jnp.asarray(background, values.dtype)
    return Rendered(colour, sums[..., -2] / jnp.maximum(opacity, 1e-6), opacity)


def _image_covariance(splats, camera, seen, unit, blur):
    """The entries (xx, xy, yy) of the inverse of S', `[..., N, 3]`, in pixels."""
    axes = quaternion_matrix(splats.rotations) * splats.scales[..., None, :]
    x, y, z = seen[..., 0], seen[..., 1], jnp.maximum(seen[..., 2], NEAREST)
    nothing = jnp.zeros_like(x)
    scale = unit / z
    rows = [[scale, nothing, -scale * x / z], [nothing, scale, -scale * y / z]]
    derivative = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    half = derivative @ camera.rotation[..., None, :, :] @ axes
    covariance = half @ jnp.swapaxes(half, -1, -2)
    xx, xy, yy = covariance[..., 0, 0] + blur**2, covariance[..., 0, 1], covariance[..., 1, 1] + blur**2
    determinant = jnp.maximum(xx * yy - xy * xy, blur**4)
    return jnp.stack([yy, -xy, xx], axis=-1) / determinant[..., None]
