"""Spaces of features in which a set of samples is compared with data: pixels, random features, networks of one's own.

A space is a pure function of samples with a kernel. What it holds (weights, a bank of features of data) does not learn.
A discrepancy sees only what its features see: those of a trained network see what people see, random ones whatever a
smooth function may depend on, and the entries themselves, with a polynomial kernel, moments up to its degree.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Condition, Numbers, Params

Kernel = Callable[[Any, Any], Any]
"""`(u [n, d], v [m, d]) -> [n, m]`."""


class FeatureSpace(NamedTuple):
    """Where sets are compared, and how.

    features: `(params, x [B, ...]) -> [B, d]`, differentiable. params: do not learn. weight: of this discrepancy.
    condition: `cond -> [B, k]`, numbers of what a sample was asked for (`paired`), which are appended to its features:
        pairs of sample and condition are compared, and a sample that ignores its condition is seen.
    bank: features `[N, d + k]` of data (`banked`). Each loss then compares with as many random rows of it as there are
        samples, and asks for no features of the data of its batch.
    """

    features: Callable[[Any, Any], Any]
    kernel: Kernel
    params: Any = ()
    weight: float = 1.0
    condition: Callable[[Condition], Any] | None = None
    bank: Any = None

    def describe(self, params: Params, x: Any, cond: Condition) -> Any:
        """Features, and the numbers of the condition, of x `[B, ...]`: `[B, d + k]`, in float32 at least."""
        x = jnp.asarray(x)
        found = self.features(params, x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        if self.condition is None:
            return found
        if cond is None:
            raise InvalidInput("a feature space compares pairs of sample and condition, but the batch has no 'cond'.")
        return jnp.concatenate([found, jnp.asarray(self.condition(cond), found.dtype)], axis=1)


def raw_features(params: Params, x: Any) -> Any:
    """The entries of each example themselves, for data of few dimensions."""
    return x.reshape(x.shape[0], -1)


def raw_space(kernel: Kernel, weight: float = 1.0) -> FeatureSpace:
    """The entries themselves, `raw_features`."""
    return FeatureSpace(raw_features, kernel, weight=weight)


def fourier_space(
    kernel: Kernel, size: int, count: int = 64, bandwidth: float = 1.0, seed: int = 0, weight: float = 1.0
) -> FeatureSpace:
    """Random Fourier features of examples with `size` entries (Rahimi and Recht 2007),

        phi_j(x)  =  sqrt(2) cos(w_j . x + b_j),     w_j ~ N(0, 1 / bandwidth^2),  b_j ~ U(0, 2 pi)             (1)

    for j = 1 .. count. The mean over j of phi_j(x) phi_j(y) estimates `gaussian_kernel((bandwidth,))`.
    Raises InvalidInput for sizes below 1 and a bandwidth that is not positive.
    """
    if size < 1 or count < 1 or not bandwidth > 0:
        raise invalid("size, count, bandwidth", (size, count, bandwidth), "positive numbers are needed")
    rng = np.random.default_rng(seed)
    params = {
        "frequencies": (rng.standard_normal((size, count)) / bandwidth).astype(np.float32),
        "phases": rng.uniform(0.0, 2.0 * np.pi, count).astype(np.float32),
    }

    def features(params, x):
        flat = raw_features((), x)
        if flat.shape[1] != size:
            raise invalid("entries of an example", flat.shape[1], f"the random features were drawn for {size}")
        return np.sqrt(2.0) * jnp.cos(flat @ params["frequencies"] + params["phases"])

    return FeatureSpace(features, kernel, params, weight)


def convolution_space(
    kernel: Kernel, shape: Sequence[int], channels: Sequence[int] = (32, 64), seed: int = 0, weight: float = 1.0
) -> FeatureSpace:
    """The last layer of a convolutional network with random weights, for images of `shape`, `(H, W, C)`.

    Each layer is a 3 x 3 convolution and a GELU; all but the first halve the image. Features are the values of the last
    layer at all positions. They need no labels and no training, and tell textures and strokes apart that pixels one by
    one do not. Raises InvalidInput for what is no image and for no layers.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise invalid("shape", tuple(shape), "that of an image, (H, W, C), is needed")
    if not channels or min(channels) < 1:
        raise invalid("channels", tuple(channels), "one positive number for each layer is needed")
    rng, params, before = np.random.default_rng(seed), [], shape[2]
    for width in channels:
        scale = np.sqrt(2.0 / (9 * before))
        kernel_ = (scale * rng.standard_normal((3, 3, before, width))).astype(np.float32)
        params.append({"kernel": kernel_, "bias": (0.1 * rng.standard_normal(width)).astype(np.float32)})
        before = width

    def features(params, x):
        if x.shape[1:] != tuple(shape):
            raise invalid("the shape of an example", x.shape[1:], f"the random weights were drawn for {tuple(shape)}")
        for i, layer in enumerate(params):
            strides = (1, 1) if i == 0 else (2, 2)
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.gelu(x + layer["bias"])
        return raw_features((), x)

    return FeatureSpace(features, kernel, params, weight)


