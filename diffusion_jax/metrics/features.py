"""A small network trained here on embedded data, whose features measure samples and whose logits classify them.

It is trained once, in seconds, and cached as safetensors under the hash of its configuration; a run that is measured
never trains it, so it is an independent judge. The large feature network of the literature is in `inception`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import data
from diffusion_jax.cache import cache_folder
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.typing import Numbers

STEPS = {"digits": 600, "shapes": 1500}
"""The worlds that have a judge, and how long it is trained."""

_RECIPE = 1
"""Part of the hash: counts up whenever a change below would train other weights."""


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """What determines the weights, and with that the name of the cached file."""

    world: str
    size: int
    features: int
    steps: int
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A trained judge.

    accuracy: on held-out data; of the class for digits, of each "is there a <colour> <shape>" question for shapes.
    """

    config: FeatureConfig
    params: Any
    accuracy: float

    def features(self, images: Numbers) -> np.ndarray:
        """Penultimate features `[N, features]` of images `[N, size, size, C]` in [-1, 1]."""
        return self._run(images)[0]

    def logits(self, images: Numbers) -> np.ndarray:
        """Digits: class logits `[N, 10]`. Shapes: logits `[N, 24]` of the presence of each (colour, shape)."""
        return self._run(images)[1]

    def _run(self, images):
        images = np.asarray(images, np.float32)
        expected = (self.config.size, self.config.size, _CHANNELS[self.config.world])
        if images.ndim != 4 or images.shape[1:] != expected:
            raise invalid("images.shape", images.shape, f"the {self.config.world} network takes [N, *{expected}]")
        chunks = [_apply_jit(self.params, images[i : i + 512]) for i in range(0, len(images), 512)]
        return tuple(np.concatenate(parts) for parts in zip(*jax.device_get(chunks), strict=True))


_BATCH = 96
_CHANNELS = {"digits": 1, "shapes": 3}


def feature_network(
    world: str = "digits", size: int | None = None, features: int = 64, steps: int | None = None, seed: int = 0
) -> FeatureNetwork:
    """The judge of a world ("digits" or "shapes"), trained on its train split or read from the cache.

    size: side of the images; the world's own (8, 32) when None.
    features: width of the penultimate layer.
    steps: length of the training; that of `STEPS` when None.
    """
    if world not in STEPS:
        raise unknown("world", world, STEPS)
    size = {"digits": 8, "shapes": 32}[world] if size is None else size
    steps = STEPS[world] if steps is None else steps
    if features < 1 or steps < 1:
        raise invalid("features, steps", (features, steps), "both must be at least 1")
    config = FeatureConfig(world, size, features, steps, seed)
    digest = hashlib.sha256(json.dumps([_RECIPE, dataclasses.asdict(config)]).encode()).hexdigest()[:16]
    file = cache_folder() / "features" / f"{world}-{digest}.safetensors"
    cached = _read(file, config)
    if cached is None:
        cached = _train(config)
        _write(file, cached)
    return cached


def _read(file, config):
    if not file.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            accuracy = float(opened.metadata()["accuracy"])
            params = {name: jnp.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        expected = jax.eval_shape(lambda: _init(config))
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
            raise ValueError("its arrays have other shapes")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"The cached network {file} is damaged ({error}); it is trained again.", stacklevel=3)
        return None
    return FeatureNetwork(config, params, accuracy)


