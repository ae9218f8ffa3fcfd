"""A world of captioned scenes: coloured shapes on black, their captions, and a verifier that reads an image back.

Generator: example i is a scene of one to `max_objects` objects, a function of (seed, split, i). Captioner: names every
object, with its count, or the relation between two. Verifier: `read` recovers the scene from pixels, exactly for
rendered ones and robustly for generated ones, and `score` says which claims of a caption an image keeps.
"""

import dataclasses
import functools
import itertools
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.data.tokenizers import Tokenizer, word_tokenizer
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Numbers

COLOURS = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "purple": (1, -1, 1),
    "cyan": (-1, 1, 1),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.09, "large": 0.16}
"""Radius as a fraction of the image's side."""
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = (*NUMBERS, *SIZES, *COLOURS, *SHAPES, *(f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES), "and")
WORDS = (*WORDS, "left", "right", "of", "above", "below")


class Kind(NamedTuple):
    """What an object is, wherever it stands."""

    size: str
    colour: str
    shape: str


class Object(NamedTuple):
    """An object and the pixel its middle covers; x grows to the right and y downwards."""

    kind: Kind
    x: int
    y: int


Scene = tuple[Object, ...]


class CaptionClaim(NamedTuple):
    """What a caption says: how many of each kind there are, nothing else, and how the first stands to the second."""

    groups: tuple[tuple[int, Kind], ...]
    relation: str | None = None


class Reading(NamedTuple):
    """What the verifier saw: a scene, and the number of blobs that are no object of this world."""

    scene: Scene
    unrecognised: int


def tokenizer() -> Tokenizer:
    """The fixed vocabulary of captions; id 0 is padding."""
    return word_tokenizer(WORDS)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A source of captioned scenes, rendered when they are asked for; see `shapes`."""

    split: str
    length: int
    size: int
    max_objects: int
    seed: int

    def __post_init__(self):
        check_split(self.split)
        if not 24 <= self.size <= 512:
            raise invalid("size", self.size, "scenes have between 24 and 512 pixels a side")
        if not 1 <= self.max_objects <= len(NUMBERS):
            raise invalid("max_objects", self.max_objects, f"it must lie in 1 .. {len(NUMBERS)}")
        if self.length < 1 or self.seed < 0:
            raise invalid("length, seed", (self.length, self.seed), "length must be positive and seed not negative")

    @property
    def name(self) -> str:
        return f"shapes/{self.split}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, 3)

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer()

    @property
    def vocab_size(self) -> int:
        return len(WORDS) + 1

    @property
    def caption_length(self) -> int:
        return 5 * self.max_objects

    def scene(self, index: int) -> Scene:
        """Scene `index`."""
        return self._draw(index)[0]

    def caption(self, index: int) -> str:
        """A true caption of scene `index`."""
        return self._draw(index)[1]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        scene, caption = self._draw(index)
        tokens, mask = encode(caption, self.caption_length)
        return {"x0": render(scene, self.size), "cond": {"tokens": tokens, "tokens_mask": mask}}

    def _draw(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, ("train", "test").index(self.split), index))
        while True:
            scene = draw_scene(rng, self.size, self.max_objects)
            held_out = zlib.crc32(repr((self.size, scene)).encode()) % 8 == 0
            if held_out == (self.split == "test"):
                return scene, describe(scene, rng)


def shapes(split: str = "train", length: int = 20_000, size: int = 32, max_objects: int = 3, seed: int = 0) -> Shapes:
    """Scenes `[size, size, 3]` in [-1, 1] with `cond` `tokens` int32 `[L]` and `tokens_mask` bool `[L]`.

    split: a scene belongs to one split by its hash, so no scene of "test" is ever one of "train".
    length: number of scenes.
    L, the caption length, is `5 * max_objects`; `source.caption(i)` and `source.scene(i)` are the truth of example i.
    """
    return Shapes(split, length, size, max_objects, seed)


def with_presences(source: Shapes) -> ArraySource:
    """The scenes in memory, with `cond` `present` float32 `[24]`: 1 where a thing of that colour and shape is there.

    Kinds are in the order of `COLOURS`, and within one of `SHAPES`.
    """
    kinds = {(colour, shape): i for i, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES))}
    present = np.zeros((len(source), len(kinds)), np.float32)
    images = np.empty((len(source), *source.shape), np.float32)
    for i in range(len(source)):
        scene = source.scene(i)
        images[i] = render(scene, source.size)
        for thing in scene:
            present[i, kinds[thing.kind.colour, thing.kind.shape]] = 1.0
    return ArraySource(images, {"present": present}, source.name)


def encode(caption: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded to `length` and the mask of the real ones."""
    ids = tokenizer().encode(caption)
    if len(ids) > length:
        raise InvalidInput(f"The caption {caption!r} has {len(ids)} words, but there is room for {length}.")
    tokens = np.zeros(length, np.int32)
    tokens[: len(ids)] = ids
    return tokens, np.arange(length) < len(ids)


