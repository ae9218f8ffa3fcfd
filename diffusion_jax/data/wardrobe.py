"""A world of people who try on garments: persons in poses, flat pictures of what they may wear, and a judge.

Generator: example i is a function of (seed, split, i): a person (joints, skin, hair, background) and an outfit of one
to three items out of five categories, each with a cut, a colour and a texture. Renderer: the person wearing any outfit,
the parsing, each item laid flat, and what an editor is given: a mask that hides the clothes of every possible outfit,
with the pose drawn inside. So the same person with two outfits gives one input: nothing leaks, and the picture that an
editor should paint is known for every pair of person and outfit. Verifier: `read` finds colour and texture of the
items where the parsing says that they are, exactly for rendered pictures.

Positions are in pixels of a picture of 32 x 32, y downwards. Textures are printed on the grid of pixels, with a period
of four, and do not bend with the body.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax.data.regions import MIDDLES, SIZE, capsule, trapezoid
from diffusion_jax.data.sources import Indices, check_split
from diffusion_jax.errors import invalid
from diffusion_jax.typing import Numbers

CATEGORIES = ("upper", "lower", "overall", "shoe", "bag")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "yellow": (0.95, 0.8, 0.1),
    "green": (0.1, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.9),
    "purple": (0.6, 0.15, 0.7),
    "black": (0.08, 0.08, 0.1),
}
TEXTURES = ("plain", "rows", "columns", "checks")
"""Plain, or white on the colour in bands of two pixels: lying, standing, or a chequerboard of both."""
CUTS = 2
"""Short or long (upper, lower, overall), low or a boot (shoe), wide or tall (bag)."""
OUTFITS = ((0, 1), (0, 1, 3), (0, 1, 4), (2,), (2, 3), (2, 4), (2, 3, 4))
"""Which categories are worn together."""
CAPACITY = 3
"""Items of the largest outfit."""
_LAYERS = (1, 3, 0, 2, 4)
"""The order in which categories are painted: what comes later covers what came before."""
_BODY = 1
"""Parsing of what belongs to the person; 0 is the background, 2 + category an item."""


class Persons(NamedTuple):
    """N persons. joints: `[N, 13, 2]`, (x, y) of those in `JOINTS`. Light in [0, 1]: skin and hair `[N, 3]`, and the
    background at the left and the right `[N, 2, 3]`."""

    joints: Float[np.ndarray, "N 13 2"]
    skin: Float[np.ndarray, "N 3"]
    hair: Float[np.ndarray, "N 3"]
    background: Float[np.ndarray, "N 2 3"]


class Outfits(NamedTuple):
    """What N persons wear, by category: whether anything, and its cut, colour and texture."""

    worn: Bool[np.ndarray, "N 5"]
    cut: Int[np.ndarray, "N 5"]
    colour: Int[np.ndarray, "N 5"]
    texture: Int[np.ndarray, "N 5"]


JOINTS = ("head", "neck", "hip", *(f"{side} {name}" for side in ("left", "right") for name in
          ("shoulder", "elbow", "hand", "knee", "ankle")))  # fmt: skip
_HEAD, _NECK, _HIP = range(3)
_LEFT, _RIGHT = range(3, 8), range(8, 13)
_BONES = (
    (_NECK, _HIP, (1.0, 0.2, 0.2)),
    (3, 4, (1.0, 0.6, 0.0)), (4, 5, (1.0, 1.0, 0.0)), (8, 9, (0.6, 0.0, 1.0)), (9, 10, (1.0, 0.0, 1.0)),
    (_HIP, 6, (0.0, 0.8, 0.0)), (6, 7, (0.0, 1.0, 0.6)), (_HIP, 11, (0.0, 0.4, 1.0)), (11, 12, (0.0, 0.9, 1.0)),
)  # fmt: skip
"""Pairs of joints and the colour of the line between them in a pose map."""


class Task(NamedTuple):
    """What an editor is given, `cond` of `try_on`; the picture that it should paint, its parsing, and what is worn
    there; and the persons in their own clothes."""

    cond: dict[str, Any]
    truth: Float[np.ndarray, "N 32 32 3"]
    parsing: Int[np.ndarray, "N 32 32"]
    outfits: Outfits
    before: Float[np.ndarray, "N 32 32 3"]


@dataclasses.dataclass(frozen=True)
class TryOn:
    """A source of persons who wear items that are also shown flat; see `try_on`."""

    split: str
    length: int
    seed: int

    def __post_init__(self):
        check_split(self.split)
        if self.length < 1 or self.seed < 0:
            raise invalid("length, seed", (self.length, self.seed), "length must be positive and seed not negative")

    @property
    def name(self) -> str:
        return f"try_on/{self.split}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (SIZE, SIZE, 3)

    def __len__(self) -> int:
        return self.length

    def draw(self, indices: Indices) -> tuple[Persons, Outfits]:
        """Who the examples at `indices` show, and what they wear."""
        return draw_persons(self._uniform(indices, 0, 17)), draw_outfits(self._uniform(indices, 1, 16))

    def __getitem__(self, index: int) -> dict:
        return jax.tree.map(lambda leaf: leaf[0], self.take([index]))

    def take(self, indices: Indices) -> dict:
        """The examples at `indices`, stacked."""
        return dressed_example(*self.draw(indices))

    def tasks(self, indices: Indices) -> dict[str, "Task"]:
        """The persons at `indices`, "paired" with what they wear and "unpaired" with what the next person wears."""
        persons, own = self.draw(indices)
        before, _ = render(persons, own)

        def task(outfits):
            cond = dressed_example(persons, outfits)["cond"]
            return Task(cond, *render(persons, outfits), outfits, before)

        return {"paired": task(own), "unpaired": task(exchanged(own))}

    def _uniform(self, indices, purpose, count):
        which = ("train", "test").index(self.split)
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(index)
        rngs = (np.random.default_rng((self.seed, which, int(index), purpose)) for index in indices)
        return np.stack([rng.random(count) for rng in rngs])


def try_on(split: str = "train", length: int = 20_000, seed: int = 0) -> TryOn:
    """Persons `[32, 32, 3]` in [-1, 1] who wear an outfit, and what an editor is given to paint them.

    cond: "concat" `[32, 32, 4]`, the mask (1 = repaint) and the person with the pose drawn inside the mask;
    "references" `[3, 32, 32, 3]`, the items laid flat, 0 where there are fewer; "items" int32 `[3]`, their categories;
    "present" bool `[3]`. `source.draw(indices)` tells persons and outfits, from which any other pair is made:
    `example(persons, outfits of others)` is the unpaired task with its answer.
    """
    return TryOn(split, length, seed)


def dressed_example(persons: Persons, outfits: Outfits) -> dict:
    """`{"x0", "cond"}` of persons who wear outfits; see `try_on`."""
    image, _ = render(persons, outfits)
    hidden = mask(persons)
    seen = np.where(hidden[..., None], _signed(pose_map(persons)), image)
    concat = np.concatenate([hidden[..., None], seen], axis=-1).astype(np.float32)
    items, present = worn_slots(outfits)
    rows = np.arange(len(items))[:, None]
    flat = flat_lay(items, *(getattr(outfits, name)[rows, items] for name in ("cut", "colour", "texture")))
    flat = np.where(present[..., None, None, None], flat, 0).astype(np.float32)
    return {"x0": image, "cond": {"concat": concat, "references": flat, "items": items, "present": present}}


def worn_slots(outfits: Outfits) -> tuple[Int[np.ndarray, "N 3"], Bool[np.ndarray, "N 3"]]:
    """The worn categories in rising order, filled up with 0, and which of the places are filled."""
    order = np.argsort(~outfits.worn, axis=1, kind="stable")[:, :CAPACITY].astype(np.int32)
    present = np.take_along_axis(outfits.worn, order, axis=1)
    return np.where(present, order, 0).astype(np.int32), present


def exchanged(outfits: Outfits) -> Outfits:
    """The outfits, each put on the next person: with the same persons, the unpaired task."""
    return Outfits(*(np.roll(field, 1, axis=0) for field in outfits))


def repeated_references(cond: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The condition with `count` references a person, all present: those given again and again, and kinds in turn."""
    images, place = np.asarray(cond["references"]), np.arange(count)
    items = np.broadcast_to(place % len(CATEGORIES), (len(images), count)).astype(np.int32)
    given = images[:, place % images.shape[1]]
    return {**cond, "references": given, "items": items, "present": np.ones((len(images), count), bool)}


