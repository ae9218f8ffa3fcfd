"""Patches of data with any number of axes: images, clips and sequences as tokens, and back.

`patch` has one size for each axis between the batch and the channels: `(2, 2)` for images, `(1, 2, 2)` for clips,
`(1,)` for sequences, whose entries then are the tokens, and `()` for vectors, which are one token.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import invalid


def to_patches(x: Float[Array, "B *axes C"], patch: tuple[int, ...]) -> Float[Array, "B N K"]:
    """Non-overlapping patches in row-major order, `K = prod(patch) C`."""
    batch, *sizes, channels = x.shape
    axes = len(patch)
    split = [size for length, p in zip(sizes, patch, strict=True) for size in (length // p, p)]
    outer, inner = range(1, 2 * axes + 1, 2), range(2, 2 * axes + 1, 2)
    x = x.reshape(batch, *split, channels).transpose(0, *outer, *inner, 2 * axes + 1)
    return x.reshape(batch, math.prod(split[::2]), math.prod(patch) * channels)


def from_patches(
    tokens: Float[Array, "B N K"], patch: tuple[int, ...], sizes: tuple[int, ...]
) -> Float[Array, "B *axes C"]:
    """The inverse of `to_patches` for data whose axes have `sizes`."""
    axes = len(patch)
    grid = [size // p for size, p in zip(sizes, patch, strict=True)]
    x = tokens.reshape(tokens.shape[0], *grid, *patch, -1)
    order = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    return x.transpose(0, *order, 2 * axes + 1).reshape(tokens.shape[0], *sizes, -1)


def times_of_patches(
    t: Float[Array, "*prefix"], patch: tuple[int, ...], sizes: tuple[int, ...]
) -> Float[Array, "B *tokens"]:
    """A time per sample `[B]` as it is; a prefix-shaped one, `[B, F]` say, as the mean in each patch, `[B, N]`.

    Raises InvalidInput for a shape that is no prefix of `[B, *sizes]`.
    """
    if t.ndim == 1:
        return t
    if t.ndim > 1 + len(sizes) or t.shape[1:] != tuple(sizes[: t.ndim - 1]):
        raise invalid("t.shape", t.shape, f"data with the axes {tuple(sizes)} takes [B] or times along the first axes")
    whole = jnp.broadcast_to(t.reshape(*t.shape, *(1,) * (1 + len(sizes) - t.ndim)), (t.shape[0], *sizes))
    return to_patches(whole[..., None], patch).mean(axis=-1)