def draw_scene(rng: np.random.Generator, size: int = 32, max_objects: int = 3) -> Scene:
    """One to `max_objects` objects that do not touch, sorted; a third of the scenes repeats a single kind."""
    count = int(rng.integers(1, max_objects + 1))
    while True:
        kinds = [_draw_kind(rng) for _ in range(count)]
        if rng.random() < 1 / 3:
            kinds = kinds[:1] * count
        scene = []
        for kind in kinds:
            radius = _radius(kind.size, size)
            for _ in range(20):
                x, y = (int(v) for v in rng.integers(radius + 1, size - radius - 1, size=2))
                # A gap of two pixels keeps blobs apart even when a sample is a little soft.
                room = [radius + _radius(other.kind.size, size) + 3 for other in scene]
                if all(max(abs(x - o.x), abs(y - o.y)) >= r for o, r in zip(scene, room, strict=True)):
                    scene.append(Object(kind, x, y))
                    break
        if len(scene) == count:
            return tuple(sorted(scene))


def _draw_kind(rng):
    a, b, c = rng.random(3)
    sizes, colours = tuple(SIZES), tuple(COLOURS)
    return Kind(sizes[int(a * len(sizes))], colours[int(b * len(colours))], SHAPES[int(c * len(SHAPES))])


def _radius(size_name, size):
    return round(SIZES[size_name] * size)


@functools.lru_cache(maxsize=64)
def _mask(shape, radius):
    """The pixels of a shape in a box of side `2 radius + 1`, which every shape fills from edge to edge."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "circle":
        return x**2 + y**2 <= (radius + 0.3) ** 2
    if shape == "square":
        return np.ones_like(x, bool)
    if shape == "triangle":
        return 2 * abs(x) <= y + radius
    return (abs(x) <= radius // 3) | (abs(y) <= radius // 3)


def render(scene: Scene, size: int = 32) -> Float[np.ndarray, "size size 3"]:
    """The scene as an image in [-1, 1], black where nothing stands."""
    image = np.full((size, size, 3), -1.0, np.float32)
    for (size_name, colour, shape), x, y in scene:
        radius = _radius(size_name, size)
        window = image[y - radius : y + radius + 1, x - radius : x + radius + 1]
        window[_mask(shape, radius)] = COLOURS[colour]
    return image


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption that names every object; two different ones are related to each other half of the time.

    Without a generator the caption is the list of groups.
    """
    if rng is not None and len(scene) == 2 and scene[0].kind != scene[1].kind and rng.random() < 0.5:
        first, second = scene if rng.random() < 0.5 else scene[::-1]
        return f"{_phrase(1, first.kind)} {relation(first, second)} {_phrase(1, second.kind)}"
    groups = Counter(thing.kind for thing in scene)
    return " and ".join(_phrase(count, kind) for kind, count in sorted(groups.items()))


