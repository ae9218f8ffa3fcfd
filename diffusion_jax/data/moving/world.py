"""Generator and captioner of moving shapes."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.data.scenes import COLOURS, SHAPES
from diffusion_jax.data.sources import Indices, check_split
from diffusion_jax.data.tokenizers import Tokenizer, word_tokenizer
from diffusion_jax.errors import invalid, unknown

SIZES = {"small": 0.13, "large": 0.19}
"""Radius, as a fraction of the image's side, of the circle that has the shape's area: shapes of a size are equal."""
DIRECTIONS = ("left", "right", "up", "down")
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
"""What a label can be made of, and the values of each."""
WORDS = (*SIZES, *COLOURS, *SHAPES, "moving", *DIRECTIONS)

# Half side of a square, half length of a cross's arms (three times as long as wide), inradius of a triangle; each for
# an area of pi.
_SQUARE = np.sqrt(np.pi) / 2
_CROSS = np.sqrt(np.pi * 9 / 20)
_TRIANGLE = np.sqrt(np.pi / (3 * np.sqrt(3)))
_EXTENTS = np.array(
    [
        (1.0, 1.0, 1.0),
        (_SQUARE, _SQUARE, _SQUARE),
        (_TRIANGLE * np.sqrt(3), 2 * _TRIANGLE, _TRIANGLE),
        (_CROSS, _CROSS, _CROSS),
    ]
)
"""How far each shape of radius 1 reaches from its centroid: to either side, upwards, downwards."""


class Moving(NamedTuple):
    """What a clip shows: an object, where it is in frame 0 and how it sets off."""

    shape: str
    colour: str
    size: str
    position: tuple[float, float]
    velocity: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class MovingShapes:
    """A source of clips, rendered when they are asked for; see `moving_shapes`."""

    split: str
    length: int
    size: int
    frames: int
    speeds: tuple[float, float]
    classes: tuple[str, ...]
    captions: bool
    seed: int

    def __post_init__(self):
        check_split(self.split)
        if not 16 <= self.size <= 128:
            raise invalid("size", self.size, "clips have between 16 and 128 pixels a side")
        if self.length < 1 or self.frames < 1 or self.seed < 0:
            values = (self.length, self.frames, self.seed)
            raise invalid("length, frames, seed", values, "the first two must be positive and seed not negative")
        if len(self.speeds) != 2 or not 0 <= self.speeds[0] <= self.speeds[1] <= 0.25:
            raise invalid(
                "speeds", self.speeds, "expected the slowest and the fastest, both in 0 .. 0.25 sides a frame"
            )
        for name in self.classes:
            if name not in ATTRIBUTES:
                raise unknown("classes", name, ATTRIBUTES)

    @property
    def name(self) -> str:
        return f"moving_shapes/{self.split}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, self.size, self.size, 3)

    @property
    def num_classes(self) -> int | None:
        return int(np.prod([len(ATTRIBUTES[name]) for name in self.classes])) if self.classes else None

    @property
    def tokenizer(self) -> Tokenizer:
        return word_tokenizer(WORDS)

    @property
    def vocab_size(self) -> int:
        return len(WORDS) + 1

    def __len__(self) -> int:
        return self.length

    def moving(self, index: int) -> Moving:
        """What clip `index` shows."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        # One stream per split and seed: continuous draws of independent streams are disjoint.
        rng = np.random.default_rng((self.seed, ("train", "test").index(self.split), index))
        return draw_moving(rng, self.size, self.speeds)

    def __getitem__(self, index: int) -> dict:
        example = self.take([index])
        cond = {name: value[0] for name, value in example.get("cond", {}).items()}
        return {"x0": example["x0"][0], "cond": cond} if cond else {"x0": example["x0"][0]}

    def take(self, indices: Indices) -> dict:
        """The clips at `indices`, stacked."""
        movings = [self.moving(int(index)) for index in indices]
        cond = {}
        if self.classes:
            cond["label"] = np.array([class_of(moving, self.classes) for moving in movings], np.int32)
        if self.captions:
            cond["tokens"] = np.array([self.tokenizer.encode(describe(moving)) for moving in movings], np.int32)
        x0 = render(movings, self.size, self.frames)
        return {"x0": x0, "cond": cond} if cond else {"x0": x0}


def moving_shapes(
    split: str = "train",
    length: int = 20_000,
    size: int = 16,
    frames: int = 8,
    speeds: tuple[float, float] = (0.03, 0.1),
    classes: tuple[str, ...] = ("shape", "colour"),
    captions: bool = False,
    seed: int = 0,
) -> MovingShapes:
    """Clips `[frames, size, size, 3]` in [-1, 1] of one shape that bounces off the walls, on black.

    length: number of clips. frames: any number; the first frames of a clip do not depend on it.
    speeds: slowest and fastest speed, in image sides a frame.
    classes: attributes ("shape", "colour", "size") whose combinations `cond["label"]` counts; none when empty.
    captions: adds `cond["tokens"]` int32 [5], the words of "small red circle moving left".
    `source.moving(i)` is the truth of clip i.
    """
    return MovingShapes(split, length, size, frames, (speeds[0], speeds[1]), tuple(classes), captions, seed)


