"""Pictures with and without a shadow: photographs and generated textures, and what a disc of a sun makes of them.

Light that falls on a surface is that of the sun, as far as it is seen from there, and of the sky, which is bluer. In
linear light a pixel p with colour x is seen as

    y_c(p) = x_c(p) (A_c + (1 - A_c) V(p)),                                                                       (1)

A the sky's share of the light in each channel and V the share of the sun's disc that is seen from p. An occluder at the
distance h above the surface hides a point q of the disc from p where p + h tan(rho) q lies within its outline, rho the
angular radius of the sun, so V is an average over points of the disc and the penumbra widens with h, also along one
occluder that stands at an angle. Outlines of training are convex polygons and bars, those of testing stars and leaves.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from diffusion_jax.data.photographs import patches
from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.errors import invalid

SUN = 0.0047
"""Tangent of the sun's angular radius."""

OUTLINES = {"train": ("polygon", "bar"), "test": ("star", "leaves")}
GAMMA = 2.2
DISC = 24
"""Points of the sun's disc."""

SHADOW, LIT = 0.5, 0.99
"""V below which a pixel is in the shadow, and above which it is lit; between them is penumbra."""


@dataclass(frozen=True, eq=False)
class ShadowPairs(ArraySource):
    """x0: without shadows. cond["picture"]: the same with one. visibility: V of equation (1), `[N, S, S, 1]`.
    attenuation: A, `[N, 3]`. outline: of each example's occluder, by name."""

    visibility: np.ndarray = field(kw_only=True)
    attenuation: np.ndarray = field(kw_only=True)
    outline: tuple[str, ...] = field(kw_only=True)

    def regions(self, indices) -> dict[str, np.ndarray]:
        """Masks `[B, S, S, 1]` of what is in the shadow, in its penumbra, and lit."""
        seen = self.visibility[indices]
        shadow, lit = seen < SHADOW, seen > LIT
        return {name: mask.astype(np.float32) for name, mask in
                (("shadow", shadow), ("penumbra", ~shadow & ~lit), ("lit", lit))}  # fmt: skip


def shadow_pairs(split: str = "train", length: int = 2000, size: int = 32, textures: float = 0.3) -> ShadowPairs:
    """`length` pairs of pictures of `size` x `size` pixels in [-1, 1]; example i is the same for every length.

    textures: share of generated textures, the others are patches of photographs. Splits share no pixel of a photograph,
    no texture and no kind of occluder; at least 15 % and at most 60 % of the sun's light is taken from each picture.
    """
    check_split(split)
    if length < 1 or size < 4 or not 0 <= textures <= 1:
        raise invalid("length, size, textures", (length, size, textures), "positive sizes and a share were expected")
    return _pairs(split, length, size, textures)


@functools.lru_cache(maxsize=4)
def _pairs(split, length, size, textures):
    photographs = patches(split, size).x0
    made = [_pair(np.random.default_rng([("train", "test").index(split), i]), split, size, textures, photographs)
            for i in range(length)]  # fmt: skip
    clear, seen, attenuation, outline = zip(*made, strict=True)
    clear, seen, attenuation = (np.stack(part).astype(np.float32) for part in (clear, seen, attenuation))
    picture = with_shadow(clear, seen, attenuation[:, None, None])
    return ShadowPairs(
        clear, {"picture": picture}, f"shadow_pairs/{split}", visibility=seen, attenuation=attenuation, outline=outline
    )


def linear_light(x):
    """In [0, 1], of pictures in [-1, 1], whose values are light to the power of 1 / 2.2."""
    return np.clip((np.asarray(x) + 1) / 2, 0, 1) ** GAMMA


def seen_as(light) -> np.ndarray:
    """Pictures in [-1, 1] of linear light."""
    return np.asarray(2 * np.clip(light, 0, 1) ** (1 / GAMMA) - 1, np.float32)


def with_shadow(clear, visibility, attenuation):
    """Equation (1) for pictures in [-1, 1]."""
    return seen_as(linear_light(clear) * (attenuation + (1 - attenuation) * visibility))


def light_error(x, truth, mask) -> float:
    """How far the light of pictures is from the true one where `mask [B, S, S, 1]` is 1: the mean over pictures, of
    those that have pixels there, of the size of the mean logarithm of their ratio."""
    ratio = np.log(linear_light(x) + 0.01) - np.log(linear_light(truth) + 0.01)
    count = mask.sum((1, 2, 3))
    return float(np.abs((ratio * mask).sum((1, 2, 3))[count > 0] / (3 * count[count > 0])).mean())


