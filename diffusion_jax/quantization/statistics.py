"""Running statistics of a network's inner values, by path and by bucket of the timestep.

Times are cut at ascending edges e_1 < ... < e_(K-1) of the network's own time into K buckets,

    bucket(t)  =  the number of edges at or below t,                                                              (1)

which is a pure lookup (`timesteps.bucket_of`): t may be traced. Of a batch of values x `[B, N, C]` with times t `[B]`,
the samples of bucket k give u_k = mean_b max_n |x[b, n, c]|, and

    a_k  <-  u_k   at the first batch with samples in k,      momentum a_k + (1 - momentum) u_k   afterwards;     (2)

a bucket without samples in this batch stays as it is. Source of (2): ViDiT-Q (Zhao et al. 2025), momentum 0.95.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.timesteps import bucket_of


class ChannelMaxima(NamedTuple):
    """Running maxima (2).

    maxima: by path, `[K, ..., C]` a leaf, where `...` are the stacked layers; zero in a bucket without samples.
    batches: int `[K]`, how many batches had samples in the bucket. samples: int `[K]`, how many samples it had.
    """

    maxima: Any
    batches: Any
    samples: Any


def time_edges(edges: Sequence[float]) -> np.ndarray:
    """The edges `[K - 1]` of K buckets, checked; none is one bucket. Raises InvalidInput unless they ascend."""
    values = np.asarray(edges, np.float32).reshape(-1)
    if not np.all(np.isfinite(values)) or np.any(np.diff(values) <= 0):
        raise invalid("edges", list(edges), "edges of time buckets must be finite and ascend strictly")
    return values


def no_maxima(values: Any, buckets: int) -> ChannelMaxima:
    """The statistics before the first batch, for values `[..., B, N, C]` a leaf (arrays or their shapes)."""
    if buckets < 1:
        raise invalid("buckets", buckets, "it must be at least 1")
    zeros = jax.tree.map(lambda x: jnp.zeros((buckets, *x.shape[:-3], x.shape[-1]), jnp.float32), values)
    return ChannelMaxima(zeros, jnp.zeros(buckets, jnp.int32), jnp.zeros(buckets, jnp.int32))


def with_batch(statistics: ChannelMaxima, values: Any, t: Any, edges: Any, momentum: float = 0.95) -> ChannelMaxima:
    """The statistics after one more batch: values `[..., B, N, C]` a leaf and the times `[B]` of its samples.

    Both branches of guidance belong into it: as samples of one doubled batch, or as two batches.
    """
    buckets = statistics.batches.shape[0]
    if buckets != np.shape(edges)[0] + 1:
        raise invalid("edges", np.shape(edges)[0], f"statistics of {buckets} buckets need {buckets - 1} edges")
    member = jax.nn.one_hot(bucket_of(t, edges), buckets, dtype=jnp.float32)
    count = member.sum(0)
    share = member / jnp.maximum(count, 1.0)

    def one(before, x):
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-2)
        # Products and a sum rather than a dot, which is of lower precision on some devices.
        spread = share.T.reshape(buckets, *(1,) * (largest.ndim - 2), -1, 1)
        found = (spread * largest).sum(-2)
        shaped = (buckets, *(1,) * (before.ndim - 1))
        first = (statistics.batches == 0).reshape(shaped)
        mixed = jnp.where(first, found, momentum * before + (1 - momentum) * found)
        return jnp.where((count > 0).reshape(shaped), mixed, before)

    maxima = jax.tree.map(one, statistics.maxima, values)
    seen = (count > 0).astype(jnp.int32)
    return ChannelMaxima(maxima, statistics.batches + seen, statistics.samples + count.astype(jnp.int32))


def pooled_maxima(statistics: ChannelMaxima) -> ChannelMaxima:
    """The same statistics in every bucket: the mean over buckets, weighted by their samples. Without any: zeros."""
    weight = statistics.samples / jnp.maximum(statistics.samples.sum(), 1)

    def one(values):
        mean = (weight.reshape(-1, *(1,) * (values.ndim - 1)) * values).sum(0, keepdims=True)
        return jnp.broadcast_to(mean, values.shape)

    total = jnp.broadcast_to(statistics.samples.sum(), statistics.samples.shape)
    batches = jnp.broadcast_to(statistics.batches.sum(), statistics.batches.shape)
    return ChannelMaxima(jax.tree.map(one, statistics.maxima), batches, total)
