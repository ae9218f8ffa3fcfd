"""A world of moving shapes: clips of one coloured shape that flies and bounces off the walls, and their verifier.

Generator: clip i is a function of (seed, split, i) and its law of motion runs for any number of frames, so a longer
clip begins with the shorter one. Captioner: names size, colour, shape and the first direction. Verifier: `read` finds
shape, colour, size and position in every frame, and the functions below it say what a clip keeps of its first frame and
of the law. Fréchet distances between the features given here live in `metrics`.

Lengths are in pixels: pixel i covers [i, i + 1), x grows to the right, y downwards; velocities are per frame.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from diffusion_jax.data.scenes import COLOURS, SHAPES
from diffusion_jax.data.sources import Indices, check_split
from diffusion_jax.data.tokenizers import Tokenizer, word_tokenizer
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.typing import Numbers

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


class Reading(NamedTuple):
    """What the verifier sees in each frame of clips `[N, F, ...]`; indices point into `ATTRIBUTES`.

    position: centroid (x, y) in pixels. radius: of the circle of equal area, in pixels. overlap: of the frame with the
    object that was read, intersection over union. recognised: there is an object, and it is one of this world.
    side: of the image, in pixels.
    """

    shape: Int[np.ndarray, "N F"]
    colour: Int[np.ndarray, "N F"]
    size: Int[np.ndarray, "N F"]
    position: Float[np.ndarray, "N F 2"]
    radius: Float[np.ndarray, "N F"]
    overlap: Float[np.ndarray, "N F"]
    recognised: Bool[np.ndarray, "N F"]
    side: int


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
    low, high = _room(SHAPES.index(shape), SIZES[size_name] * size, size)
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
    direction = DIRECTIONS[int(_direction(np.asarray(moving.velocity)))]
    return f"{moving.size} {moving.colour} {moving.shape} moving {direction}"


def _direction(velocity):
    """Index into DIRECTIONS of the axis along which `[..., 2]` is longest."""
    x, y = velocity[..., 0], velocity[..., 1]
    return np.where(np.abs(x) >= np.abs(y), np.where(x < 0, 0, 1), np.where(y < 0, 2, 3))


def _room(shape, radius, size):
    """The lowest and the highest (x, y) at which a shape is inside the image; broadcasts over shapes and radii."""
    extents = _EXTENTS[shape] * np.asarray(radius)[..., None]
    return extents[..., :2], size - extents[..., [0, 2]]


def bounce(position: Any, low: Any, high: Any) -> np.ndarray:
    """A free position folded back between walls: what elastic reflections, however many, make of it."""
    width = np.maximum(high - low, 1e-6)
    folded = np.mod(position - low, 2 * width)
    return low + np.minimum(folded, 2 * width - folded)


def trajectory(moving: Moving, frames: int = 8, size: int = 16) -> Float[np.ndarray, "frames 2"]:
    """Position in each frame."""
    low, high = _room(SHAPES.index(moving.shape), SIZES[moving.size] * size, size)
    return bounce(np.asarray(moving.position) + np.arange(frames)[:, None] * np.asarray(moving.velocity), low, high)


def render(movings: list[Moving], size: int = 16, frames: int = 8) -> Float[np.ndarray, "N frames size size 3"]:
    """The clips of several objects in [-1, 1]."""
    shape = np.array([SHAPES.index(moving.shape) for moving in movings])
    radius = np.array([SIZES[moving.size] * size for moving in movings])
    colour = np.array([COLOURS[moving.colour] for moving in movings], np.float32)
    low, high = _room(shape, radius, size)
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


def read(clips: Numbers, min_overlap: float = 0.6) -> Reading:
    """Reads clips `[N, F, S, S, 3]` in [-1, 1].

    The colour is the nearest of the palette to the light of all bright places and their surroundings; the light along
    it is the coverage, whose area and centroid give radius and position; the shape is the one that overlaps it most
    when drawn there. A frame whose overlap is below `min_overlap`, or with too little light, is not recognised.
    """
    clips = np.asarray(clips, np.float32)
    if clips.ndim != 5 or clips.shape[2] != clips.shape[3] or clips.shape[4] != 3:
        raise invalid("clips.shape", clips.shape, "the verifier reads square colour clips [N, F, size, size, 3]")
    frames = clips.reshape(-1, *clips.shape[2:])
    parts = [_read_frames(frames[i : i + 2048], min_overlap) for i in range(0, len(frames), 2048)]
    fields = [np.concatenate(values) for values in zip(*parts, strict=True)]
    return Reading(*(value.reshape(*clips.shape[:2], *value.shape[1:]) for value in fields), side=clips.shape[2])


def _read_frames(frames, min_overlap):
    size = frames.shape[1]
    light = np.clip((frames + 1) / 2, 0, 1)
    # Means over 3 x 3 pixels tell a shape from noise; two pixels around them still belong to its edge.
    bright = ndimage.uniform_filter(light.max(-1), 3, mode="constant", axes=(1, 2)) > 0.33
    bright = ndimage.maximum_filter(bright.view(np.uint8), size=(1, 5, 5))
    light = light * bright[..., None]
    palette = (np.array(list(COLOURS.values()), np.float32) + 1) / 2
    colour = (light.sum((1, 2)) @ (palette / np.linalg.norm(palette, axis=1, keepdims=True)).T).argmax(1)
    own = palette[colour][:, None, None]
    # Light of channels that the colour lacks counts against it, so that white is not taken for yellow.
    cover = np.clip((light * own).sum(-1) / own.sum(-1) - (light * (1 - own)).sum(-1) / (1 - own).sum(-1), 0, 1)
    mass = cover.sum((1, 2))
    grid = np.arange(size) + 0.5
    safe = np.maximum(mass, 1e-6)
    position = np.stack([cover.sum(1) @ grid, cover.sum(2) @ grid], axis=-1) / safe[:, None]
    radius = np.sqrt(safe / np.pi)
    # Whatever else shines brightly, in any colour, is counted as not covered by the object; dim noise is not.
    seen = np.maximum(cover, np.where(light.max(-1) > 0.5, light.max(-1), 0))
    overlaps = []
    for shape in range(len(SHAPES)):
        drawn = coverage(shape, position, radius, size)
        overlaps.append(np.minimum(cover, drawn).sum((1, 2)) / np.maximum(np.maximum(seen, drawn).sum((1, 2)), 1e-6))
    overlap = np.max(overlaps, axis=0)
    radii = np.array(list(SIZES.values())) * size
    size_index = (radius > np.sqrt(radii.prod())).astype(np.int64)
    recognised = (3 * mass > np.pi * radii.min() ** 2) & (overlap >= min_overlap)
    return np.argmax(overlaps, axis=0), colour, size_index, position, radius, overlap, recognised


def labels(reading: Reading, classes: tuple[str, ...] = ("shape", "colour")) -> Int[np.ndarray, "N F"]:
    """The class that each frame shows, counted as `label` does; -1 where nothing is recognised."""
    number = np.zeros(reading.recognised.shape, np.int64)
    for name in classes:
        if name not in ATTRIBUTES:
            raise unknown("classes", name, ATTRIBUTES)
        number = number * len(ATTRIBUTES[name]) + getattr(reading, name)
    return np.where(reading.recognised, number, -1)


def direction(reading: Reading) -> Int[np.ndarray, " N"]:
    """The direction (index into `DIRECTIONS`) in which a clip sets off."""
    return _direction(reading.position[:, 1] - reading.position[:, 0])


def keeps_identity(reading: Reading, reference: Reading | None = None) -> Bool[np.ndarray, "N F"]:
    """Whether each frame shows the shape and colour of the first frame, of `reference` if given.

    A frame in which nothing is recognised does not; where the first frame is not recognised, none does.
    """
    first = labels(reading if reference is None else reference)[:, :1]
    return (labels(reading) == first) & (first >= 0)


def next_position_error(reading: Reading, max_speed: float = 0.1) -> Float[np.ndarray, "N steps"]:
    """Distance in pixels of frame k + 1's position from where frames k - 1 and k say that it must be.

    The velocity is the last displacement, or what it was if a wall was hit on the way, whichever predicts better;
    `max_speed`, in sides a frame, bounds the second so that only walls excuse a turn. True clips: 0.05
    on average, because places are measured.
    """
    low, high = _room(reading.shape, reading.radius, reading.side)
    before, now, after = reading.position[:, :-2], reading.position[:, 1:-1], reading.position[:, 2:]
    low, high = low[:, 1:-1], high[:, 1:-1]
    error = np.abs(bounce(now + (now - before), low, high) - after)
    # A pixel's fraction more than the fastest, because positions are measured.
    limit = 1.1 * max_speed * reading.side + 0.1
    for wall in (low, high):
        velocity = before + now - 2 * wall
        reflected = np.abs(bounce(now + velocity, low, high) - after)
        error = np.where(np.abs(velocity) <= limit, np.minimum(error, reflected), error)
    return np.linalg.norm(error, axis=-1)


def position_error(reading: Reading, reference: Reading) -> Float[np.ndarray, "N F"]:
    """Distance in pixels of each frame's position from that of another clip, e.g. the true one."""
    return np.linalg.norm(reading.position - reference.position, axis=-1)


