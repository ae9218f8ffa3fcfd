"""Judges: small networks trained on labelled data of any world, whose features measure samples and whose logits read
what they show.

A judge is trained once, in seconds, on a source that names what its examples are (`trained_judge`), and kept as
safetensors under a hash of that data and of its settings; a run that is measured never trains it, so it is
independent. `feature_network` trains those of the worlds that come with the library. The large feature network of the
literature is in `inception`.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import data
from diffusion_jax.cache import cache_folder
from diffusion_jax.data.sources import SPLITS, Source
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.metrics.arrays import labels_within, signed_images
from diffusion_jax.metrics.frechet import frechet_distance
from diffusion_jax.objectives import FeatureSpace
from diffusion_jax.objectives.feature_spaces import Kernel
from diffusion_jax.typing import Numbers

_RECIPE = 2
"""Part of the hash: counts up whenever a change below would train other weights."""

_BATCH = 96


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What determines the weights besides the data."""

    shape: tuple[int, ...]
    outputs: int
    exclusive: bool
    pooled: bool
    features: int
    steps: int
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A trained judge; images `[N, H, W, C]` or vectors `[N, D]` in [-1, 1], as those it was trained on.

    Images of bytes (uint8) are scaled to [-1, 1]; other integers, and images without a negative value, which are in
    [0, 1] or 0 .. 255, are refused.

    target: the entry of `cond` that it reads. exclusive: whether that is one class of several, or what is present.
    held_out: features `[M, features]` of the held-out data. accuracy: on those, the share of examples whose class, or
    of questions "is this present?" whose answer, is right.
    """

    settings: _Settings
    params: Any
    target: str
    held_out: np.ndarray
    accuracy: float

    @property
    def exclusive(self) -> bool:
        """Whether an example is of one class, or has several labels at once."""
        return self.settings.exclusive

    def features(self, images: Numbers) -> np.ndarray:
        """Penultimate features `[N, features]`."""
        return _answers(self.settings, self.params, images)[0]

    def logits(self, images: Numbers) -> np.ndarray:
        """Logits `[N, K]` of the classes, or of the presence of each thing."""
        return _answers(self.settings, self.params, images)[1]


def judge_space(judge: Judge, kernel: Kernel, weight: float = 1.0) -> FeatureSpace:
    """The features of `judge` as a space for `objectives.kernel_matching`, for examples in [-1, 1].

    Measure the result with another judge: a sampler learns whatever pleases the features that it is trained on.
    """
    pooled = judge.settings.pooled
    return FeatureSpace(lambda params, x: _apply(params, x, pooled)[0], kernel, judge.params, weight)


class Judged(NamedTuple):
    """accuracy: share of samples (classes) or of answers (presences) that are read as asked for; nan without labels.
    distance: Fréchet distance of the samples' features to those of the held-out data."""

    accuracy: float
    distance: float


def judged(judge: Judge, images: Numbers, labels: Numbers | None = None) -> Judged:
    """What `judge` says of samples `[N, ...]` and of what was asked for, labels `[N]` or presences `[N, K]`.

    Distances are biased upwards for few samples: compare at equal N.
    """
    features, logits = _answers(judge.settings, judge.params, images)
    accuracy = float("nan") if labels is None else _share_right(judge.settings, logits, np.asarray(labels))
    return Judged(accuracy, frechet_distance(features, judge.held_out))


def trained_judge(
    source: Source,
    held_out: Source,
    *,
    target: str = "label",
    features: int = 64,
    steps: int = 1000,
    pooled: bool | None = None,
    seed: int = 0,
    max_examples: int = 10_000,
) -> Judge:
    """A judge of the world of `source`, trained on it or read from the cache.

    source: examples `{"x0": [H, W, C] or [D], "cond": {target: ...}}` with x0 in [-1, 1]. An integer target is a class
        (cross-entropy), a vector `[K]` of zeros and ones says what is present (a yes or no each).
    held_out: likewise, of which nothing is trained on: gives the judge's own accuracy, and the features that samples
        are compared with.
    features: width of the penultimate layer. steps: updates, of 96 examples each.
    pooled: whether features are maxima over the positions of an image, for what may stand anywhere, or keep the
        positions apart; when None, they are pooled for presences alone.
    max_examples: how many of each source are read, from the first on.

    Convolutions halve the image down to 4 pixels or less; vectors have one hidden layer. The key of the cache is a hash
    of the examples and of all settings. Raises InvalidInput for other shapes of x0 or targets, for examples without
    the target, and for fewer than 96 of them.
    """
    if features < 1 or steps < 1:
        raise invalid("features, steps", (features, steps), "both must be at least 1")
    (x, targets, classes), (x_test, targets_test, classes_test) = (
        _read(one, target, max_examples) for one in (source, held_out)
    )
    exclusive = targets.ndim == 1
    if x_test.shape[1:] != x.shape[1:] or targets_test.shape[1:] != targets.shape[1:]:
        shapes = (x_test.shape[1:], targets_test.shape[1:])
        raise invalid("shapes of held-out x0 and target", shapes, f"those of the source are {x.shape[1:]}")
    if len(x) < _BATCH:
        raise InvalidInput(f"{len(x)} examples are too few to train a judge on: at least {_BATCH} are needed.")
    outputs = max(classes, classes_test) if exclusive else targets.shape[1]
    pooled = not exclusive if pooled is None else pooled
    settings = _Settings(x.shape[1:], outputs, exclusive, pooled and x.ndim == 4, features, steps, seed)
    digest = hashlib.sha256(json.dumps([_RECIPE, dataclasses.asdict(settings)]).encode())
    digest.update(x.tobytes())
    digest.update(targets.tobytes())
    name = re.sub(r"\W", "", str(getattr(source, "name", "data")).split("/")[0]) or "data"
    file = cache_folder() / "judges" / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    params = _load(file, settings)
    if params is None:
        params = _train(settings, x, targets)
        _save(file, params)
    of_test, logits = _answers(settings, params, x_test)
    return Judge(settings, params, target, of_test, _share_right(settings, logits, targets_test))