def draw_persons(u: Float[np.ndarray, "N 17"]) -> Persons:
    """Persons from uniform numbers: where they stand, arms and legs spread, skin, hair and background."""
    middle = SIZE / 2 + 3 * (u[:, 0] - 0.5)
    place = functools.partial(np.stack, axis=-1)
    joints = {_HEAD: place([middle, np.full_like(middle, 4.6)]), _NECK: place([middle, np.full_like(middle, 8.0)])}
    joints[_HIP] = place([middle, np.full_like(middle, 17.5)])
    for side, (shoulder, elbow, hand, knee, ankle), v in ((-1, _LEFT, u[:, 1:4]), (1, _RIGHT, u[:, 4:7])):

        def limb(start, length, angle, side=side):
            return start + length * place([side * np.sin(angle), np.cos(angle)])

        upper = np.radians(15 + 35 * v[:, 0])
        leg = np.radians(4 + 13 * v[:, 2])
        joints[shoulder] = place([middle + side * 3.6, np.full_like(middle, 9.6)])
        joints[elbow] = limb(joints[shoulder], 4.2, upper)
        joints[hand] = limb(joints[elbow], 3.8, upper + np.radians(50 * v[:, 1] - 25))
        hip = joints[_HIP] + np.array([side * 1.9, 0.0])
        joints[knee], joints[ankle] = limb(hip, 5.2, leg), limb(hip, 10.4, leg)
    skin = np.array([0.98, 0.82, 0.7]) * (1 - u[:, 7:8]) + np.array([0.4, 0.26, 0.16]) * u[:, 7:8]
    hair = np.array([0.1, 0.07, 0.05]) * (1 - u[:, 8:9]) + np.array([0.8, 0.65, 0.35]) * u[:, 8:9]
    background = 0.5 + 0.3 * u[:, 9:15].reshape(-1, 2, 3)
    return Persons(np.stack([joints[i] for i in range(len(JOINTS))], axis=1), skin, hair, background)