def motion_energy(clips: Numbers) -> Float[np.ndarray, "N steps"]:
    """Mean square of the difference between successive frames; 0 for a still picture."""
    return (np.diff(np.asarray(clips, np.float32), axis=1) ** 2).mean(axis=(2, 3, 4))


def speed(reading: Reading, window: int = 7) -> Float[np.ndarray, "N W"]:
    """Speed in pixels a frame over consecutive windows of so many steps.

    Per axis the median displacement, which a bounce or two in a window do not change.
    """
    steps = np.abs(np.diff(reading.position, axis=1))
    if not 1 <= window <= steps.shape[1]:
        raise invalid("window", window, f"clips of {steps.shape[1] + 1} frames have 1 .. {steps.shape[1]} steps")
    count = steps.shape[1] // window
    cut = steps[:, : count * window].reshape(len(steps), count, window, 2)
    return np.linalg.norm(np.median(cut, axis=2), axis=-1)


def drift(reading: Reading, window: int = 7) -> dict[str, np.ndarray]:
    """Mean relative change of "size" (radius) and "speed" since the first window, `[W]`, the first entry being 0."""
    speeds = speed(reading, window)
    count = speeds.shape[1]
    radius = reading.radius[:, : count * window].reshape(len(speeds), count, window).mean(axis=2)
    # Speeds below a tenth of a pixel are noise of the reading: their relative change means nothing.
    return {
        "size": np.abs(radius / radius[:, :1] - 1).mean(axis=0),
        "speed": (np.abs(speeds - speeds[:, :1]) / np.maximum(speeds[:, :1], 0.1)).mean(axis=0),
    }


