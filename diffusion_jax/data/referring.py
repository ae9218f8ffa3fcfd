"""A world for perception as painting: shapes at several depths, expressions that refer to one, masks and depth maps.

Example i is a picture and its answer: the mask of the thing that an expression refers to ("segment the red circle left
of the square"), or the map of disparities ("depth"). Nearer things are larger, brighter and hide what is behind them.
The share `ambiguous` of expressions has several referents, of which one was meant: what a correction is for
(`wrongly_marked`). Real disparities are those of the stereo pair that ships inside scikit-image.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from diffusion_jax import pixels
from diffusion_jax.data.photographs import photograph
from diffusion_jax.data.scenes import COLOURS as ALL_COLOURS
from diffusion_jax.data.scenes import RELATIONS, Kind, Object, relation
from diffusion_jax.data.sources import ArraySource, check_split
from diffusion_jax.data.tokenizers import Tokenizer, word_tokenizer
from diffusion_jax.errors import InvalidInput, invalid, unknown

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
TASKS = ("segment", "depth")
WORDS = (*TASKS, "the", *COLOURS, *SHAPES, "left", "right", "of", "above", "below")
LENGTH = 9
"""Words of the longest request."""

NEAREST, FARTHEST = 1.0, 0.1
"""Disparities of the world: of what is nearest, and of the floor at the top of the picture."""


class Thing(NamedTuple):
    """A shape, the pixel of its middle, its radius in pixels, and its disparity: 1 is nearest."""

    colour: str
    shape: str
    x: int
    y: int
    radius: int
    disparity: float


class ReferringScene(NamedTuple):
    """things: the farthest first. picture: `[S, S, 3]` in [-1, 1]. disparity: `[S, S]`. masks: `[n, S, S]`, of what is
    seen of each thing."""

    things: tuple[Thing, ...]
    picture: Float[np.ndarray, "S S 3"]
    disparity: Float[np.ndarray, "S S"]
    masks: Bool[np.ndarray, "n S S"]


@dataclasses.dataclass(frozen=True, eq=False)
class Referring(ArraySource):
    """What an `ArraySource` has, and the truth behind each example: its scene (None for a real picture), the request
    and the thing that was meant (-1 for depth)."""

    scenes: tuple[ReferringScene | None, ...] = ()
    requests: tuple[str, ...] = ()
    meant: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Stereo(ArraySource):
    """What an `ArraySource` has, and the disparity of each patch in pixels of the photograph, `[N, S, S]`."""

    disparity: Any = None


def referring_tokenizer() -> Tokenizer:
    """The fixed vocabulary of requests; id 0 is padding."""
    return word_tokenizer(WORDS)


def encoded_requests(requests: Sequence[str]) -> dict[str, np.ndarray]:
    """`cond` of requests: `tokens` int32 `[N, L]` and `tokens_mask`."""
    tokens = np.zeros((len(requests), LENGTH), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        ids = referring_tokenizer().encode(request)
        row[: len(ids)] = ids
    return {"tokens": tokens, "tokens_mask": tokens != 0}


def referring_scenes(
    split: str = "train",
    length: int = 4000,
    size: int = 16,
    tasks: Sequence[str] = TASKS,
    ambiguous: float | int = 0.25,
    real: float | int = 0.0,
    seed: int = 0,
) -> Referring:
    """Answers `[length, size, size, 1]` in [-1, 1], with `cond` `concat`, the picture, `tokens` and `tokens_mask`.

    tasks: of which each example has one, the word with which its request begins. Masks are 1 on the thing and -1
        elsewhere; disparities go from -1, farthest, to 1.
    ambiguous: the share of expressions that fit several things. real: the share of depth examples that are patches of
        the stereo pair (`stereo_patches`), of the same split.
    The same at every call. Raises InvalidInput for values out of range and unknown tasks.
    """
    check_split(split)
    for task in tasks:
        if task not in TASKS:
            raise unknown("a task", task, TASKS)
    if not tasks or length < 1 or not 12 <= size <= 128:
        raise invalid(
            "tasks, length, size", (tasks, length, size), "a task, an example and 12 to 128 pixels are needed"
        )
    if not (0 <= ambiguous <= 1 and 0 <= real <= 1):
        raise invalid("ambiguous, real", (ambiguous, real), "shares between 0 and 1 are needed")
    return _referring(split, length, size, tuple(tasks), ambiguous, real, seed)


@functools.lru_cache(maxsize=8)
def _referring(split, length, size, tasks, ambiguous, real, seed):
    photographed = stereo_patches(split, size) if real else None
    answers, pictures = np.empty((length, size, size, 1), np.float32), np.empty((length, size, size, 3), np.float32)
    scenes, requests, meant = [], [], []
    for i in range(length):
        rng = np.random.default_rng((seed, ("train", "test").index(split), i))
        task = tasks[int(rng.integers(len(tasks)))]
        if task == "depth" and photographed is not None and rng.random() < real:
            row = photographed.take(int(rng.integers(len(photographed))))
            answers[i], pictures[i] = row["x0"], row["cond"]["concat"]
            scene, request, target = None, task, -1
        else:
            scene, expression, target = _asked(rng, size, task == "segment" and rng.random() < ambiguous)
            request = f"segment {expression}" if task == "segment" else task
            target = target if task == "segment" else -1
            answers[i, ..., 0] = 2.0 * (scene.disparity if target < 0 else scene.masks[target]) - 1.0
            pictures[i] = scene.picture
        scenes.append(scene)
        requests.append(request)
        meant.append(target)
    cond: dict[str, Any] = {"concat": pictures, **encoded_requests(requests)}
    known = {"vocab_size": len(WORDS) + 1, "tokenizer": referring_tokenizer()}
    truth: dict[str, Any] = {"scenes": tuple(scenes), "requests": tuple(requests), "meant": tuple(meant)}
    return Referring(answers, cond, f"referring/{split}", **known, **truth)


def _asked(rng, size, ambiguous):
    """A scene, an expression and the thing that is meant."""
    while True:
        scene = draw_things(rng, size, int(rng.integers(2, 4)), same_shape=ambiguous)
        target = int(rng.integers(len(scene.things)))
        found = expressions(scene, target, ambiguous)
        if found:
            return scene, found[int(rng.integers(len(found)))], target


def draw_things(rng: np.random.Generator, size: int, count: int, same_shape: bool = False) -> ReferringScene:
    """`count` things at different depths, each seen to 60 % at least; with `same_shape` two differ in colour only."""
    while True:
        depths = np.sort(rng.uniform(0.5, NEAREST, count))
        kinds = [(COLOURS[int(rng.integers(4))], SHAPES[int(rng.integers(3))]) for _ in range(count)]
        if same_shape:
            kinds[:2] = [(colour, kinds[0][1]) for colour in rng.permutation(COLOURS)[:2]]
            rng.shuffle(kinds)
        things = []
        for (colour, shape), near in zip(kinds, depths, strict=True):
            radius = round((0.06 + 0.12 * near) * size)
            x, y = (int(v) for v in rng.integers(radius, size - radius, size=2))
            things.append(Thing(str(colour), str(shape), x, y, radius, float(near)))
        scene = render(tuple(things), size)
        whole = [silhouette(thing, size).sum() for thing in things]
        if len(set(kinds)) == count and (scene.masks.sum(axis=(1, 2)) >= 0.6 * np.asarray(whole)).all():
            return scene


def silhouette(thing: Thing, size: int) -> Bool[np.ndarray, "S S"]:
    """The pixels of a thing, hidden or not."""
    y, x = np.mgrid[:size, :size]
    x, y, r = x - thing.x, y - thing.y, thing.radius
    inside = {
        "circle": x**2 + y**2 <= (r + 0.3) ** 2,
        "square": np.maximum(abs(x), abs(y)) <= r,
        "triangle": (2 * abs(x) <= y + r) & (y <= r),
    }
    return inside[thing.shape]


def render(things: Sequence[Thing], size: int) -> ReferringScene:
    """The things on a floor whose disparity rises from the top to the bottom; brightness is disparity."""
    floor = np.linspace(FARTHEST, 0.45, size, dtype=np.float32)[:, None]
    disparity = np.broadcast_to(floor, (size, size)).copy()
    picture = np.repeat((disparity - 1.0)[..., None], 3, axis=2)
    masks = np.zeros((len(things), size, size), bool)
    for i, thing in enumerate(things):
        where = silhouette(thing, size)
        masks[:i] &= ~where
        masks[i], disparity[where] = where, thing.disparity
        colour = np.asarray(ALL_COLOURS[thing.colour], np.float32)
        picture[where] = -1.0 + (colour + 1.0) * (1.6 * thing.disparity - 0.6)
    return ReferringScene(tuple(things), picture.astype(np.float32), disparity, masks)


def name_of(thing: Thing) -> str:
    """ "the red circle": unique in every scene."""
    return f"the {thing.colour} {thing.shape}"


def expressions(scene: ReferringScene, target: int, ambiguous: bool = False) -> list[str]:
    """The expressions that refer to a thing of a scene alone, or, `ambiguous`, to it and to others."""
    thing, found = scene.things[target], []
    for head in (f"the {thing.shape}", name_of(thing)):
        found += [
            head,
            *(f"{head} {_related(thing, other)} {name_of(other)}" for other in scene.things if other != thing),
        ]
    wanted = [expression for expression in found if (len(referents(expression, scene)) > 1) == ambiguous]
    # A relation adds nothing to a name that is unique.
    return [one for one in wanted if len(one.split()) < 6 or not one.startswith(name_of(thing))]


def referents(expression: str, scene: ReferringScene) -> list[int]:
    """The things of a scene that an expression fits. Raises InvalidInput for another text than those of this world."""
    head, way, other = expression, None, ""
    for name in RELATIONS:
        if f" {name} " in expression:
            head, way, other = *expression.split(f" {name} ", 1)[:1], name, expression.split(f" {name} ", 1)[1]
    fitting = [i for i, thing in enumerate(scene.things) if _fits(head, thing)]
    if way is None:
        return fitting
    others = [thing for thing in scene.things if _fits(other, thing)]
    return [i for i in fitting if any(_related(scene.things[i], thing) == way for thing in others)]


def _fits(phrase, thing):
    words = phrase.split()
    if len(words) not in (2, 3) or words[0] != "the" or words[-1] not in SHAPES:
        raise invalid(
            "expression", phrase, "'the circle', 'the red circle' or 'the circle left of the red square' is read"
        )
    return thing.shape == words[-1] and (len(words) == 2 or thing.colour == words[1])


def _related(first, second):
    return relation(*(Object(Kind("", thing.colour, thing.shape), thing.x, thing.y) for thing in (first, second)))


def wrongly_marked(mask: Bool[np.ndarray, "S S"], scene: ReferringScene, meant: int, least: float = 0.3) -> str | None:
    """The judge of a round of correction: the name of the other thing that a mask covers most, or None.

    A thing is marked where at least the share `least` of what is seen of it is covered. None where nothing is, or where
    more of what was meant is covered than of any other.
    """
    covered = (scene.masks & mask).sum(axis=(1, 2)) / np.maximum(scene.masks.sum(axis=(1, 2)), 1)
    most = int(covered.argmax())
    return None if most == meant or covered[most] < least else name_of(scene.things[most])


@functools.lru_cache(maxsize=2)
def stereo_disparity() -> Float[np.ndarray, "H W"]:
    """The disparity in pixels of `photograph("motorcycle")`, measured by structured light; NaN where it is unknown.

    It is of the Middlebury stereo set of 2014 (Scharstein et al.). Raises InvalidInput where scikit-image has it not.
    """
    import skimage.data

    path = Path(skimage.data.__file__).parent / "motorcycle_disp.npz"
    if not path.is_file():
        raise InvalidInput(f"The stereo pair is not inside this version of scikit-image ({path} is missing).")
    with np.load(path) as found:
        disparity = found["arr_0"].astype(np.float32)
    disparity = np.where(np.isfinite(disparity), disparity, np.nan)
    disparity.setflags(write=False)
    return disparity


@functools.lru_cache(maxsize=4)
def stereo_patches(split: str = "train", size: int = 16, downscale: int = 4, stride: int = 2) -> Stereo:
    """Patches of the picture, `cond["concat"]`, and of its disparity `[N, size, size, 1]`, in [-1, 1] patch by patch.

    The disparity goes from -1 at its 2nd percentile to 1 at its 98th, as answers of Marigold do (Ke et al. 2024); where
    it is unknown, in at most 5 % of a patch, the nearest known one stands. Patches that are flat, within 2 pixels, are
    left out. The right quarter is held out.
    """
    check_split(split)
    if min(size, downscale, stride) < 1:
        raise invalid("size, downscale, stride", (size, downscale, stride), "each must be at least 1")
    from scipy import ndimage

    disparity = stereo_disparity()
    unknown_there = np.isnan(disparity)
    nearest: Any = ndimage.distance_transform_edt(unknown_there, return_distances=False, return_indices=True)
    filled = disparity[tuple(nearest)]
    layers = (photograph("motorcycle"), filled[..., None], unknown_there[..., None].astype(np.float32))
    shape = (disparity.shape[0] // downscale, disparity.shape[1] // downscale)
    whole = np.concatenate([pixels.resize(layer, shape) for layer in layers], axis=-1)
    cuts = pixels.cut(whole, size, stride, split)
    cuts = cuts[cuts[..., 4].mean(axis=(1, 2)) <= 0.05]
    low, high = np.percentile(cuts[..., 3], (2, 98), axis=(1, 2))[..., None, None]
    deep = (high - low)[:, 0, 0] >= 2.0
    cuts, low, high = cuts[deep], low[deep], high[deep]
    answers = np.clip(2.0 * (cuts[..., 3] - low) / (high - low) - 1.0, -1.0, 1.0)
    cond = {"concat": np.ascontiguousarray(cuts[..., :3]), **encoded_requests(["depth"] * len(cuts))}
    name, vocabulary = f"stereo/{split}", len(WORDS) + 1
    return Stereo(answers[..., None].astype(np.float32), cond, name, vocab_size=vocabulary, disparity=cuts[..., 3])
