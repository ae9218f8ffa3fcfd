"""Verifier of moving shapes: what every frame shows, and what a clip keeps of its first frame and of the law."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax.data.moving.world import ATTRIBUTES, SIZES, bounce, bounds, coverage, direction_of
from diffusion_jax.data.scenes import COLOURS, SHAPES
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.typing import Numbers


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
    from scipy import ndimage

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
    return direction_of(reading.position[:, 1] - reading.position[:, 0])


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
    low, high = bounds(reading.shape, reading.radius, reading.side)
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


def verify(
    clips: Numbers,
    label: Any = None,
    classes: tuple[str, ...] = ("shape", "colour"),
    *,
    reference: Numbers | None = None,
    where: Any = None,
) -> dict[str, float]:
    """Means over clips `[N, F, S, S, 3]` of what can be read in them.

    recognised, next_position_error, motion_energy; identity and colour, the share of frames that show an object in the
    shape and colour, and in the colour, of the first frame; with `label [N]` adherence, the share that shows its class.
    reference: clips whose first frame is to be kept in the place of their own, and their places with it:
        position_error in pixels.
    where: `[F]` or `[N, F]`, the frames that count for shares and position_error; all when None, for identity and
        colour all but the first.
    """
    reading = read(clips)
    true = reading if reference is None else read(reference)
    frames = np.arange(np.asarray(clips).shape[1])
    chosen = (frames >= 0, frames > 0) if where is None else (where, where)
    every, later = (np.broadcast_to(one, reading.colour.shape) for one in chosen)
    result = {
        "recognised": float(reading.recognised[every].mean()),
        "identity": float(keeps_identity(reading, true)[later].mean()),
        "colour": float((reading.recognised & (reading.colour == true.colour[:, :1]))[later].mean()),
        "next_position_error": float(next_position_error(reading).mean()),
        "motion_energy": float(motion_energy(clips).mean()),
    }
    if reference is not None:
        result["position_error"] = float(position_error(reading, true)[every].mean())
    if label is not None:
        result["adherence"] = float((labels(reading, classes) == np.asarray(label)[:, None])[every].mean())
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
