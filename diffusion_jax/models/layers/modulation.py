"""Adaptive normalisation: shift, scale and gate as functions of a conditioning vector, by a matrix of each block
(`Modulation`) or by a table of each block on top of one matrix of the whole network (`TableModulation`).

The vector is `[*prefix, C]` with a prefix of the features' shape, at least `[B]`: one vector per sample, per frame,
per token or per pixel, so vector timesteps reach every block without another code path.
"""

from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.layers.dense import projection


def expand_vector(c, like):
    """Inserts axes before the channels of `c [*prefix, C]` until it broadcasts against `like [*prefix, ..., C']`."""
    return c.reshape(*c.shape[:-1], *(1,) * (like.ndim - c.ndim), c.shape[-1])


def modulate(x, shift, scale):
    """`x (1 + scale) + shift`, each `[*prefix, C]` expanded to `x`."""
    return x * (1 + expand_vector(scale, x)) + expand_vector(shift, x)


def spread(c, lengths: tuple[int, ...]):
    """Vectors of segments `[B, S, C]` as those of their tokens, `[B, sum(lengths), C]`: vector i `lengths[i]` times."""
    parts, first = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        parts.append(jnp.repeat(c[:, first : first + count], length, axis=1))
        first += count
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


class Modulation(nn.Module):
    """`count` vectors `[*prefix, features]` from `silu(c)`, zero at initialisation (adaLN-Zero, Peebles & Xie 2023).

    lengths: where neighbouring tokens share a vector, c is `[B, S, C]` with one a segment; how many tokens each has.
    """

    features: int
    count: int
    dtype: Any = jnp.float32
    lengths: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, c):
        dense = projection(
            self.count * self.features, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="dense"
        )
        vectors = dense(jax.nn.silu(c))
        if self.lengths:
            vectors = spread(vectors, self.lengths)
        return jnp.split(vectors, self.count, axis=-1)


class TableModulation(nn.Module):
    """`count` vectors `[*prefix, features]`: entries of `c [*prefix, K features]` from `first` on, plus a learned table
    (adaLN-single, Chen et al. 2023, section 2.3, PixArt-alpha).

    `c` is modulation already, computed once for all blocks; a block adds `count * features` numbers of its own.
    """

    features: int
    count: int
    dtype: Any = jnp.float32
    first: int = 0

    @nn.compact
    def __call__(self, c):
        init = nn.initializers.normal(self.features**-0.5)
        table = self.param("table", init, (self.count, self.features))
        entries = c.reshape(*c.shape[:-1], -1, self.features)[..., self.first : self.first + self.count, :]
        modulation = (entries + table).astype(self.dtype)
        return [modulation[..., i, :] for i in range(self.count)]
