"""A world of talking faces: parametric heads whose mouths follow a synthetic voice, clips of any length, a verifier.

Generator: example i is a function of (seed, split, i): who it is (colour and shape of the head), how the head bobs, and
a waveform of syllables; a longer clip begins with the shorter one. `log_mel` turns the waveform into one feature vector
a frame and looks back only, so that it can be streamed. Verifier: `read` fits the renderer to each frame, and the
functions below it say, for every frame, whether the mouth follows the voice, who is shown, and what flickers.

Positions are in image sides from the middle of the picture, y downwards; an opening is 0 (closed) to 1.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.data.sources import Indices, check_split
from diffusion_jax.data.voice import FRAME_RATE, Speech, draw_speech, log_mel
from diffusion_jax.data.voice import HOP as HOP
from diffusion_jax.errors import invalid
from diffusion_jax.typing import Numbers

_HEAD, _MOUTH, _EYE = 0.36, (0.42, 0.22), 0.13
"""Mean radius of the head in image sides; of the mouth half its width and its largest half height, and the radius of an
eye, in radii of the head."""
_MOUTH_AT, _EYES_AT = 0.45, (0.38, 0.28)
"""How far the mouth is below, the eyes beside and above the middle of the head, in its half axes."""


class Face(NamedTuple):
    """Who is shown and how the head moves.

    hue: of the head, in [0, 1). aspect: width by height of the head. bob: amplitude in image sides, frequency in Hz and
    phase, for x and y.
    """

    hue: float
    aspect: float
    bob: tuple[tuple[float, float, float], tuple[float, float, float]]


class Reading(NamedTuple):
    """What the verifier sees in each frame of clips `[N, F, ...]`.

    colour: of the head, as light in [0, 1]. position: of the head's middle (x, y). residual: root mean square of what
    the drawing with these values leaves unexplained, in units of light; a frame with more than 0.1 shows no such face.
    """

    opening: Float[np.ndarray, "N F"]
    aspect: Float[np.ndarray, "N F"]
    colour: Float[np.ndarray, "N F 3"]
    position: Float[np.ndarray, "N F 2"]
    residual: Float[np.ndarray, "N F"]


class Speakers(NamedTuple):
    """People at rest `[N, size, size, 3]`, their waveforms `[N, samples]`, and their mouths' opening `[N, frames]`."""

    portraits: Float[np.ndarray, "N size size 3"]
    waveform: Float[np.ndarray, "N samples"]
    opening: Float[np.ndarray, "N frames"]


@dataclasses.dataclass(frozen=True)
class TalkingFaces:
    """A source of clips, rendered when they are asked for; see `talking_faces`."""

    split: str
    length: int
    size: int
    frames: int
    seed: int

    def __post_init__(self):
        check_split(self.split)
        if not 16 <= self.size <= 128:
            raise invalid("size", self.size, "portraits have between 16 and 128 pixels a side")
        if self.length < 1 or self.frames < 1 or self.seed < 0:
            values = (self.length, self.frames, self.seed)
            raise invalid("length, frames, seed", values, "the first two must be positive and seed not negative")

    @property
    def name(self) -> str:
        return f"talking_faces/{self.split}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, self.size, self.size, 3)

    def __len__(self) -> int:
        return self.length

    def face(self, index: int) -> Face:
        """Who example `index` shows."""
        return draw_face(self._rng(index, 0))

    def speech(self, index: int) -> Speech:
        """What is said in example `index`, and how far the mouth opens."""
        return draw_speech(self._rng(index, 1), self.frames)

    def speakers(self, indices: Indices) -> "Speakers":
        """The examples at `indices`, without their clips."""
        waveforms, openings = zip(*(self.speech(int(index)) for index in indices), strict=True)
        portraits = reference_pictures([self.face(int(index)) for index in indices], self.size)
        return Speakers(portraits, np.stack(waveforms), np.stack(openings))

    def __getitem__(self, index: int) -> dict:
        return jax.tree.map(lambda leaf: leaf[0], self.take([index]))

    def take(self, indices: Indices) -> dict:
        """The clips at `indices`, stacked."""
        faces = [self.face(int(index)) for index in indices]
        speeches = [self.speech(int(index)) for index in indices]
        clips = render(faces, np.stack([speech.opening for speech in speeches]), self.size)
        audio = log_mel(np.stack([speech.waveform for speech in speeches]))
        return {"x0": clips, "cond": {"audio": audio, "reference": reference_pictures(faces, self.size)}}

    def _rng(self, index, purpose):
        if not 0 <= index < self.length:
            raise IndexError(index)
        # One stream per split and seed: continuous draws of independent streams are disjoint.
        return np.random.default_rng((self.seed, ("train", "test").index(self.split), index, purpose))