def best_gain(picture, truth) -> np.ndarray:
    """Pictures with the best gain of the light in each of their channels, which only who has the truth can find."""
    seen, wanted = linear_light(picture), linear_light(truth)
    # A channel without light stays so.
    power = np.maximum(np.square(seen).sum((1, 2), keepdims=True), 1e-12)
    return seen_as((seen * wanted).sum((1, 2), keepdims=True) / power * seen)


def _pair(random, split, size, textures, photographs):
    generated = random.uniform() < textures
    clear = texture(random, size) if generated else photographs[random.integers(len(photographs))]
    outline = OUTLINES[split][random.integers(2)]
    # The sky's share, and its colour, which is on the side of blue.
    attenuation = random.uniform(0.2, 0.45) * (1 + random.uniform(0.0, 0.35) * np.array([-1.0, 0.0, 1.0]))
    seen = np.ones((size, size, 1))
    while not 0.15 <= 1 - seen.mean() <= 0.6:
        seen = visibility(_height(random, size), _OUTLINES[outline](random))
    return clear, seen, attenuation, outline


def texture(random: np.random.Generator, size: int) -> np.ndarray:
    """Waves of random directions, wider ones stronger, between two colours: `[size, size, 3]` in [-1, 1]."""
    x, y = np.meshgrid(np.arange(size) / size, np.arange(size) / size)
    waves = np.zeros((size, size))
    for octave in (1.5, 3.0, 6.0, 10.0):
        for _ in range(2):
            angle, phase = random.uniform(0, 2 * np.pi, 2)
            waves += np.sin(2 * np.pi * octave * (np.cos(angle) * x + np.sin(angle) * y) + phase) / octave**0.7
    share = 1 / (1 + np.exp(-3 * waves[..., None]))
    first, second = random.uniform(-0.8, 1.0, (2, 3))
    return np.asarray(first + (second - first) * share, np.float32)


def visibility(height: np.ndarray, inside: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """V `[S, S, 1]` below an occluder of the outline `inside(points [..., 2]) -> bool`, places in sides of the picture.

    height: `[S, S]`, how far above the surface it is in sides of the picture, as seen from each pixel.
    """
    turn = np.arange(DISC) * np.pi * (3 - np.sqrt(5))
    disc = (np.sqrt((np.arange(DISC) + 0.5) / DISC) * np.stack([np.cos(turn), np.sin(turn)])).T
    hidden = inside(_places(len(height)) + SUN * height[..., None] * disc[:, None, None])
    return 1 - hidden.mean(axis=0)[..., None]


def _places(size):
    middles = (np.arange(size) + 0.5) / size
    return np.stack(np.meshgrid(middles, middles), axis=-1)


def _height(random, size):
    """2 to 14 sides, and as much more along a direction as 4 a side."""
    angle = random.uniform(0, 2 * np.pi)
    along = _places(size) @ np.array([np.cos(angle), np.sin(angle)])
    return np.maximum(random.uniform(2, 14) + random.uniform(0, 4) * along, 0.0)


def _within(corners):
    """Whether points lie in a convex polygon, whose corners `[K, 2]` go round it."""
    sides = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([-sides[:, 1], sides[:, 0]], axis=1)
    offsets = (normals * corners).sum(1)
    return lambda points: (points @ normals.T >= offsets).all(axis=-1)


def _polygon(random):
    angles = np.sort(random.uniform(0, 2 * np.pi, random.integers(3, 7)))
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _within(random.uniform(0.2, 0.8, 2) + random.uniform(0.3, 0.7) * circle)


def _bar(random):
    angle, half = random.uniform(0, 2 * np.pi), random.uniform(0.1, 0.25)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)]) * half
    middle = random.uniform(0.25, 0.75, 2)
    return _within(np.stack([middle - 2 * along - across, middle + 2 * along - across,
                             middle + 2 * along + across, middle - 2 * along + across]))  # fmt: skip


def _star(random):
    middle, radius, phase = random.uniform(0.2, 0.8, 2), random.uniform(0.3, 0.6), random.uniform(0, 2 * np.pi)
    rays, depth = random.integers(3, 7), random.uniform(0.3, 0.5)

    def inside(points):
        away = points - middle
        around = np.arctan2(away[..., 1], away[..., 0])
        return np.hypot(away[..., 0], away[..., 1]) < radius * (1 + depth * np.cos(rays * around + phase))

    return inside


def _leaves(random):
    count = random.integers(8, 16)
    middles, radii = random.uniform(0, 1, (count, 2)), random.uniform(0.07, 0.17, count)
    return lambda points: (((points[..., None, :] - middles) ** 2).sum(-1) < radii**2).any(axis=-1)


_OUTLINES = {"polygon": _polygon, "bar": _bar, "star": _star, "leaves": _leaves}
