"""Autoencoders for large images: tile by tile on one device, or in bands of rows over several devices.

Both take an `Autoencoder` and return one with the same functions and parameters. The middle, which attends to all
pixels, is computed whole when tiling; the levels, where almost all memory goes, are tiled or cut.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.distributed import automatic
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.vae import Autoencoder, autoencoder


def tiled(vae: Autoencoder, tile: int = 64, overlap: int = 16) -> Autoencoder:
    """The autoencoder with its levels applied to equal tiles, one after the other in one compiled loop.

    tile, overlap: height and width of a tile, and by how much neighbours overlap at least, in latents.
    Memory is that of one tile and of the result. Images no larger than a tile are computed as without tiles. Beyond,
    two things differ from the plain autoencoder: group norms of the levels see one tile instead of the image, and
    convolutions see zeros beyond a tile's borders; of the latter nothing is left in the outer quarter of an overlap,
    which has no weight, and the blend of the rest hides the seams.
    Raises InvalidInput unless `0 <= overlap < tile`.
    """
    if tile < 1:
        raise invalid("tile", tile, "it must be a positive integer")
    if not 0 <= overlap < tile:
        raise invalid("overlap", overlap, f"it must be at least 0 and less than the tile, {tile}")
    factor = vae.module.factor

    def encoded(levels, x):
        return in_tiles(levels, x, tile, overlap, factor, 1)

    def decoded(levels, h):
        return in_tiles(levels, h, tile, overlap, 1, factor)

    return autoencoder(vae.module, encoded, decoded)


def in_tiles(function: Callable, x: Any, tile: int, overlap: int, unit_in: int, unit_out: int) -> Any:
    """`function` of `x [B, H, W, C]` from its values on overlapping tiles, blended.

    A tile is `tile * unit_in` rows and columns of x, and `tile * unit_out` of the result.
    """
    counts = [size // unit_in for size in x.shape[1:3]]
    sizes = [min(tile, count) for count in counts]
    if sizes == counts:
        return function(x)
    plans = [_plan(count, size, overlap, unit_out) for count, size in zip(counts, sizes, strict=True)]
    (rows, row_weights), (columns, column_weights) = plans
    corners = np.stack(np.meshgrid(np.arange(len(rows)), np.arange(len(columns)), indexing="ij"), -1).reshape(-1, 2)
    rows, columns, row_weights, column_weights = map(jnp.asarray, (rows, columns, row_weights, column_weights))

    def piece(corner):
        start = (0, rows[corner[0]] * unit_in, columns[corner[1]] * unit_in, 0)
        size = (x.shape[0], sizes[0] * unit_in, sizes[1] * unit_in, x.shape[3])
        return function(jax.lax.dynamic_slice(x, start, size))

    def add(result, corner):
        y = piece(corner)
        weight = row_weights[corner[0]][:, None, None] * column_weights[corner[1]][None, :, None]
        start = (0, rows[corner[0]] * unit_out, columns[corner[1]] * unit_out, 0)
        there = jax.lax.dynamic_slice(result, start, y.shape)
        return jax.lax.dynamic_update_slice(result, there + (weight * y).astype(result.dtype), start), None

    like = jax.eval_shape(piece, corners[0])
    height, width = (count * unit_out for count in counts)
    result = jnp.zeros((like.shape[0], height, width, like.shape[3]), like.dtype)
    return jax.lax.scan(add, result, jnp.asarray(corners))[0]


def _plan(count: int, size: int, overlap: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the tiles along an axis start, `[n]`, and the weight of each of their entries, `[n, size * unit]`.

    Weights rise and fall linearly over the inner half of the overlaps; over each entry they add up to one.
    """
    number = 1 if size == count else -(-(count - overlap) // (size - overlap))
    starts = np.round(np.linspace(0, count - size, number)).astype(int)
    places = starts[:, None] * unit + np.arange(size * unit)
    weights = np.ones(places.shape)
    position = np.arange(size * unit) + 0.5
    for left, right in zip(range(number - 1), range(1, number), strict=True):
        shared = (starts[left] + size - starts[right]) * unit
        margin, ramp = shared / 4, max(shared / 2, 1e-9)
        rise = np.clip((position - margin) / ramp, 0.0, 1.0)
        weights[right] *= rise
        weights[left] *= np.where(position >= size * unit - shared, 1.0 - np.roll(rise, size * unit - shared), 1.0)
    total = np.zeros(count * unit)
    np.add.at(total, places, weights)
    return starts, (weights / total[places]).astype(np.float32)


def sharded_rows(vae: Autoencoder, mesh: Mesh, axis: str = "sequence") -> Autoencoder:
    """The autoencoder with the rows of images and latents cut over `axis` of the mesh, for use under `jit`.

    Each device holds a band; XLA exchanges the rows at their borders before each convolution, sums the statistics of
    group norms over all bands, and gathers keys and values of the attention in the middle. Equal to the plain
    autoencoder up to the order of sums. Raises InvalidInput where the rows of the latents do not divide by the bands.
    """
    if axis not in mesh.axis_names:
        raise unknown("axis", axis, mesh.axis_names)
    bands = NamedSharding(automatic(mesh), PartitionSpec(None, axis))
    count, factor = mesh.shape[axis], vae.module.factor

    def in_bands(levels, h):
        return jax.lax.with_sharding_constraint(levels(jax.lax.with_sharding_constraint(h, bands)), bands)

    inner = autoencoder(vae.module, in_bands, in_bands)

    def check(rows):
        if rows % count:
            raise invalid("the number of rows of the latents", rows, f"it must divide by the {count} devices of {axis}")

    def posterior(params, x):
        check(x.shape[1] // factor)
        return inner.posterior(params, x)

    def encode(params, x, key=None):
        check(x.shape[1] // factor)
        return inner.encode(params, x, key)

    def decode(params, latents):
        check(latents.shape[1])
        return inner.decode(params, latents)

    return inner._replace(posterior=posterior, encode=encode, decode=decode)