def draw_outfits(u: Float[np.ndarray, "N 16"]) -> Outfits:
    """Outfits from uniform numbers: each of `OUTFITS` as often as the others, and each look as often as the others."""
    worn = np.zeros((len(OUTFITS), len(CATEGORIES)), bool)
    for row, categories in enumerate(OUTFITS):
        worn[row, list(categories)] = True

    def choice(values, count):
        return (values * count).astype(np.int32)

    return Outfits(
        worn[choice(u[:, 0], len(OUTFITS))],
        choice(u[:, 1:6], CUTS),
        choice(u[:, 6:11], len(COLOURS)),
        choice(u[:, 11:16], len(TEXTURES)),
    )


def looks(colour: Int[np.ndarray, "*N"], texture: Int[np.ndarray, "*N"]) -> Float[np.ndarray, "*N 32 32 3"]:
    """Sheets of cloth, light in [0, 1]."""
    y, x = np.mgrid[:SIZE, :SIZE] // 2 % 2 == 1
    white = np.stack([np.zeros_like(x), y, x, x ^ y])[texture]
    base = np.asarray(list(COLOURS.values()))[colour]
    return np.where(white[..., None], 1.0, base[..., None, None, :])


def render(persons: Persons, outfits: Outfits) -> tuple[Float[np.ndarray, "N 32 32 3"], Int[np.ndarray, "N 32 32"]]:
    """Pictures in [-1, 1], and their parsing: 0 background, 1 the body, 2 + category an item."""
    j = persons.joints
    share = (np.arange(SIZE) / (SIZE - 1))[:, None]
    picture = persons.background[:, :1] * (1 - share) + persons.background[:, 1:] * share
    picture = np.broadcast_to(picture[:, None], (len(j), SIZE, SIZE, 3)).copy()
    parsing = np.zeros(picture.shape[:3], np.int32)

    def paint(region, colour, label):
        np.copyto(picture, colour, where=region[..., None])
        np.copyto(parsing, label, where=region)

    skin = persons.skin[:, None, None]
    paint(_body(j), skin, _BODY)
    regions, cloth = worn_regions(persons, outfits.cut), looks(outfits.colour, outfits.texture)
    for category in _LAYERS:
        paint(regions[:, category] & outfits.worn[:, category, None, None], cloth[:, category], 2 + category)
    head = capsule(j[:, _HEAD], j[:, _HEAD], 3.1)
    paint(head, skin, _BODY)
    paint(head & (MIDDLES[:, None] < j[:, _HEAD, 1, None, None] - 0.6), persons.hair[:, None, None], _BODY)
    return _signed(picture), parsing


