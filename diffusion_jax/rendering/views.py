"""Several views of one scene: colours between pixels, what one view shows of another, and whether views agree."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.rendering.cameras import NEAREST, Camera, project, unproject


def sampled_at(images: Any, pixels: Any) -> Any:
    """`images [..., H, W, C]` at places `pixels [..., N, 2]` (column, row), linear between the middles of pixels.

    Beyond the border the nearest pixel is taken. Returns `[..., N, C]`.
    """
    height, width, channels = images.shape[-3:]
    column = jnp.clip(pixels[..., 0] - 0.5, 0.0, width - 1.0)
    row = jnp.clip(pixels[..., 1] - 0.5, 0.0, height - 1.0)
    left, top = jnp.minimum(jnp.floor(column), width - 2), jnp.minimum(jnp.floor(row), height - 2)
    dx, dy = (column - left)[..., None], (row - top)[..., None]
    corner = (top * width + left).astype(jnp.int32)
    flat = images.reshape(*images.shape[:-3], height * width, channels)

    def at(offset):
        places = jnp.broadcast_to((corner + offset)[..., None], (*corner.shape, channels))
        lead = jnp.broadcast_shapes(flat.shape[:-2], places.shape[:-2])
        whole = jnp.broadcast_to(flat, (*lead, *flat.shape[-2:]))
        return jnp.take_along_axis(whole, jnp.broadcast_to(places, (*lead, *places.shape[-2:])), axis=-2)

    upper = at(0) * (1 - dx) + at(1) * dx
    lower = at(width) * (1 - dx) + at(width + 1) * dx
    return upper * (1 - dy) + lower * dy


def seen_from(camera: Camera, depth: Any, other: Camera, images: Any) -> tuple[Any, Any]:
    """What the pixels of `camera`, at `depth [..., H, W]`, look like in the `images [..., H, W, C]` of `other`.

    Returns colours `[..., H, W, C]`, and at which depth `[..., H, W]` the other camera has these points; NaN where they
    are behind it or outside of its image.
    """
    shape = depth.shape[-2:]
    points = unproject(camera, depth)
    at = project(other, points.reshape(*points.shape[:-3], -1, 3), shape)
    inside = (at.pixels >= 0) & (at.pixels <= jnp.asarray((shape[1], shape[0])))
    found = sampled_at(images, at.pixels)
    far = jnp.where((at.depth > NEAREST) & inside.all(-1), at.depth, jnp.nan)
    return found.reshape(*found.shape[:-2], *shape, -1), far.reshape(*far.shape[:-1], *shape)


def reprojection_error(images: Any, depth: Any, opacity: Any, cameras: Camera, tolerance: float = 0.1) -> Any:
    """How much the frames of a clip `[..., F, H, W, C]` contradict each other, given the true depth `[..., F, H, W]`.

    The mean square difference `[...]` between each pixel of frame i and the place of frame i + 1 that shows the same
    point, over pixels with something to be seen (`opacity [..., F, H, W]` above 0.5) that the next frame sees as well:
    whose depth there is that of the point, up to the relative `tolerance`. 0 where there is no such pixel.
    """
    axis, count = depth.ndim - 3, depth.shape[-3] - 1
    first, last = (
        jax.tree.map(lambda leaf, begin=begin: jax.lax.slice_in_dim(leaf, begin, begin + count, axis=axis), cameras)
        for begin in (0, 1)
    )
    here, there = slice(None, -1), slice(1, None)
    colour, far = seen_from(first, depth[..., here, :, :], last, images[..., there, :, :, :])
    behind, _ = seen_from(first, depth[..., here, :, :], last, depth[..., there, :, :, None])
    agrees = jnp.abs(behind[..., 0] - far) < tolerance * far
    counts = (agrees & (opacity[..., here, :, :] > 0.5)).astype(jnp.float32)
    error = jnp.mean(jnp.square(colour - images[..., here, :, :, :]), axis=-1)
    axes = (-3, -2, -1)
    return jnp.sum(error * counts, axis=axes) / jnp.maximum(jnp.sum(counts, axis=axes), 1.0)


def plane_sweep(images: Any, cameras: Camera, depths: Any) -> Any:
    """How well two views agree at each of D depths, `[..., 2, H, W, D]`: a small number where the depth may be true.

    images: `[..., 2, H, W, C]` of `cameras [..., 2]`. depths: `[D]`. The mean square difference of a pixel and what the
    other view shows where its ray has that depth; outside of that view it compares with the border (Collins 1996).
    """
    height, width = images.shape[-3:-1]
    lead = images.shape[:-3]
    swapped = Camera(*(jnp.flip(leaf, axis=len(lead) - 1) for leaf in cameras))
    others = jnp.flip(images, axis=len(lead) - 1)
    depths = jnp.asarray(depths, jnp.float32)
    planes = jnp.broadcast_to(depths[:, None, None], (*lead, len(depths), height, width))
    here = Camera(cameras.rotation[..., None, :, :], cameras.position[..., None, :], cameras.focal[..., None])
    points = unproject(here, planes).reshape(*lead, -1, 3)
    found = sampled_at(others, project(swapped, points, (height, width)).pixels)
    found = found.reshape(*lead, len(depths), height, width, images.shape[-1])
    cost = jnp.mean(jnp.square(found - images[..., None, :, :, :]), axis=-1)
    return jnp.moveaxis(cost, -3, -1)