@functools.cache
def _digits(size):
    return tuple(data.digits(split, size=size) for split in SPLITS)


@functools.cache
def _shapes(size):
    lengths = {"train": 4000, "test": 500}
    return tuple(data.scenes.with_presences(data.shapes(split, n, size)) for split, n in lengths.items())


@functools.cache
def _garments(size):
    lengths = {"train": 10_000, "test": 2000}
    return tuple(data.fashion_mnist(split, size=size, length=n) for split, n in lengths.items())


STEPS = {"digits": 600, "shapes": 1500, "fashion_mnist": 1000}
"""The worlds of `feature_network`, and how long their judges are trained."""

_WORLDS = {
    "digits": lambda size, **settings: trained_judge(*_digits(size or 8), **settings),
    "shapes": lambda size, **settings: trained_judge(*_shapes(size or 32), target="present", **settings),
    "fashion_mnist": lambda size, **settings: trained_judge(*_garments(size or 28), **settings),
}


def feature_network(
    world: str = "digits", size: int | None = None, features: int = 64, steps: int | None = None, seed: int = 0
) -> Judge:
    """`trained_judge` of a world that comes with the library: "digits" (classes) or "shapes" (the presence of each of
    24 kinds, a colour and a shape); or of "fashion_mnist" (classes), where its files are installed.

    size: side of the images; the world's own (8, 32, 28) when None. steps: those of `STEPS` when None.
    """
    if world not in _WORLDS:
        raise unknown("world", world, _WORLDS)
    return _WORLDS[world](size, features=features, steps=STEPS[world] if steps is None else steps, seed=seed)


def _read(source, target, limit):
    """x0 `[N, ...]`, targets `[N]` or `[N, K]`, and how many classes the source has (0 for presences)."""
    count = min(len(source), limit)
    examples = data.stacked_examples(source, range(count))
    if target not in examples.get("cond", {}):
        raise invalid("target", target, "every example must have it in its `cond`")
    x, targets = examples["x0"], np.asarray(examples["cond"][target])
    if isinstance(x, Mapping) or np.ndim(x) not in (2, 4):
        raise invalid("x0.shape", jax.tree.map(np.shape, x), "images [N, H, W, C] or vectors [N, D] were expected")
    x = _in_range("x0", x)
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        classes = getattr(source, "num_classes", None) or int(targets.max()) + 1
        return x, labels_within(targets, count, classes).astype(np.int32), classes
    if targets.ndim != 2 or not np.isin(targets, (0, 1)).all():
        raise invalid(f"cond[{target!r}]", targets[0], "a class (an integer) or zeros and ones [K] were expected")
    return x, targets.astype(np.float32), 0


def _load(file, settings):
    if not file.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        params = {name: jnp.asarray(value) for name, value in load(file.read_bytes()).items()}
        weights = {f"{name}.weight": shape for name, shape in _shapes_of_params(settings).items()}
        biases = {f"{name}.bias": shape[-1:] for name, shape in _shapes_of_params(settings).items()}
        if jax.tree.map(jnp.shape, params) != weights | biases:
            raise ValueError("its arrays have other shapes")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"The cached network {file} is damaged ({error}); it is trained again.", stacklevel=4)
        return None
    return params


def _save(file, params):
    from safetensors.numpy import save

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed, so that a reader never sees half a file and two writers do not mix.
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
            partial.write(save(jax.device_get(params)))
        os.replace(partial.name, file)
    except OSError as error:
        warnings.warn(f"The trained network could not be cached in {file.parent} ({error}).", stacklevel=4)


