"""Inception-v3 in the variant that the Fréchet inception distance is defined with, loaded from a local file.

The architecture is that of TensorFlow's 2015 model as pytorch-fid writes it (Szegedy et al. 2016; Heusel et al. 2017):
average pools leave the padding out, and the last block pools by maximum. Weights come from a safetensors or NPZ file
with torch's names (`Mixed_5b.branch1x1.conv.weight`, `[O, I, H, W]`); nothing is downloaded.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import reading
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.arrays import signed_images


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation with stored statistics (epsilon 0.001), ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x):
        padding = [(p, p) for p in self.padding]
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, self.kernel, strides, padding=padding, use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _square(features, size, stride=1, padding=0, *, name):
    return _Conv(features, (size, size), stride, (padding, padding), name=name)


def _row(features, size, *, name):
    return _Conv(features, (1, size), padding=(0, size // 2), name=name)


def _column(features, size, *, name):
    return _Conv(features, (size, 1), padding=(size // 2, 0), name=name)


def _average(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


class _A(nn.Module):
    pool: int

    @nn.compact
    def __call__(self, x):
        five = _square(48, 1, name="branch5x5_1")(x)
        five = _square(64, 5, padding=2, name="branch5x5_2")(five)
        double = _square(64, 1, name="branch3x3dbl_1")(x)
        double = _square(96, 3, padding=1, name="branch3x3dbl_2")(double)
        double = _square(96, 3, padding=1, name="branch3x3dbl_3")(double)
        pooled = _square(self.pool, 1, name="branch_pool")(_average(x))
        return _join(_square(64, 1, name="branch1x1")(x), five, double, pooled)


class _B(nn.Module):
    @nn.compact
    def __call__(self, x):
        double = _square(64, 1, name="branch3x3dbl_1")(x)
        double = _square(96, 3, padding=1, name="branch3x3dbl_2")(double)
        double = _square(96, 3, 2, name="branch3x3dbl_3")(double)
        return _join(_square(384, 3, 2, name="branch3x3")(x), double, nn.max_pool(x, (3, 3), (2, 2)))


class _C(nn.Module):
    middle: int

    @nn.compact
    def __call__(self, x):
        c = self.middle
        seven = _Conv(c, name="branch7x7_1")(x)
        seven = _row(c, 7, name="branch7x7_2")(seven)
        seven = _column(192, 7, name="branch7x7_3")(seven)
        double = _Conv(c, name="branch7x7dbl_1")(x)
        double = _column(c, 7, name="branch7x7dbl_2")(double)
        double = _row(c, 7, name="branch7x7dbl_3")(double)
        double = _column(c, 7, name="branch7x7dbl_4")(double)
        double = _row(192, 7, name="branch7x7dbl_5")(double)
        pooled = _Conv(192, name="branch_pool")(_average(x))
        return _join(_Conv(192, name="branch1x1")(x), seven, double, pooled)


class _D(nn.Module):
    @nn.compact
    def __call__(self, x):
        three = _Conv(192, name="branch3x3_1")(x)
        three = _square(320, 3, 2, name="branch3x3_2")(three)
        seven = _Conv(192, name="branch7x7x3_1")(x)
        seven = _row(192, 7, name="branch7x7x3_2")(seven)
        seven = _column(192, 7, name="branch7x7x3_3")(seven)
        seven = _square(192, 3, 2, name="branch7x7x3_4")(seven)
        return _join(three, seven, nn.max_pool(x, (3, 3), (2, 2)))


class _E(nn.Module):
    pool: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        three = _Conv(384, name="branch3x3_1")(x)
        three = _join(_row(384, 3, name="branch3x3_2a")(three), _column(384, 3, name="branch3x3_2b")(three))
        double = _Conv(448, name="branch3x3dbl_1")(x)
        double = _square(384, 3, padding=1, name="branch3x3dbl_2")(double)
        double = _join(_row(384, 3, name="branch3x3dbl_3a")(double), _column(384, 3, name="branch3x3dbl_3b")(double))
        pooled = _Conv(192, name="branch_pool")(self.pool(x))
        return _join(_Conv(320, name="branch1x1")(x), three, double, pooled)


def _maximum(x):
    return nn.max_pool(x, (3, 3), padding="SAME")


class InceptionV3(nn.Module):
    """Images `[B, 299, 299, 3]` in [-1, 1] to (features `[B, 2048]`, logits `[B, 1008]` or None without classifier)."""

    classifier: bool = True

    @nn.compact
    def __call__(self, x):
        x = _square(32, 3, 2, name="Conv2d_1a_3x3")(x)
        x = _square(32, 3, name="Conv2d_2a_3x3")(x)
        x = _square(64, 3, padding=1, name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = _square(80, 1, name="Conv2d_3b_1x1")(x)
        x = _square(192, 3, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _A(pool, name=name)(x)
        x = _B(name="Mixed_6a")(x)
        for name, middle in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _C(middle, name=name)(x)
        x = _D(name="Mixed_7a")(x)
        x = _E(_average, name="Mixed_7b")(x)
        x = _E(_maximum, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(1008, name="fc")(features) if self.classifier else None


@functools.lru_cache(maxsize=2)
def abstract_variables(classifier: bool = True) -> Any:
    """Shapes of the network's variables, without computing any."""
    shape = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return jax.eval_shape(InceptionV3(classifier).init, jax.random.key(0), shape)