def talking_faces(
    split: str = "train", length: int = 20_000, size: int = 24, frames: int = 8, seed: int = 0
) -> TalkingFaces:
    """Clips `[frames, size, size, 3]` in [-1, 1] at 25 frames a second, and what drives them.

    cond: "audio" `[frames, 16]`, the log-mel features of each frame's sound, and "reference" `[size, size, 3]`, the
    same person in the middle with the mouth shut.
    length: number of clips. frames: any number; the first frames of a clip do not depend on it.
    `source.face(i)` and `source.speech(i)` are the truth of clip i.
    """
    return TalkingFaces(split, length, size, frames, seed)


def draw_face(rng: np.random.Generator) -> Face:
    """A person: any hue, heads from tall to broad, a slow bob of at most 0.05 image sides."""
    u = rng.random(8)
    across, along = ((0.05 * u[i], 0.3 + 0.5 * u[i + 1], 2 * np.pi * u[i + 2]) for i in (2, 5))
    return Face(u[0], 0.75 + 0.5 * u[1], (across, along))


def positions(faces: list[Face], frames: int) -> Float[np.ndarray, "N frames 2"]:
    """Where each head is in each frame."""
    bob = np.array([face.bob for face in faces])[:, None]
    time = np.arange(frames)[None, :, None] / FRAME_RATE
    return bob[..., 0] * np.sin(2 * np.pi * bob[..., 1] * time + bob[..., 2])