def standardised(space: FeatureSpace, x0: Numbers, batch_size: int = 256) -> FeatureSpace:
    """`space` with features of mean 0 and deviation 1 over the data x0 `[N, ...]`, so that a kernel's scale fits all.

    Features that do not vary are only centred. A bank is not kept: make it afterwards.
    """
    found = _described(space._replace(condition=None), x0, None, batch_size)
    deviation = found.std(axis=0)
    scale = np.where(deviation > 1e-6, 1.0 / np.maximum(deviation, 1e-6), 1.0).astype(np.float32)
    params = {"inner": space.params, "mean": found.mean(axis=0), "scale": scale}

    def features(params, x):
        return (space.features(params["inner"], x) - params["mean"]) * params["scale"]

    return space._replace(features=features, params=params, bank=None)


def banked(space: FeatureSpace, x0: Numbers, cond: Condition = None, batch_size: int = 256) -> FeatureSpace:
    """`space` with the features of the data x0 `[N, ...]` (and of their conditions) computed once.

    The loss stays without bias, for its rows are a random subset. Raises InvalidInput for fewer than two examples.
    """
    if len(x0) < 2:
        raise invalid("examples of the bank", len(x0), "pairs are compared: two at least are needed")
    return space._replace(bank=_described(space, x0, cond, batch_size))


def _described(space: FeatureSpace, x0: Numbers, cond: Condition, batch_size: int) -> np.ndarray:
    if not len(x0):
        raise InvalidInput("there are no examples to describe: x0 is empty.")
    describe = jax.jit(space.describe)
    parts = []
    for i in range(0, len(x0), batch_size):
        here = jax.tree.map(lambda leaf, i=i: leaf[i : i + batch_size], cond)
        parts.append(jax.device_get(describe(space.params, np.asarray(x0[i : i + batch_size]), here)))
    return np.concatenate(parts)


def paired(space: FeatureSpace, classes: int, scale: float = 1.0, entry: str = "label") -> FeatureSpace:
    """`space` of pairs of sample and class: labels `[B]` of `cond[entry]`, as zeros with `scale` at the label.

    With a Gaussian kernel of bandwidth b, a pair of different classes counts exp(-scale^2 / b^2) times as much.
    Raises InvalidInput for sizes that are not positive and for conditions without the entry.
    """
    if classes < 1 or not scale > 0:
        raise invalid("classes, scale", (classes, scale), "positive numbers are needed")

    def condition(cond):
        if entry not in cond:
            raise invalid(f"cond[{entry!r}]", sorted(cond), "the condition has no such entry")
        return scale * jax.nn.one_hot(cond[entry], classes)

    return space._replace(condition=condition)