def draw_moving(rng: np.random.Generator, size: int = 16, speeds: tuple[float, float] = (0.03, 0.1)) -> Moving:
    """An object of uniform attributes, place, direction and speed."""
    u = rng.random(7)
    shape, colour = SHAPES[int(u[0] * len(SHAPES))], tuple(COLOURS)[int(u[1] * len(COLOURS))]
    size_name = tuple(SIZES)[int(u[2] * len(SIZES))]
    low, high = bounds(SHAPES.index(shape), SIZES[size_name] * size, size)
    x, y = low + u[3:5] * (high - low)
    speed = size * (speeds[0] + u[5] * (speeds[1] - speeds[0]))
    angle = 2 * np.pi * u[6]
    velocity = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
    return Moving(shape, colour, size_name, (float(x), float(y)), velocity)


def class_of(moving: Moving, classes: tuple[str, ...] = ("shape", "colour")) -> int:
    """The class of an object: its attributes counted in the order of `classes`, the last one fastest."""
    number = 0
    for name in classes:
        number = number * len(ATTRIBUTES[name]) + ATTRIBUTES[name].index(getattr(moving, name))
    return number


def describe(moving: Moving) -> str:
    """The caption of a clip, five words."""
    direction = DIRECTIONS[int(direction_of(np.asarray(moving.velocity)))]
    return f"{moving.size} {moving.colour} {moving.shape} moving {direction}"


def direction_of(velocity: Any) -> Any:
    """Index into `DIRECTIONS` of the axis along which `[..., 2]` is longest."""
    x, y = velocity[..., 0], velocity[..., 1]
    return np.where(np.abs(x) >= np.abs(y), np.where(x < 0, 0, 1), np.where(y < 0, 2, 3))


def bounds(shape: Any, radius: Any, size: int) -> tuple[Any, Any]:
    """The lowest and the highest (x, y) at which a shape (index into `SHAPES`) is inside the image; broadcasts."""
    extents = _EXTENTS[shape] * np.asarray(radius)[..., None]
    return extents[..., :2], size - extents[..., [0, 2]]


def bounce(position: Any, low: Any, high: Any) -> np.ndarray:
    """A free position folded back between walls: what elastic reflections, however many, make of it."""
    width = np.maximum(high - low, 1e-6)
    folded = np.mod(position - low, 2 * width)
    return low + np.minimum(folded, 2 * width - folded)


def trajectory(moving: Moving, frames: int = 8, size: int = 16) -> Float[np.ndarray, "frames 2"]:
    """Position in each frame."""
    low, high = bounds(SHAPES.index(moving.shape), SIZES[moving.size] * size, size)
    return bounce(np.asarray(moving.position) + np.arange(frames)[:, None] * np.asarray(moving.velocity), low, high)


def render(movings: list[Moving], size: int = 16, frames: int = 8) -> Float[np.ndarray, "N frames size size 3"]:
    """The clips of several objects in [-1, 1]."""
    shape = np.array([SHAPES.index(moving.shape) for moving in movings])
    radius = np.array([SIZES[moving.size] * size for moving in movings])
    colour = np.array([COLOURS[moving.colour] for moving in movings], np.float32)
    low, high = bounds(shape, radius, size)
    start = np.array([moving.position for moving in movings])
    velocity = np.array([moving.velocity for moving in movings])
    free = start[:, None] + np.arange(frames)[None, :, None] * velocity[:, None]
    position = bounce(free, low[:, None], high[:, None])
    cover = np.empty((len(movings), frames, size, size), np.float32)
    for number in range(len(SHAPES)):
        rows = shape == number
        if rows.any():
            cover[rows] = coverage(
                number, position[rows], np.broadcast_to(radius[rows, None], (rows.sum(), frames)), size
            )
    return cover[..., None] * (colour[:, None, None, None] + 1.0) - 1.0


def coverage(
    shape: int, position: Float[np.ndarray, "*B 2"], radius: Float[np.ndarray, "*B"], size: int
) -> Float[np.ndarray, "*B size size"]:
    """How much of each pixel a shape covers, in [0, 1]: exact for squares and crosses, to second order for others."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    x = grid - position[..., :1].astype(np.float32)
    y = grid - position[..., 1:].astype(np.float32)
    radius = radius.astype(np.float32)[..., None]
    if SHAPES[shape] == "square":
        return _strip(y, _SQUARE * radius)[..., :, None] * _strip(x, _SQUARE * radius)[..., None, :]
    if SHAPES[shape] == "cross":
        long_x, long_y = _strip(x, _CROSS * radius), _strip(y, _CROSS * radius)
        wide_x, wide_y = _strip(x, _CROSS / 3 * radius), _strip(y, _CROSS / 3 * radius)
        both = wide_y[..., :, None] * wide_x[..., None, :]
        return long_y[..., :, None] * wide_x[..., None, :] + wide_y[..., :, None] * long_x[..., None, :] - both
    x, y, radius = x[..., None, :], y[..., :, None], radius[..., None]
    if SHAPES[shape] == "circle":
        outside = np.sqrt(x**2 + y**2) - radius
    else:
        outside = np.maximum(y, np.float32(np.sqrt(0.75)) * np.abs(x) - y / 2) - np.float32(_TRIANGLE) * radius
    return np.clip(0.5 - outside, 0, 1)


def _strip(offset, half):
    """How much of a pixel whose middle is at `offset` lies within `half` of 0, along one axis."""
    half = half.astype(np.float32)
    return np.clip(np.minimum(offset + 0.5, half) - np.maximum(offset - 0.5, -half), 0, 1)
