"""Intervals of times that are learned as one task each (Go et al. 2023, ANT): where they are cut, and draws of them.

[0, 1] is looked at as n equal parts, part i being (i / n, (i + 1) / n]. The k intervals of neighbouring parts are those
of the least total cost, by dynamic programming,

    min over l_1 = 0 < ... < l_k  of  sum_i sum_{t = l_i}^{r_i} distance(c_i, t),  c_i = floor((l_i + r_i) / 2)  (1)

where the distance of two parts is that of their log-SNR, of their times, or how much their gradients disagree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import invalid
from diffusion_jax.processes import need_gaussian
from diffusion_jax.time_axes import expand
from diffusion_jax.timesteps.draws import fixed_draw
from diffusion_jax.typing import Number, Quantile, TimestepDraw


def log_snr_distance(process: Any, parts: int) -> Any:
    """`[n, n]`: `|log SNR(t) - log SNR(c)|` of the times (i + 1) / n, which are those of a discrete process of n steps.

    Where there is only noise, as at t = 1 of a flow, the log-SNR is -inf: such a part has that of its middle. The
    logarithm matters: by the SNR itself one interval takes nearly all parts. Raises InvalidInput for fewer than one
    part, for a process that is not Gaussian, and for one without a finite log-SNR in the middle of a part either.
    """
    need_gaussian("log_snr_distance", process)
    times = _times(parts)
    ends, middles = (
        np.asarray(jax.device_get(process.log_snr(jnp.asarray(at, jnp.float32))), np.float64)
        for at in (times, times - 0.5 / parts)
    )
    values = np.where(np.isfinite(ends), ends, middles)
    if not np.isfinite(values).all():
        raise invalid("the log-SNR", float(values[~np.isfinite(values)][0]), "all parts need a finite one")
    return np.abs(values[None] - values[:, None])


def time_distance(parts: int) -> Any:
    """`[n, n]`: `|t - c|` in parts: intervals of nearly equal length."""
    at = len(_times(parts)) * _times(parts)
    return np.abs(at[None] - at[:, None])


def affinity_distance(affinity: Float[np.ndarray | Array, "n n"]) -> Any:
    """`[n, n]`: `-affinity(c, t)`, of mean cosines between the gradients of the parts (`objectives.task_affinity`)."""
    return -np.asarray(affinity, np.float64)


def _times(parts: int) -> np.ndarray:
    if parts < 1:
        raise invalid("parts", parts, "it must be at least 1")
    return np.arange(1, parts + 1) / parts


def interval_clusters(distance: Float[np.ndarray, "n n"], clusters: int) -> Any:
    """The edges `[k + 1]`, from 0 to 1, of the intervals of equation (1), by O(n^2 k) operations on the host.

    distance: `[c, t]`, of part t from a centre c. Raises InvalidInput for more clusters than parts.
    """
    distance = np.asarray(distance, np.float64)
    parts = len(distance) if distance.ndim else 0
    if distance.shape != (parts, parts):
        raise invalid("distance.shape", distance.shape, "a square matrix [n, n] is needed")
    if not np.isfinite(distance).all():
        raise invalid("distance", float(distance[~np.isfinite(distance)][0]), "finite numbers are needed")
    if not 1 <= clusters <= parts:
        raise invalid("clusters", clusters, f"it must be from 1 to the {parts} parts")
    # costs[l, r] of the interval from l to r, from sums along each row.
    sums = np.concatenate([np.zeros((parts, 1)), np.cumsum(distance, axis=1)], axis=1)
    low, high = np.arange(parts)[:, None], np.arange(parts)[None]
    centre = (low + high) // 2
    costs = np.where(low <= high, sums[centre, high + 1] - sums[centre, low], np.inf)
    best, begun = costs[0], []
    for _ in range(clusters - 1):
        # before[l] is the least cost of all parts below l.
        before = np.concatenate([[np.inf], best[:-1]])
        total = before[:, None] + costs
        begun.append(total.argmin(axis=0))
        best = total.min(axis=0)
    starts, last = [], parts - 1
    for start in begun[::-1]:
        starts.append(int(start[last]))
        last = starts[-1] - 1
    return np.array([0, *starts[::-1], parts]) / parts


def checked_edges(edges: Any) -> Float[np.ndarray, " edges"]:
    """`edges` as an array. Raises InvalidInput unless they are times that rise."""
    edges = np.asarray(edges, np.float64)
    rises = edges.ndim == 1 and len(edges) > 1 and edges[0] >= 0 and edges[-1] <= 1 and (np.diff(edges) > 0).all()
    if not rises:
        raise invalid("edges", edges.tolist(), "rising times within [0, 1], at least two, are needed")
    return edges


def cluster_of(
    edges: Float[np.ndarray | Array, " edges"] | tuple[Number, ...], t: Float[Array, "*shape"]
) -> Int[Array, "*shape"]:
    """Which interval a time lies in, 0 .. k - 1: number i is (edges[i], edges[i + 1]]."""
    return jnp.searchsorted(jnp.asarray(edges, jnp.float32)[1:-1], t, side="left")


def by_cluster(edges: Float[np.ndarray | Array, " edges"] | tuple[Number, ...]) -> TimestepDraw:
    """Equally many times of each interval, uniform within it; blocks of neighbouring examples share one.

    So a time in a short interval is likelier than under uniform t, by 1 / (k length). Restricted to some of the
    intervals (`restricted`, `curriculum`) it draws equally many of those, up to what the batch can be divided into.
    Raises InvalidInput for edges that do not rise, and when drawing fewer times than there are intervals.
    """
    checked = checked_edges(edges)
    low, high = (jnp.asarray(side, jnp.float32) for side in (checked[:-1], checked[1:]))
    count = len(checked) - 1
    # Numbers keep so far away from the next interval's, in shares of their own, that rounding does not reach it.
    apart = min(count * 2.0**-22, 0.25)

    def numbers(key, shape):
        if not shape or shape[0] < count:
            raise invalid("shape", tuple(shape), f"a batch of at least the {count} intervals is needed")
        within = apart + (1.0 - 2.0 * apart) * jax.random.uniform(key, tuple(shape))
        return (expand(jnp.arange(shape[0]) * count // shape[0], within) + within) / count

    def function(u):
        which = jnp.clip(jnp.floor(u * count).astype(jnp.int32), 0, count - 1)
        return low[which] + (high - low)[which] * jnp.clip(u * count - which, 0.0, 1.0)

    return fixed_draw(lambda key, shape: function(numbers(key, shape)))._replace(quantile=Quantile(function, numbers))
