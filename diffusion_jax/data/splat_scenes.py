"""A world of still scenes in 3-D: a few coloured Gaussians, seen along the path of a camera, with their true depth.

Scene i is a function of (seed, split, i). The clip of a scene is what `rendering.render_splats` makes of it from
`frames` cameras, from one place on a circle around the scene to another, which both look near its middle
(`rendering.camera_path`). Lengths are in units of the world, in which scenes have a radius of about 1.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.data.sources import Indices, check_split
from diffusion_jax.errors import invalid
from diffusion_jax.rendering import Camera, Rendered, Splats, camera_path, looking_at, render_splats

NEAR, FAR = 1.6, 4.4
"""Depths between which a scene lies, from all of its cameras."""

AT_ONCE = 32
"""Scenes that one call of the compiled program films."""

DISTANCE, FOCAL, OPACITY = 3.0, 2.0, 0.95


class Filmed(NamedTuple):
    """splats: `[B, N, ...]`. cameras: `[B, F]`. clip: `Rendered`, its colour `[B, F, H, W, 3]` in [-1, 1]."""

    splats: Splats
    cameras: Camera
    clip: Rendered


@dataclasses.dataclass(frozen=True)
class SplatScenes:
    """See `splat_scenes`."""

    split: str
    length: int
    frames: int
    size: int
    objects: int
    seed: int

    def __post_init__(self):
        check_split(self.split)
        if self.length < 1 or self.objects < 1 or self.seed < 0 or self.frames < 2 or self.size < 4:
            values = (self.length, self.objects, self.seed, self.frames, self.size)
            expected = "at least 1, 1, 0, 2 and 4 were expected"
            raise invalid("length, objects, seed, frames, size", values, expected)

    @property
    def name(self) -> str:
        return f"splat_scenes/{self.split}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, self.size, self.size, 3)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return jax.tree.map(lambda leaf: leaf[0], self.take([index]))

    def take(self, indices: Indices) -> dict:
        """The clips at `indices`, stacked."""
        filmed = self.filmed(indices)
        return {"x0": filmed.clip.colour, "cond": filmed.cameras._asdict()}

    def filmed(self, indices: Indices) -> Filmed:
        """All of the scenes at `indices`: what they consist of, from where they are seen, colour and depth."""
        drawn = np.stack([self._draw(int(index)) for index in indices])
        parts = []
        for begin in range(0, len(drawn), AT_ONCE):
            # The last one is repeated until they are as many as were compiled.
            rows = np.minimum(np.arange(begin, begin + AT_ONCE), len(drawn) - 1)
            parts.append(jax.device_get(_filmed(drawn[rows], self.frames, self.size)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(drawn)], *parts)

    def _draw(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, ("train", "test").index(self.split), index))
        # A row of the cameras, and one of each object.
        return rng.random((self.objects + 1, 8)).astype(np.float32)


def splat_scenes(
    split: str = "train", length: int = 2000, frames: int = 8, size: int = 16, objects: int = 5, seed: int = 0
) -> SplatScenes:
    """Clips `[frames, size, size, 3]` in [-1, 1] of still scenes along the path of a camera, on black.

    length: number of scenes. objects: Gaussians of a scene. `cond` are the cameras: "rotation" [frames, 3, 3],
    "position" [frames, 3] and "focal" [frames]. `source.filmed(indices)` has the true geometry as well.
    """
    return SplatScenes(split, length, frames, size, objects, seed)


@partial(jax.jit, static_argnames=("frames", "size"))
def _filmed(drawn: Any, frames: int, size: int) -> Filmed:
    """drawn: uniform numbers `[B, objects + 1, 8]`."""
    splats = _splats(drawn[:, 1:])
    view = drawn[:, 0]
    middle, half = 2 * jnp.pi * view[:, 0], jnp.deg2rad(18.0 + 14.0 * view[:, 1])
    half = jnp.where(view[:, 2] < 0.5, half, -half)
    first, last = (_on_circle(middle + sign * half, view[:, 3 + i]) for i, sign in ((0, -1.0), (1, 1.0)))
    cameras = camera_path(first, last, frames)
    clip = render_splats(jax.tree.map(lambda leaf: leaf[:, None], splats), cameras, (size, size))
    return Filmed(splats, cameras, clip)


def _splats(drawn):
    """Round objects of lively colours that lie in a ball of radius 1."""
    angle, height = 2 * jnp.pi * drawn[..., 0], 2 * drawn[..., 1] - 1
    radius = jnp.cbrt(drawn[..., 2])
    flat = radius * jnp.sqrt(1 - height**2)
    means = jnp.stack([flat * jnp.cos(angle), flat * jnp.sin(angle), radius * height], axis=-1)
    scales = jnp.broadcast_to(0.18 + 0.2 * drawn[..., 3:4], means.shape)
    turned = jnp.broadcast_to(jnp.asarray([1.0, 0.0, 0.0, 0.0]), (*means.shape[:-1], 4))
    hue = 2 * jnp.pi * (drawn[..., 4:5] + jnp.arange(3) / 3)
    colours = jnp.clip(0.3 + 1.1 * jnp.cos(hue), -1.0, 1.0)
    return Splats(means, scales, turned, jnp.full(means.shape[:-1], OPACITY), colours)


def _on_circle(angle, share):
    """Cameras around the scene, from 10 to 35 degrees above it."""
    above = jnp.deg2rad(10.0 + 25.0 * share)
    flat = DISTANCE * jnp.cos(above)
    position = jnp.stack([flat * jnp.cos(angle), flat * jnp.sin(angle), DISTANCE * jnp.sin(above)], axis=-1)
    return looking_at(position, jnp.zeros(3), FOCAL)