def verify(clips: Numbers, label: Any = None, classes: tuple[str, ...] = ("shape", "colour")) -> dict[str, float]:
    """Means over clips: recognised, identity (frames after the first), next_position_error, motion_energy, and
    adherence, the share of frames that show the class `label [N]`, when it is given."""
    reading = read(clips)
    result = {
        "recognised": float(reading.recognised.mean()),
        "identity": float(keeps_identity(reading)[:, 1:].mean()),
        "next_position_error": float(next_position_error(reading).mean()),
        "motion_energy": float(motion_energy(clips).mean()),
    }
    if label is not None:
        result["adherence"] = float((labels(reading, classes) == np.asarray(label)[:, None]).mean())
    return result


def frame_features(clips: Numbers) -> Float[np.ndarray, "rows 60"]:
    """Features of every frame, for a Fréchet distance: where light is (4 x 4 cells by colour), edges, and softness."""
    clips = np.asarray(clips, np.float32)
    return _features((clips.reshape(-1, *clips.shape[2:]) + 1) / 2)


def difference_features(clips: Numbers) -> Float[np.ndarray, "rows 60"]:
    """The same features of the differences between successive frames: they see how things move."""
    steps = np.diff(np.asarray(clips, np.float32), axis=1)
    return _features(steps.reshape(-1, *steps.shape[2:]) / 2)


def _features(frames):
    count, size = frames.shape[:2]
    edges = np.linspace(0, size, 5).astype(int)[:-1]
    cells = np.add.reduceat(np.add.reduceat(frames, edges, axis=1), edges, axis=2).reshape(count, -1)
    down, right = np.diff(frames, axis=1), np.diff(frames, axis=2)
    curved = np.diff(right, axis=2)
    strengths = [np.sqrt((part**2).sum((1, 2)) + 1e-6) for part in (down, right, curved)]
    softness = (np.abs(frames) * (1 - np.abs(frames))).sum((1, 2))
    # Cells sum over (size / 4)^2 pixels; all features are brought to the order of one.
    return np.concatenate([cells * 16 / size**2, *(s / 4 for s in strengths), softness / size], axis=1)
