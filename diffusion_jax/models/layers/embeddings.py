"""Embeddings of times, positions and numbers. Angles are computed in float32 whatever the compute dtype."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from diffusion_jax.errors import invalid


def timestep_embedding(
    t: Float[Array, "*prefix"], features: int, max_period: float = 10000.0, frequency_shift: float = 0.0
) -> Float[Array, "*prefix features"]:
    """`[cos(t w_i), sin(t w_i)]` with `w_i = max_period^(-i / (features / 2 - s))` (Vaswani et al. 2017, section 3.5).

    `t` is what the process feeds the network, of any prefix shape; the usual unit is 1000 t. `features` is even.
    s: `frequency_shift`; at 1 the lowest frequency is 1 / max_period exactly, as in Ho et al. 2020.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """`[*prefix]` to `[*prefix, width]`: sinusoids, then `Dense(silu(Dense(.)))` in float32.

    added: what joins the sinusoids, `[*prefix, features]` or of a prefix that broadcasts to it.
    Float32 throughout: it is a sliver of the compute, and bfloat16 cannot tell neighbouring times apart.
    """

    width: int
    features: int = 256
    frequency_shift: float = 0.0

    @nn.compact
    def __call__(self, t, added=None):
        init = nn.initializers.normal(0.02)
        y = timestep_embedding(t, self.features, frequency_shift=self.frequency_shift)
        if added is not None:
            y = y + added
        y = nn.Dense(self.width, kernel_init=init, name="up")(y)
        return nn.Dense(self.width, kernel_init=init, name="down")(jax.nn.silu(y))


class LookupTable(nn.Module):
    """Integers to learned vectors. A number outside of the table never stands for another one.

    It is refused where numbers are known, and gives NaN in a compiled program, which cannot refuse; `jnp.take` alone
    counts negative ones from the end, where the null class is.
    """

    rows: int
    width: int
    embedding_init: Any = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

    @nn.compact
    def __call__(self, numbers):
        check_numbers(f"the numbers for the table {self.name!r}", numbers, self.rows)
        table = self.param("embedding", self.embedding_init, (self.rows, self.width))
        numbers = jnp.asarray(numbers).astype(jnp.int32)
        return jnp.take(table, jnp.where(numbers < 0, self.rows, numbers), axis=0, mode="fill", fill_value=jnp.nan)


def check_numbers(name: str, numbers: Any, count: int) -> None:
    """Raises InvalidInput where known integers do not lie in 0 .. count - 1; traced ones are not looked at."""
    if isinstance(numbers, Tracer):
        return
    values = np.asarray(numbers)
    if (wrong := values[(values < 0) | (values >= count)]).size:
        raise invalid(name, int(wrong[0]), f"there are {count}, from 0 to {count - 1}")


class VectorEmbedding(nn.Module):
    """`[*prefix, D]` to `[*prefix, width]`: `Dense(silu(Dense(.)))` in float32, as of times."""

    width: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.02)
        y = nn.Dense(self.width, kernel_init=init, name="up")(x)
        return nn.Dense(self.width, kernel_init=init, name="down")(jax.nn.silu(y))


def grid_positions(*sizes: int) -> np.ndarray:
    """Coordinates of a grid in row-major order, `[prod(sizes), len(sizes)]`."""
    axes = np.meshgrid(*(np.arange(size, dtype=np.float32) for size in sizes), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], axis=-1)


def image_positions(rows: int, columns: int, base_size: int = 0, interpolation_scale: float = 1.0) -> np.ndarray:
    """Coordinates `(column, row)` of an image's patches in row-major order, `[rows * columns, 2]`.

    base_size: patches a side for which a network was made: a grid of any other size spans the same coordinates
        0 .. base_size / interpolation_scale. 0 leaves a grid of any size at 0 .. its size / interpolation_scale.
    """
    row, column = grid_positions(rows, columns).T
    spans = [(base_size or size) / size / interpolation_scale for size in (columns, rows)]
    return np.stack([column * spans[0], row * spans[1]], axis=-1).astype(np.float32)


def sincos_positions(positions: np.ndarray, width: int) -> np.ndarray:
    """Fixed sinusoidal embedding `[N, width]` of coordinates `[N, A]`: an equal share of the channels per axis."""
    share = width // positions.shape[1] // 2 * 2
    frequencies = 10000.0 ** (-np.arange(share // 2) / (share // 2))
    parts = []
    for axis in positions.T:
        angles = axis[:, None] * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(parts, axis=-1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1]))).astype(np.float32)


def rotary_angles(positions: np.ndarray, features: int, theta: float = 10000.0) -> np.ndarray:
    """Angles `[N, features / 2]` by which `rotate` turns each pair of channels at coordinates `[N, A]`.

    Su et al. 2021, equation 34, with the pairs shared out equally among the axes; left-over pairs are not turned.
    """
    share = features // 2 // positions.shape[1]
    frequencies = theta ** (-np.arange(share) / max(share, 1))
    angles = np.concatenate([axis[:, None] * frequencies for axis in positions.T], axis=-1)
    return np.pad(angles, ((0, 0), (0, features // 2 - angles.shape[1]))).astype(np.float32)


def rotate(x: Float[Array, "B N H D"], angles: Any) -> Float[Array, "B N H D"]:
    """Turns the pairs `(x_i, x_{i + D/2})` by `angles [N, D / 2]` (or `[B, N, D / 2]`): inner products of queries and
    keys then depend on the difference of their positions only."""
    angles = jnp.asarray(angles, jnp.float32)[..., None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def bicubic_matrix(size: int, out: int, antialias: bool = False) -> Float[np.ndarray, "out size"]:
    """The matrix that resamples `size` values to `out` by cubic convolution (Keys 1981), pixels being areas.

    Without `antialias` the kernel has a = -0.75, spans 4 values and repeats those at the border; with it a = -0.5, the
    kernel widens where the result is smaller, and is cut off and normalised at the border. These are torch's two.
    """
    scale = size / out
    centre = (np.arange(out) + 0.5) * scale
    if not antialias:
        near = np.floor(centre - 0.5)[:, None] + np.arange(-1, 3)
        weights = _cubic(near + 0.5 - centre[:, None], -0.75)
        matrix = np.zeros((out, size))
        rows = np.broadcast_to(np.arange(out)[:, None], near.shape)
        np.add.at(matrix, (rows, np.clip(near, 0, size - 1).astype(int)), weights)
        return matrix.astype(np.float32)
    widened = max(scale, 1.0)
    index = np.arange(size)
    first = np.floor(np.maximum(centre - 2 * widened + 0.5, 0))[:, None]
    last = np.floor(np.minimum(centre + 2 * widened + 0.5, size))[:, None]
    weights = _cubic((index + 0.5 - centre[:, None]) / widened, -0.5) * ((index >= first) & (index < last))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