def colours(faces: list[Face]) -> Float[np.ndarray, "N 3"]:
    """The light of each head, in [0, 1]: full value, saturation 0.7."""
    hue = np.array([face.hue for face in faces])[:, None]
    wheel = np.clip(np.abs((6 * hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return 1 - 0.7 * (1 - wheel)


def render(
    faces: list[Face], opening: Float[np.ndarray, "N frames"], size: int = 24
) -> Float[np.ndarray, "N frames size size 3"]:
    """The clips in [-1, 1]: a head in its colour, eyes and mouth black like what is around it."""
    frames = opening.shape[1]
    aspect = np.log([face.aspect for face in faces])
    aspect = np.broadcast_to(aspect[:, None, None], (len(faces), frames, 1))
    values = np.concatenate([positions(faces, frames), aspect, opening[..., None]], axis=-1).astype(np.float32)
    cover = np.asarray(_draw(values, size))[..., None]
    return 2 * cover * colours(faces)[:, None, None, None].astype(np.float32) - 1


def reference_pictures(faces: list[Face], size: int = 24) -> Float[np.ndarray, "N size size 3"]:
    """Everybody in the middle with the mouth shut."""
    still = [face._replace(bob=((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))) for face in faces]
    return render(still, np.zeros((len(faces), 1), np.float32), size)[:, 0]


def _axes(log_aspect):
    """Half axes of a head, in image sides: the area does not depend on the aspect."""
    return _HEAD * jnp.exp(0.5 * log_aspect), _HEAD * jnp.exp(-0.5 * log_aspect)


def _frame(values, size):
    """Offsets `[..., 1, size]`, `[..., size, 1]` of pixels from the head's middle, and its half axes, in pixels."""
    x, y, log_aspect = (values[..., i, None, None] for i in range(3))
    grid = jnp.arange(size) + 0.5 - size / 2
    a, b = _axes(log_aspect)
    return grid - x * size, grid[:, None] - y * size, a * size, b * size


@partial(jax.jit, static_argnames="size")
def _draw(values: Float[Array, "*B 4"], size: int) -> Float[Array, "*B size size"]:
    """The head's coverage of each pixel, without eyes and mouth; values are x, y, log aspect and opening."""
    u, v, a, b = _frame(values, size)
    radius = _HEAD * size
    head = _ellipse(u, v, a, b)
    eyes = _ellipse(jnp.abs(u) - _EYES_AT[0] * a, v + _EYES_AT[1] * b, _EYE * radius, _EYE * radius)
    # The mouth is cut column by column, so that its area grows in proportion to its height, however thin it is.
    height = (0.03 + _MOUTH[1] * jnp.maximum(values[..., 3, None, None], -0.1)) * radius
    half = height * jnp.sqrt(jnp.maximum(1 - (u / (_MOUTH[0] * a)) ** 2, 1e-6))
    below = v - _MOUTH_AT * b
    mouth = jnp.clip(jnp.minimum(below + 0.5, half) - jnp.maximum(below - 0.5, -half), 0, 1)
    return head * (1 - eyes) * (1 - mouth)


def _ellipse(u, v, a, b):
    """Coverage of pixels by an ellipse, from the first-order distance to it."""
    k = jnp.sqrt((u / a) ** 2 + (v / b) ** 2 + 1e-8)
    distance = k * (k - 1) / jnp.sqrt((u / a**2) ** 2 + (v / b**2) ** 2 + 1e-8)
    return jnp.clip(0.5 - distance, 0, 1)


def read(clips: Numbers) -> Reading:
    """Reads clips `[N, F, S, S, 3]` in [-1, 1]: the values with which the renderer comes closest to each frame.

    Damped Gauss-Newton steps from the moments of the light, the colour being the best for the current drawing.
    """
    clips = np.asarray(clips, np.float32)
    if clips.ndim != 5 or clips.shape[2] != clips.shape[3] or clips.shape[4] != 3:
        raise invalid("clips.shape", clips.shape, "the verifier reads square colour clips [N, F, size, size, 3]")
    frames = np.clip((clips.reshape(-1, *clips.shape[2:]) + 1) / 2, 0, 1)
    # Chunks of one length are compiled once; the last is filled up.
    chunk = min(1024, 1 << (len(frames) - 1).bit_length())
    parts = []
    for i in range(0, len(frames), chunk):
        part = frames[i : i + chunk]
        parts.append(jax.device_get(_fit(np.pad(part, ((0, chunk - len(part)), (0, 0), (0, 0), (0, 0))))))
    values, colour, residual = (np.concatenate(p)[: len(frames)] for p in zip(*parts, strict=True))
    fields = (values[:, 3], np.exp(values[:, 2]), colour, values[:, :2], residual)
    return Reading(*(field.reshape(*clips.shape[:2], *field.shape[1:]) for field in fields))


@jax.jit
@jax.vmap
def _fit(light):
    size = light.shape[0]
    grid = (jnp.arange(size) + 0.5) / size - 0.5
    grey = light.sum(-1) + 1e-6
    total = grey.sum()
    x, y = grey.sum(0) @ grid / total, grey.sum(1) @ grid / total
    spread_x, spread_y = grey.sum(0) @ (grid - x) ** 2, grey.sum(1) @ (grid - y) ** 2
    log_aspect = jnp.clip(0.5 * jnp.log(spread_x / spread_y), -0.4, 0.4)
    # Sensible steps: a pixel, a tenth of the aspect, a tenth of the opening.
    scale = jnp.array([1 / size, 1 / size, 0.1, 0.1])
    low, high = jnp.array([-0.3, -0.3, -0.6, -0.1]), jnp.array([0.3, 0.3, 0.6, 1.4])

    def colour_of(drawn):
        return (drawn[..., None] * light).sum((0, 1)) / ((drawn**2).sum() + 1e-6)

    def body(_, values):
        drawn = _draw(values, size)
        colour = colour_of(drawn)
        wanted = light @ colour / (colour @ colour + 1e-6)
        jacobian = jax.jacfwd(lambda z: _draw(values + scale * z, size))(jnp.zeros(4)).reshape(-1, 4)
        gradient = jacobian.T @ (wanted - drawn).reshape(-1)
        move = jnp.linalg.solve(jacobian.T @ jacobian + 1e-2 * jnp.eye(4), gradient)
        return jnp.clip(values + scale * jnp.clip(move, -1.5, 1.5), low, high)

    values = jax.lax.fori_loop(0, 10, body, jnp.stack([x, y, log_aspect, 0.3]))
    drawn = _draw(values, size)
    colour = colour_of(drawn)
    return values, colour, jnp.sqrt(((light - drawn[..., None] * colour) ** 2).mean())


def _windows(frames, window):
    if not 1 <= window <= frames:
        raise invalid("window", window, f"it must lie in 1 .. {frames}, the number of frames")
    return frames // window


def sync(reading: Reading, opening: Float[np.ndarray, "N F"], window: int | None = None) -> Float[np.ndarray, "N W"]:
    """Correlation of the measured with the true opening over consecutive windows of frames (all frames when None).

    0 where the mouth stands still, nan where the voice is silent throughout.
    """
    frames = opening.shape[1]
    length = frames if window is None else window
    count = _windows(frames, length)
    a, b = (
        np.asarray(x, np.float64)[:, : count * length].reshape(len(x), count, length)
        for x in (reading.opening, opening)
    )
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    size_a, size_b = np.sqrt((a**2).sum(-1)), np.sqrt((b**2).sum(-1))
    correlation = (a * b).sum(-1) / np.maximum(size_a * size_b, 1e-9)
    return np.where(size_b < 1e-3, np.nan, correlation)


def identity_error(reading: Reading, reference: Numbers) -> dict[str, np.ndarray]:
    """How far each frame is from the person in the reference pictures `[N, S, S, 3]`, each `[N, F]`.

    colour: distance of the heads' light. shape: absolute difference of the logarithms of their aspects.
    """
    wanted = read(np.asarray(reference)[:, None])
    return {
        "colour": np.linalg.norm(reading.colour - wanted.colour, axis=-1),
        "shape": np.abs(np.log(reading.aspect / wanted.aspect)),
    }


def flicker(clips: Numbers, reading: Reading) -> Float[np.ndarray, "N steps"]:
    """Mean absolute change, in light, from frame to frame where nothing should change: `[N, F - 1]`.

    These are pixels that lie, in both frames, inside the head and off eyes and mouth, or off the head. A head that bobs
    smoothly does not count, nor does the mouth; on true clips it is 0.
    """
    clips = np.asarray(clips, np.float32)
    size = clips.shape[2]
    values = np.concatenate([reading.position, np.log(reading.aspect)[..., None]], axis=-1)
    flat = np.asarray(_flat(values, size))
    both = (flat[:, 1:] & flat[:, :-1]).astype(np.float32)
    change = np.abs(np.diff(clips, axis=1)).mean(-1) / 2
    return (change * both).sum((2, 3)) / np.maximum(both.sum((2, 3)), 1)


@partial(jax.jit, static_argnames="size")
def _flat(values, size):
    u, v, a, b = _frame(values, size)
    radius = _HEAD * size
    outwards = _ellipse(u, v, a + 1, b + 1), _ellipse(u, v, a - 1, b - 1)
    mouth = (jnp.abs(u) < _MOUTH[0] * a + 1) & (jnp.abs(v - _MOUTH_AT * b) < (0.05 + _MOUTH[1]) * radius + 1.5)
    eyes = (jnp.abs(jnp.abs(u) - _EYES_AT[0] * a) < _EYE * radius + 1.5) & (
        jnp.abs(v + _EYES_AT[1] * b) < _EYE * radius + 1.5
    )
    return (outwards[0] <= 0) | ((outwards[1] >= 1) & ~mouth & ~eyes)


def portrait_measures(clips: Numbers, opening: Float[np.ndarray, "N F"], reference: Numbers) -> dict[str, np.ndarray]:
    """Of each clip, means over its frames `[N]`: sync, colour and shape (`identity_error`), flicker, residual."""
    reading = read(clips)
    errors = {name: error.mean(1) for name, error in identity_error(reading, reference).items()}
    still = {"flicker": flicker(clips, reading).mean(1), "residual": reading.residual.mean(1)}
    return {"sync": sync(reading, opening)[:, 0], **errors, **still}


def measures_over_time(
    latents: Numbers, decode: Callable[[Any], Any], people: Speakers, count: int, window: int
) -> dict[str, np.ndarray]:
    """`portrait_measures` of long clips as functions of time `[count]`, means over clips.

    latents: `[N, F, ...]`, of which `count` windows of so many frames, equally spaced from the first frame to the last,
    are decoded to pixels and read. people: of the clips, F frames long.
    """
    latents, frames = np.asarray(latents), people.opening.shape[1]
    _windows(frames, window)
    cut = np.linspace(0, frames - window, count).astype(int)[:, None] + np.arange(window)
    clips = np.asarray(decode(latents[:, cut].reshape(-1, window, *latents.shape[2:])))
    reference = np.repeat(people.portraits, count, axis=0)
    found = portrait_measures(clips, people.opening[:, cut].reshape(-1, window), reference)
    return {name: np.nanmean(values.reshape(-1, count), axis=0) for name, values in found.items()}


def verify(clips: Numbers, opening: Float[np.ndarray, "N F"], reference: Numbers) -> dict[str, float]:
    """Means over clips of `portrait_measures`; clips whose voice is silent throughout have no sync."""
    return {name: float(np.nanmean(values)) for name, values in portrait_measures(clips, opening, reference).items()}