_LEAVES = {
    ("conv", "kernel"): "conv.weight",
    ("bn", "scale"): "bn.weight",
    ("bn", "bias"): "bn.bias",
    ("bn", "mean"): "bn.running_mean",
    ("bn", "var"): "bn.running_var",
    ("fc", "kernel"): "fc.weight",
    ("fc", "bias"): "fc.bias",
}


CONVERT = (
    "pytorch-fid's file, pt_inception-2015-12-05-6726825d.pth, is needed, converted once where torch is installed: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'inception.safetensors')."
)


SPATIAL = ("Mixed_6d", "branch1x1"), 7
"""The module, and how many of its channels, that the spatial Fréchet distance is defined by (Nash et al. 2021)."""


def from_torch(tensors: Mapping[str, np.ndarray]) -> Any:
    """Variables of `InceptionV3` from arrays by torch's names; without `fc.*` when the file has no classifier.

    Raises InvalidInput, naming the array, when one is missing or has another shape.
    """
    abstract = abstract_variables("fc.weight" in tensors)

    if "AuxLogits.fc.weight" in tensors or np.shape(tensors.get("fc.weight", ()))[:1] == (1000,):
        raise InvalidInput(
            "These are torchvision's weights of Inception-v3, trained otherwise: the Fréchet inception distance is "
            f"defined with those of 2015. {CONVERT}"
        )

    def convert(path, leaf):
        parts = [entry.key for entry in path[1:]]
        name = ".".join([*parts[:-2], _LEAVES[tuple(parts[-2:])]])
        if name not in tensors:
            raise InvalidInput(f"The weights of Inception-v3 lack {name!r}. {CONVERT}")
        value = np.asarray(tensors[name], np.float32)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if value.shape != leaf.shape:
            raise invalid(f"shape of {name!r}", value.shape, f"Inception-v3 needs {leaf.shape} (in JAX's layout)")
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(convert, abstract)


class Inception(NamedTuple):
    """features, logits: images `[N, H, W, 3]` in [-1, 1], any size, to `[N, 2048]` and `[N, 1008]` (on the host).

    Bytes (uint8) are scaled to [-1, 1]; other integers, and floats without a negative value, are refused.
    """

    features: Callable[[Any], np.ndarray]
    logits: Callable[[Any], np.ndarray]


def read_inception(path: str | os.PathLike) -> Any:
    """Variables of `InceptionV3` from a safetensors or NPZ file with pytorch-fid's weights, or a folder with one.

    Raises InvalidInput when the file is missing, of another kind, or does not hold this network.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = inception_file(path)
    if file.suffix == ".npz":
        return from_torch(reading.read_arrays(file))
    try:
        return from_torch(load_file(file))
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{str(file)!r} is not a safetensors file ({error}).") from None


def inception_file(path: str | os.PathLike) -> Path:
    """The file of weights at `path`, which may be the folder that it alone is in."""
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(one for one in file.iterdir() if one.suffix in (".safetensors", ".npz"))
        if len(inside) != 1:
            raise InvalidInput(f"{str(file)!r} holds {len(inside)} safetensors or NPZ files: name the right one.")
        return inside[0]
    if not file.is_file():
        raise InvalidInput(f"The weights of Inception-v3 {str(file)!r} do not exist. {CONVERT}")
    if file.suffix in (".pth", ".pt", ".pkl", ".bin"):
        raise InvalidInput(f"{str(file)!r} is a pickle, which is never opened. {CONVERT}")
    return file


def inception_outputs(variables: Any, images: Any) -> dict[str, Any]:
    """Of images `[B, 299, 299, 3]`, scaled as the network expects: `features [B, 2048]`, `logits [B, 1008]` (where it
    has a classifier), and `spatial [B, 2023]`, the features of the spatial Fréchet distance. Pure."""
    path, channels = SPATIAL

    def kept(module, method):
        return module.path == path

    network = InceptionV3("fc" in variables["params"])
    (features, logits), state = network.apply(variables, images, capture_intermediates=kept, mutable=["intermediates"])
    kept_outputs: Any = state["intermediates"]
    spatial = kept_outputs[path[0]][path[1]]["__call__"][0][..., :channels]
    outputs = {"features": features, "spatial": spatial.reshape(len(images), -1)}
    return outputs if logits is None else {**outputs, "logits": logits}


def inception(path: str, batch_size: int = 64) -> Inception:
    """The feature network of the FID from a file with pytorch-fid's weights (FID, KID, Inception score).

    Images are resized to 299 x 299 bilinearly, without antialiasing, as pytorch-fid does.

    Raises InvalidInput as `read_inception` does.
    """
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "it must be at least 1")
    variables = read_inception(path)

    @jax.jit
    def apply(variables, images):
        shape = (len(images), 299, 299, 3)
        return inception_outputs(variables, jax.image.resize(images, shape, "bilinear", antialias=False))

    def run(images, which):
        images = signed_images("images", images)
        if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            raise invalid("images.shape", images.shape, "Inception-v3 takes colour images [N, H, W, 3]")
        chunks = [apply(variables, images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        if which not in chunks[0]:
            raise InvalidInput(f"{str(path)!r} holds no classifier (fc.weight): there are features but no logits.")
        return np.concatenate([np.asarray(chunk[which]) for chunk in chunks])

    return Inception(lambda images: run(images, "features"), lambda images: run(images, "logits"))