def worn_regions(persons: Persons, cut: Int[np.ndarray, "N 5"]) -> Bool[np.ndarray, "N 5 32 32"]:
    """The pixels that an item of each category takes on these persons, before others cover it."""
    j = persons.joints
    long = [cut[:, category] == 1 for category in range(len(CATEGORIES))]
    middle = j[:, _HIP, 0]

    def between(a, b, share):
        return j[:, a] + share[:, None] * (j[:, b] - j[:, a])

    torso = trapezoid(middle, 8.4, 18.4, 4.2, 3.6)
    upper, lower, shoe = torso, trapezoid(middle, 16.6, 19.6, 3.6, 4.0), False
    for shoulder, elbow, hand, knee, ankle in (_LEFT, _RIGHT):
        end = np.where(long[0][:, None], between(elbow, hand, np.full(len(j), 0.7)), j[:, elbow])
        joint = np.where(long[0][:, None], j[:, elbow], between(shoulder, elbow, np.full(len(j), 0.7)))
        end = np.where(long[0][:, None], end, joint)
        upper = upper | capsule(j[:, shoulder], joint, 1.7) | capsule(joint, end, 1.7)
        hip = 2 * j[:, knee] - j[:, ankle]
        lower = lower | capsule(hip, hip + np.where(long[1], 0.9, 0.45)[:, None] * (j[:, ankle] - hip), 2.1)
        foot = j[:, ankle] + np.array([0.0, 0.9])
        shoe = shoe | capsule(foot - np.array([0.9, 0.0]), foot + np.array([0.9, 0.0]), 1.7)
        boot = j[:, ankle] + np.where(long[3], 0.45, 0.0)[:, None] * (j[:, knee] - j[:, ankle])
        shoe = shoe | capsule(j[:, ankle], boot, np.where(long[3], 1.9, 0.0))
    overall = trapezoid(middle, 8.4, 16.0, 4.0, 3.4)
    hem = np.where(long[2], 26.0, 21.0)
    overall = overall | trapezoid(middle, 15.5, hem, 3.4, np.where(long[2], 7.0, 6.0))
    hand = j[:, _RIGHT[2]]
    width, height = np.where(long[4], 2.1, 3.1), np.where(long[4], 5.6, 4.2)
    bag = trapezoid(hand[:, 0], hand[:, 1] + 1.0, hand[:, 1] + 1.0 + height, width, width)
    return np.stack([upper, lower, overall, shoe, bag], axis=1)


def mask(persons: Persons) -> Bool[np.ndarray, "N 32 32"]:
    """Where an editor repaints: the regions of all categories in all cuts, dilated by a pixel, but never the head.

    It depends on the pose alone, so it tells nothing of what was worn.
    """
    from scipy import ndimage

    cuts = (np.full((len(persons.joints), len(CATEGORIES)), cut) for cut in range(CUTS))
    every = np.any([worn_regions(persons, cut).any(axis=1) for cut in cuts], axis=0)
    grown = np.asarray(ndimage.binary_dilation(every, np.ones((1, 3, 3), bool)), bool)
    return grown & ~capsule(persons.joints[:, _HEAD], persons.joints[:, _HEAD], 3.1)


def pose_map(persons: Persons) -> Float[np.ndarray, "N 32 32 3"]:
    """The skeleton, light in [0, 1]: bones in colours of their own on black."""
    picture = np.zeros((len(persons.joints), SIZE, SIZE, 3))
    for a, b, colour in _BONES:
        picture[capsule(persons.joints[:, a], persons.joints[:, b], 0.75)] = colour
    return picture


def flat_lay(
    category: Int[np.ndarray, "*N"],
    cut: Int[np.ndarray, "*N"],
    colour: Int[np.ndarray, "*N"],
    texture: Int[np.ndarray, "*N"],
) -> Float[np.ndarray, "*N 32 32 3"]:
    """Items laid flat on light grey, in [-1, 1]: the same cloth on the outline of the category."""
    return _signed(np.where(_flat_outlines()[category, cut][..., None], looks(colour, texture), 0.85))