def _answers(settings, params, images):
    """Features and logits, in batches."""
    images = _in_range("images", images)
    if images.shape[1:] != settings.shape or not len(images):
        raise invalid("images.shape", images.shape, f"the judge takes [N, *{settings.shape}]")
    run = partial(_apply_jit, pooled=settings.pooled)
    batches = [run(params, images[i : i + 512]) for i in range(0, len(images), 512)]
    return tuple(np.concatenate(parts) for parts in zip(*jax.device_get(batches), strict=True))


def _in_range(field, x):
    """Images by the rule of `signed_images`; vectors have no range of their own."""
    return signed_images(field, x) if np.ndim(x) == 4 else np.asarray(x, np.float32)


def _share_right(settings, logits, targets):
    if settings.exclusive:
        return float(np.mean(logits.argmax(1) == labels_within(targets, *logits.shape)))
    if targets.shape != logits.shape or not np.isin(targets, (0, 1)).all():
        raise invalid("labels.shape", targets.shape, f"zeros and ones {logits.shape} were expected")
    return float(np.mean((logits > 0) == (targets > 0.5)))


def _layers(size):
    """(channels, stride) of the convolutions: down to 4 pixels or less, the first at full size for tiny images."""
    halvings = max(1, int(np.ceil(np.log2(size / 4))))
    halved = [(min(32 * 2**i, 96), 2) for i in range(halvings)]
    return halved if size > 16 else [(32, 1), *((channels * 2, stride) for channels, stride in halved)]


def _shapes_of_params(settings):
    *sides, channels = settings.shape
    layers = _layers(max(sides)) if sides else []
    for _, stride in layers:
        sides = [-(-side // stride) for side in sides]
    widths = [channels, *(width for width, _ in layers)]
    weights = {f"conv{i}": (3, 3, *pair) for i, pair in enumerate(itertools.pairwise(widths))}
    positions = 1 if settings.pooled else math.prod(sides)
    weights |= {"hidden": (positions * widths[-1], settings.features), "head": (settings.features, settings.outputs)}
    return weights


def _init(settings):
    weights = _shapes_of_params(settings)
    keys = jax.random.split(jax.random.key(settings.seed), len(weights))
    params = {}
    for key, (name, shape) in zip(keys, weights.items(), strict=True):
        fan_in = math.prod(shape[:-1])
        params[f"{name}.weight"] = jax.random.normal(key, shape) * np.sqrt(2.0 / fan_in)
        params[f"{name}.bias"] = jnp.zeros(shape[-1])
    return params


def _convolve(x, weight, stride):
    """3 x 3 convolution as one matrix product, whose gradient is much faster on a CPU than that of XLA's own."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(taps, axis=-1) @ weight.reshape(-1, weight.shape[-1])


def _apply(params, images, pooled):
    x = 0.5 * (images + 1.0)
    if images.ndim == 4:
        for i, (_, stride) in enumerate(_layers(max(images.shape[1:3]))):
            x = jax.nn.gelu(_convolve(x, params[f"conv{i}.weight"], stride) + params[f"conv{i}.bias"])
        x = x.max(axis=(1, 2)) if pooled else x.reshape(len(x), -1)
    x = x @ params["hidden.weight"] + params["hidden.bias"]
    x = jax.nn.gelu(x)
    return x, x @ params["head.weight"] + params["head.bias"]


_apply_jit = jax.jit(_apply, static_argnames="pooled")


def _train(settings, images, targets):
    images = jnp.asarray(images)
    if settings.exclusive:
        targets = np.eye(settings.outputs, dtype=np.float32)[targets]
    targets = jnp.asarray(targets)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(settings.steps, 4e-3), weight_decay=1e-2)

    def loss(params, key):
        pick, noise = jax.random.split(key)
        rows = jax.random.randint(pick, (_BATCH,), 0, len(images))
        x = images[rows] + 0.2 * jax.random.normal(noise, (_BATCH, *images.shape[1:]))
        logits = _apply(params, x, settings.pooled)[1]
        wanted = targets[rows]
        if settings.exclusive:
            return optax.softmax_cross_entropy(logits, 0.95 * wanted + 0.05 / settings.outputs).mean()
        return optax.sigmoid_binary_cross_entropy(logits, wanted).mean()

    # A loop of dispatched steps, because XLA's CPU backend runs the body of a scan on one thread.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return optax.apply_updates(params, updates), state

    params = _init(settings)
    state = jax.jit(optimizer.init)(params)
    for i in range(settings.steps):
        params, state = step(params, state, jax.random.fold_in(jax.random.key(settings.seed + 1), i))
    return params