def _write(file, network):
    from safetensors.numpy import save

    content = save(jax.device_get(network.params), metadata={"accuracy": repr(network.accuracy)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed, so that a reader never sees half a file and two writers do not mix.
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
            partial.write(content)
        os.replace(partial.name, file)
    except OSError as error:
        warnings.warn(f"The trained network could not be cached in {file.parent} ({error}).", stacklevel=3)


def _layers(size):
    """(channels, stride) of the convolutions: down to 4 pixels or less, the first at full size for tiny images."""
    halvings = max(1, int(np.ceil(np.log2(size / 4))))
    halved = [(min(32 * 2**i, 96), 2) for i in range(halvings)]
    return halved if size > 16 else [(32, 1), *((channels * 2, stride) for channels, stride in halved)]


def _init(config):
    layers = _layers(config.size)
    side = config.size
    for _, stride in layers:
        side = -(-side // stride)
    widths = [channels for channels, _ in layers]
    outputs = len(_targets_of(config.world))
    shapes = {f"conv{i}": (3, 3, a, b) for i, (a, b) in enumerate(zip([_CHANNELS[config.world], *widths], widths))}
    positions = 1 if config.world == "shapes" else side * side
    shapes |= {"hidden": (positions * widths[-1], config.features), "head": (config.features, outputs)}
    keys = jax.random.split(jax.random.key(config.seed), len(shapes))
    params = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        fan_in = int(np.prod(shape[:-1]))
        params[f"{name}.weight"] = jax.random.normal(key, shape) * np.sqrt(2.0 / fan_in)
        params[f"{name}.bias"] = jnp.zeros(shape[-1])
    return params


def _convolve(x, weight, stride):
    """3 x 3 convolution as one matrix product, whose gradient is much faster on a CPU than that of XLA's own."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(taps, axis=-1) @ weight.reshape(-1, weight.shape[-1])


def _apply(params, images):
    x = 0.5 * (images + 1.0)
    for i, (_, stride) in enumerate(_layers(images.shape[1])):
        x = jax.nn.gelu(_convolve(x, params[f"conv{i}.weight"], stride) + params[f"conv{i}.bias"])
    # Shapes stand anywhere, and what matters is whether they do; a digit is what stands where.
    x = x.max(axis=(1, 2)) if images.shape[-1] == _CHANNELS["shapes"] else x.reshape(len(x), -1)
    x = x @ params["hidden.weight"] + params["hidden.bias"]
    x = jax.nn.gelu(x)
    return x, x @ params["head.weight"] + params["head.bias"]


_apply_jit = jax.jit(_apply)


def _targets_of(world):
    if world == "digits":
        return tuple(range(10))
    return tuple((colour, shape) for colour in data.scenes.COLOURS for shape in data.scenes.SHAPES)


@functools.lru_cache(maxsize=4)
def _labelled(world, size, split):
    """Images and 0/1 targets `[N, K]` of a split."""
    if world == "digits":
        source = data.digits(split, size=size)
        return source.x0, np.eye(10, dtype=np.float32)[source.cond["label"]]
    source = data.shapes(split, length=4000 if split == "train" else 500, size=size)
    kinds = {kind: i for i, kind in enumerate(_targets_of(world))}
    targets = np.zeros((len(source), len(kinds)), np.float32)
    images = np.empty((len(source), *source.shape), np.float32)
    for i in range(len(source)):
        scene = source.scene(i)
        images[i] = data.scenes.render(scene, size)
        for thing in scene:
            targets[i, kinds[thing.kind.colour, thing.kind.shape]] = 1.0
    return images, targets


def _train(config):
    images, targets = _labelled(config.world, config.size, "train")
    if len(images) < _BATCH:
        raise InvalidInput(f"{len(images)} images of {config.world} are too few to train on.")
    digits = config.world == "digits"
    images, targets = jnp.asarray(images), jnp.asarray(targets)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(config.steps, 4e-3), weight_decay=1e-2)

    def loss(params, key):
        pick, noise = jax.random.split(key)
        rows = jax.random.randint(pick, (_BATCH,), 0, len(images))
        x = images[rows] + 0.2 * jax.random.normal(noise, (_BATCH, *images.shape[1:]))
        logits = _apply(params, x)[1]
        wanted = targets[rows]
        if digits:
            return optax.softmax_cross_entropy(logits, 0.95 * wanted + 0.005).mean()
        return optax.sigmoid_binary_cross_entropy(logits, wanted).mean()

    # A loop of dispatched steps, because XLA's CPU backend runs the body of a scan on one thread.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return optax.apply_updates(params, updates), state

    params = _init(config)
    state = jax.jit(optimizer.init)(params)
    for i in range(config.steps):
        params, state = step(params, state, jax.random.fold_in(jax.random.key(config.seed + 1), i))
    network = FeatureNetwork(config, params, float("nan"))
    held_out, wanted = _labelled(config.world, config.size, "test")
    logits = network.logits(held_out)
    right = logits.argmax(1) == wanted.argmax(1) if digits else (logits > 0) == (wanted > 0.5)
    return dataclasses.replace(network, accuracy=float(np.mean(right)))