@functools.cache
def _flat_outlines() -> Bool[np.ndarray, "5 2 32 32"]:
    def point(x, y):
        return np.array([[x, y]], float)

    def both(a, b, radius):
        """A capsule and its mirror image."""
        region = capsule(point(*a), point(*b), radius)
        return region | region[..., ::-1]

    def middle(*sides):
        return trapezoid(np.array([SIZE / 2]), *sides)

    outlines = [
        [middle(6, 27, 6.5, 6.5) | both((10.5, 8), end, 2.6) for end in ((6, 12), (3.5, 22))],
        [middle(4, 11, 6.5, 7) | both((12, 10), end, 3.2) for end in ((10.5, 16), (8.5, 27))],
        [middle(3, 15, 5, 4.5) | middle(14.5, hem, 4.5, flare) for hem, flare in ((23, 8), (30, 10.5))],
        [both((4, 23), (11.5, 23), 2.8) | both((11, top), (11, 23), 2.6) for top in (23, 12)],
        [
            middle(top, 28, half, half) | (middle(5, top, 5, 5) & ~middle(7, top, 3, 3))
            for top, half in ((15, 11), (11, 7))
        ],
    ]
    return np.concatenate([np.stack(pair, axis=1) for pair in outlines])


class Reading(NamedTuple):
    """What the verifier sees of each category `[N, 5]`, and how far the nearest look is from what it sees, root mean
    square in units of light; meaningless where nothing of the category is to be seen."""

    colour: Int[np.ndarray, "N 5"]
    texture: Int[np.ndarray, "N 5"]
    residual: Float[np.ndarray, "N 5"]


def read(images: Numbers, parsing: Int[np.ndarray, "N 32 32"]) -> Reading:
    """Reads images `[N, 32, 32, 3]` in [-1, 1]: for each category the look that is nearest where `parsing` has it."""
    light = (np.clip(np.asarray(images, np.float64), -1, 1) + 1) / 2
    if light.shape[1:] != (SIZE, SIZE, 3) or parsing.shape != light.shape[:3]:
        raise invalid("images.shape, parsing.shape", (light.shape, parsing.shape), "[N, 32, 32, 3] and [N, 32, 32] fit")
    colour, texture = (index.reshape(-1) for index in np.indices((len(COLOURS), len(TEXTURES))))
    cloth = looks(colour, texture).reshape(len(colour), -1, 3)
    region = (parsing.reshape(len(parsing), 1, -1) == 2 + np.arange(len(CATEGORIES))[:, None]).astype(np.float64)
    flat = light.reshape(len(light), -1, 3)
    count = np.maximum(region.sum(-1), 1)[..., None]
    # |image - look|^2 over the region, expanded so that it is three matrix products.
    squares = np.einsum("ncp,np->nc", region, (flat**2).sum(-1))[..., None]
    crossed = np.einsum("ncp,npi,lpi->ncl", region, flat, cloth, optimize=True)
    own = np.einsum("ncp,lp->ncl", region, (cloth**2).sum(-1), optimize=True)
    error = np.maximum(squares - 2 * crossed + own, 0) / (3 * count)
    best = error.argmin(-1)
    return Reading(colour[best], texture[best], np.sqrt(error.min(-1)))


def correct(reading: Reading, outfits: Outfits) -> dict[str, np.ndarray]:
    """Which worn items `[N, 5]` show the right "colour", "texture", both ("item"): 1 or 0, nan where none is worn."""
    right = {name: getattr(reading, name) == getattr(outfits, name) for name in ("colour", "texture")}
    right["item"] = right["colour"] & right["texture"]
    return {name: np.where(outfits.worn, values.astype(float), np.nan) for name, values in right.items()}


def _body(j):
    """Arms, legs, hands, feet and torso."""
    region = trapezoid(j[:, _HIP, 0], 8.4, 18.5, 3.8, 3.4) | capsule(j[:, _HEAD], j[:, _NECK], 1.2)
    for shoulder, elbow, hand, knee, ankle in (_LEFT, _RIGHT):
        hip = 2 * j[:, knee] - j[:, ankle]
        region |= capsule(j[:, shoulder], j[:, elbow], 1.2) | capsule(j[:, elbow], j[:, hand], 1.2)
        region |= capsule(j[:, hand], j[:, hand], 1.4) | capsule(hip, j[:, ankle], 1.5)
        region |= capsule(j[:, ankle], j[:, ankle] + np.array([0.0, 0.9]), 1.3)
    return region


def _signed(light):
    return (2 * light - 1).astype(np.float32)