def relation(first: Object, second: Object) -> str:
    """How the first object stands to the second, along the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _phrase(count, kind):
    plural = "" if count == 1 else "es" if kind.shape == "cross" else "s"
    return f"{NUMBERS[count - 1]} {kind.size} {kind.colour} {kind.shape}{plural}"


def parse(caption: str) -> CaptionClaim:
    """What a caption claims. Raises InvalidInput for text that is no caption of this world."""
    for name in RELATIONS:
        head, middle, tail = caption.partition(f" {name} ")
        if middle:
            return CaptionClaim((_parse_phrase(head, caption), _parse_phrase(tail, caption)), name)
    return CaptionClaim(tuple(_parse_phrase(part, caption) for part in caption.split(" and ")))


def _parse_phrase(phrase, caption):
    words = phrase.split()
    shape = words[-1].removesuffix("s") if words else ""
    shape = {"crosse": "cross", "cros": "cross"}.get(shape, shape)
    if (
        len(words) != 4
        or words[0] not in NUMBERS
        or words[1] not in SIZES
        or words[2] not in COLOURS
        or shape not in SHAPES
    ):
        raise invalid(
            "caption", caption, "expected groups like 'two small red circles' joined by 'and' or by one relation"
        )
    return NUMBERS.index(words[0]) + 1, Kind(words[1], words[2], shape)


@functools.lru_cache(maxsize=8)
def _templates(size):
    """Every size and shape, one pixel around included, at the nine shifts by at most a pixel."""
    side = 2 * max(_radius(name, size) for name in SIZES) + 5
    middle = side // 2
    # No shift comes first, so that it wins ties.
    shifts = sorted(itertools.product((-1, 0, 1), repeat=2), key=lambda shift: abs(shift[0]) + abs(shift[1]))
    names, masks = [], []
    for size_name in SIZES:
        radius = _radius(size_name, size)
        for shape in SHAPES:
            for shift in shifts:
                canvas = np.zeros((side, side), bool)
                top, left = middle - radius + shift[0], middle - radius + shift[1]
                canvas[top : top + 2 * radius + 1, left : left + 2 * radius + 1] = _mask(shape, radius)
                names.append((size_name, shape, *shift))
                masks.append(canvas)
    return names, np.stack(masks).reshape(len(masks), -1).astype(np.float32)


def read(image: Numbers, min_overlap: float = 0.6) -> Reading:
    """Reads an image `[size, size, 3]` in [-1, 1] back into a scene.

    Each pixel takes the nearest colour of the palette; connected blobs of one colour are compared with every shape and
    size, and taken for the one they overlap most (intersection over union). Blobs below `min_overlap` are counted as
    unrecognised; specks smaller than a third of the smallest object are ignored.
    """
    from scipy import ndimage

    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise invalid("image.shape", image.shape, "the verifier reads square colour images [size, size, 3]")
    size = image.shape[0]
    palette = np.asarray([(-1, -1, -1), *COLOURS.values()], np.float32)
    nearest = ((image[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    names, masks = _templates(size)
    areas = masks.sum(axis=1)
    side = int(np.sqrt(masks.shape[1]))
    scene, unrecognised = [], 0
    for number, colour in enumerate(COLOURS, start=1):
        blobs, _ = ndimage.label(nearest == number)  # pyright: ignore[reportGeneralTypeIssues]: a count with output= alone
        for label, box in enumerate(ndimage.find_objects(blobs), start=1):
            blob = blobs[box] == label
            if 3 * blob.sum() < areas.min():
                continue
            height, width = blob.shape
            if height > side or width > side:
                unrecognised += 1
                continue
            top, left = (side - height) // 2, (side - width) // 2
            canvas = np.zeros((side, side), bool)
            canvas[top : top + height, left : left + width] = blob
            common = masks @ canvas.ravel().astype(np.float32)
            overlap = common / (areas + blob.sum() - common)
            best = int(overlap.argmax())
            if overlap[best] < min_overlap:
                unrecognised += 1
                continue
            size_name, shape, dy, dx = names[best]
            x, y = box[1].start - left + side // 2 + dx, box[0].start - top + side // 2 + dy
            scene.append(Object(Kind(size_name, colour, shape), x, y))
    return Reading(tuple(sorted(scene)), unrecognised)


def verify(image: Numbers, caption: str) -> dict[str, float]:
    """How much of a caption an image keeps, each in [0, 1].

    count: the number of objects is right. attributes: the share of claimed objects that are there, with size, colour
    and shape. relation: the claimed relation holds between them (nan when none is claimed). all: everything holds and
    nothing else is in the image.
    """
    claim, reading = parse(caption), read(image)
    claimed = Counter({kind: count for count, kind in claim.groups})
    seen = Counter(thing.kind for thing in reading.scene)
    total = sum(claimed.values())
    count = float(len(reading.scene) + reading.unrecognised == total)
    attributes = sum((claimed & seen).values()) / total
    related = float("nan")
    if claim.relation is not None:
        (_, first), (_, second) = claim.groups
        pairs = [(a, b) for a in reading.scene if a.kind == first for b in reading.scene if b.kind == second]
        related = float(any(_holds(claim.relation, a, b) for a, b in pairs))
    whole = float(claimed == seen and not reading.unrecognised and related != 0.0)
    return {"count": count, "attributes": attributes, "relation": related, "all": whole}


def _holds(name, first, second):
    return {
        "left of": first.x < second.x,
        "right of": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[name]
