"""Pinhole cameras: where points of the world appear, rays through pixels, and paths from one camera to another.

With R the rotation from the world to the axes (right, down, forward) of a camera at p, a point q is at (x, y, z) =
R (q - p), and appears in an image of height H and width W, focal length f, at

    column  (f x / z) H / 2 + W / 2,        row  (f y / z) H / 2 + H / 2,        depth z.                          (1)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid

NEAREST = 1e-2
"""Depths below this are taken for it where something is divided by them: what is behind a camera is not seen."""


class Camera(NamedTuple):
    """Cameras, of any leading axes, which they share.

    rotation: `[..., 3, 3]`, rows are the axes right, down and forward in the world. position: `[..., 3]`.
    focal: `[...]`, in halves of the image's height: 1 / tan of half the vertical angle of view.
    """

    rotation: Any
    position: Any
    focal: Any


class Projected(NamedTuple):
    """pixels: `[..., N, 2]`, column and row as in equation (1). depth: `[..., N]`, negative behind the camera."""

    pixels: Any
    depth: Any


def looking_at(position: Any, target: Any, focal: Any = 1.5, up: Any = (0.0, 0.0, 1.0)) -> Camera:
    """Cameras at `position [..., 3]` that look at `target [..., 3]`, with `up` upwards in their images.

    Two directions must not agree: from position to target, and `up` (the rotation is then not finite).
    """
    position, target, up = (jnp.asarray(value, jnp.float32) for value in (position, target, up))
    forward = _unit(target - position)
    right = _unit(jnp.cross(forward, jnp.broadcast_to(up, forward.shape)))
    rotation = jnp.stack([right, jnp.cross(forward, right), forward], axis=-2)
    position = jnp.broadcast_to(position, forward.shape)
    return Camera(rotation, position, jnp.broadcast_to(jnp.float32(focal), position.shape[:-1]))


def project(camera: Camera, points: Any, shape: tuple[int, int]) -> Projected:
    """Where `points [..., N, 3]` appear in images of `shape` (H, W), by equation (1)."""
    height, width = shape
    x, y, z = _split(in_camera_axes(camera, points))
    scale = camera.focal[..., None] * height / (2 * jnp.maximum(z, NEAREST))
    return Projected(jnp.stack([scale * x + width / 2, scale * y + height / 2], axis=-1), z)


def camera_rays(camera: Camera, shape: tuple[int, int]) -> Any:
    """`[..., H, W, 3]`: from a camera through the middle of each pixel, of length 1 along the direction of view."""
    height, width = shape
    x = (2 * jnp.arange(width) + 1 - width) / height
    y = (2 * jnp.arange(height) + 1 - height) / height
    flat = jnp.stack(jnp.broadcast_arrays(x[None], y[:, None]), axis=-1)
    flat = flat / camera.focal[..., None, None, None]
    ahead = jnp.concatenate([flat, jnp.ones((*flat.shape[:-1], 1), flat.dtype)], axis=-1)
    return jnp.einsum("...hwc,...cd->...hwd", ahead, camera.rotation, precision="highest")


def unproject(camera: Camera, depth: Any) -> Any:
    """The points `[..., H, W, 3]` that are seen at `depth [..., H, W]`: the inverse of `project`."""
    rays = camera_rays(camera, depth.shape[-2:])
    return camera.position[..., None, None, :] + depth[..., None] * rays


def cosine_easing(share: Any) -> Any:
    """`(1 - cos(pi u)) / 2`: from 0 to 1 with rest at both ends."""
    return (1.0 - jnp.cos(jnp.pi * jnp.asarray(share, jnp.float32))) / 2.0


def camera_path(first: Camera, last: Camera, frames: int, easing: Any = cosine_easing) -> Camera:
    """`frames` cameras `[..., F]` from `first [...]` to `last [...]`, both included.

    Positions and focal lengths go in a straight line and rotations turn about one axis (Shoemake 1985), both by the
    share `easing(u)` of the way, u from 0 to 1. Raises InvalidInput for less than two frames.
    """
    if frames < 2:
        raise invalid("frames", frames, "a path has at least its two ends")
    share = easing(jnp.linspace(0.0, 1.0, frames))
    turn = _quaternion(last.rotation @ jnp.swapaxes(first.rotation, -1, -2))
    # Half the angle, of the shorter of both ways around; the axis of no turn at all is any.
    turn = jnp.where(turn[..., :1] < 0, -turn, turn)
    sine2 = jnp.sum(jnp.square(turn[..., 1:]), axis=-1)
    still = sine2 < 1e-12
    sine = jnp.sqrt(jnp.where(still, 1.0, sine2))
    half = jnp.arctan2(sine, turn[..., 0])
    axis = turn[..., 1:] / sine[..., None]
    angle = jnp.where(still, 0.0, half)[..., None] * share
    part = jnp.concatenate([jnp.cos(angle)[..., None], jnp.sin(angle)[..., None] * axis[..., None, :]], axis=-1)
    rotation = quaternion_matrix(part) @ first.rotation[..., None, :, :]

    def between(one, other):
        one, other = one[..., None, :], other[..., None, :]
        return one + (other - one) * share[:, None]

    focal = between(first.focal[..., None], last.focal[..., None])[..., 0]
    return Camera(rotation, between(first.position, last.position), focal)


def camera_numbers(cameras: Camera) -> Any:
    """`[..., F, 12]`: rotation and position of `cameras [..., F]` as the first of them sees them, for a network that is
    told where they are. They do not change when world and cameras are turned or moved together."""
    begun, there = jnp.asarray(cameras.rotation)[..., :1, :, :], jnp.asarray(cameras.position)
    rotation = cameras.rotation @ jnp.swapaxes(begun, -1, -2)
    position = jnp.einsum("...ij,...j->...i", begun, there - there[..., :1, :])
    return jnp.concatenate([rotation.reshape(*rotation.shape[:-2], 9), position], axis=-1)


def quaternion_matrix(quaternion: Any) -> Any:
    """The rotation `[..., 3, 3]` of quaternions `[..., 4]`, real part first, of any length but 0."""
    norm2 = jnp.sum(jnp.square(quaternion), axis=-1, keepdims=True)
    w, x, y, z = _split(quaternion * jax.lax.rsqrt(jnp.maximum(norm2, 1e-12)))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _quaternion(matrix: Any) -> Any:
    """Of four expressions for the quaternion of a rotation, that which divides by the largest number."""
    m = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
    a, b, c = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
    d, e, f = m[1][0] + m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2]
    squares = [
        1 + m[0][0] + m[1][1] + m[2][2],
        1 + m[0][0] - m[1][1] - m[2][2],
        1 - m[0][0] + m[1][1] - m[2][2],
        1 - m[0][0] - m[1][1] + m[2][2],
    ]
    table = [(squares[0], a, b, c), (a, squares[1], d, e), (b, d, squares[2], f), (c, e, f, squares[3])]
    rows = jnp.stack([jnp.stack(row, axis=-1) for row in table], axis=-2)
    largest = jnp.argmax(jnp.stack(squares, axis=-1), axis=-1)
    return _unit(jnp.take_along_axis(rows, largest[..., None, None], axis=-2)[..., 0, :])


def in_camera_axes(camera: Camera, points: Any) -> Any:
    """`points [..., N, 3]` of the world in the axes of a camera: (x, y, z) of equation (1)."""
    apart = points - camera.position[..., None, :]
    # Ten bits, as accelerators multiply by default, are whole pixels of a large image.
    return jnp.einsum("...ij,...nj->...ni", camera.rotation, apart, precision="highest")


def _unit(vector):
    return vector / jnp.sqrt(jnp.sum(jnp.square(vector), axis=-1, keepdims=True))


def _split(vector):
    return tuple(vector[..., i] for i in range(vector.shape[-1]))
