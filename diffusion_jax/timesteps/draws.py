"""Which times are trained: distributions of t, and their spread over the batch.

A `TimestepDraw` draws `(t, weight)`, float32 of any shape `[B, ...]`. `weight` corrects for the distribution of t, so
that the expectation of `weight f(t)` is the intended one. Weights that define the loss itself are in `weights`. Every
entry of the shape gets its own time; wrappers that share, mix or order them along axis 1 (frames, tokens) are in
`vector_draws`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes.schedules import check_positive
from diffusion_jax.time_axes import expand
from diffusion_jax.timesteps.grids import grid_weights, scalar_times
from diffusion_jax.timesteps.mapping import bucket, time_at_noise_ratio
from diffusion_jax.typing import Number, Numbers, Process, Quantile, Times, TimestepDraw


def _independent(key, shape):
    return jax.random.uniform(key, shape)


def _stratified(key, shape):
    jitter_key, order_key = jax.random.split(key)
    ranks = jnp.broadcast_to(expand(jnp.arange(shape[0]), jax.ShapeDtypeStruct(shape, jnp.int32)), shape)
    ranks = jax.random.permutation(order_key, ranks, axis=0, independent=True)
    return (ranks + jax.random.uniform(jitter_key, shape)) / shape[0]


def _low_discrepancy(key, shape):
    offset_key, order_key = jax.random.split(key)
    ranks = jnp.broadcast_to(expand(jnp.arange(shape[0]), jax.ShapeDtypeStruct(shape, jnp.int32)), shape)
    ranks = jax.random.permutation(order_key, ranks, axis=0, independent=True)
    return jnp.mod(jax.random.uniform(offset_key, (1, *shape[1:])) + ranks / shape[0], 1.0)


def _antithetic(key, shape):
    half = jax.random.uniform(key, ((shape[0] + 1) // 2, *shape[1:]))
    return jnp.concatenate([half, 1.0 - half])[: shape[0]]


SPREADS: dict[str, Callable[..., Any]] = {
    "independent": _independent,
    "stratified": _stratified,
    "antithetic": _antithetic,
    "low_discrepancy": _low_discrepancy,
}
"""How uniform numbers are spread over the batch (axis 0), each entry still uniform.

`stratified`: one in each of B equal parts, in random order. `antithetic`: examples i and i + B/2 are mirror images.
`low_discrepancy`: `(u + i / B) mod 1` with one u, in random order (Kingma et al. 2021).
"""


def fixed_draw(draw: Callable[..., Any]) -> TimestepDraw:
    """`draw(key, shape) -> t`, weight 1, nothing learned."""

    def drawn(state, key, shape):
        t = draw(key, shape)
        return t, jnp.ones_like(t)

    return TimestepDraw(lambda: (), drawn, lambda state, t, loss: state)


def _spread(spread: str) -> Callable[..., Any]:
    if spread not in SPREADS:
        raise unknown("spread", spread, SPREADS)

    def numbers(key, shape):
        if spread != "independent" and not shape:
            raise invalid("shape", tuple(shape), f"spread {spread!r} needs a batch")
        return SPREADS[spread](key, tuple(shape))

    return numbers


def _quantile(function: Callable[..., Any], spread: str) -> TimestepDraw:
    numbers = _spread(spread)

    def inside(u):
        # Quantiles are infinite at 0 and 1.
        return function(jnp.clip(u, 2.0**-24, 1.0 - 2.0**-24))

    return fixed_draw(lambda key, shape: inside(numbers(key, shape)))._replace(quantile=Quantile(inside, numbers))


def numbers_between(quantile: Quantile, low: Any, high: Any) -> tuple[Any, Any]:
    """The range of the numbers u whose times lie in [low, high], by bisection; (0, 1) exactly where that is all."""
    low, high = jnp.broadcast_arrays(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))
    rises = quantile.function(jnp.float32(0.75)) >= quantile.function(jnp.float32(0.25))

    def last(before):
        """The largest u of which `before` is true, which is true up to somewhere."""

        def halve(_, bounds):
            inside, outside = bounds
            middle = 0.5 * (inside + outside)
            true = before(quantile.function(middle))
            return jnp.where(true, middle, inside), jnp.where(true, outside, middle)

        inside, outside = jax.lax.fori_loop(0, 26, halve, (jnp.zeros_like(low), jnp.ones_like(low)))
        return jnp.where(inside == 0, 0.0, jnp.where(outside == 1, 1.0, inside))

    return last(lambda t: jnp.where(rises, t < low, t > high)), last(lambda t: jnp.where(rises, t <= high, t >= low))


def restricted(draw: TimestepDraw, low: Number | Any = 0.0, high: Number | Any = 1.0) -> TimestepDraw:
    """`draw` given that t lies in [low, high], which may be traced: an expert's part of a distribution, a curriculum's.

    By its quantile function, so nothing is drawn in vain; over [0, 1] it is `draw` bit for bit. Raises InvalidInput for
    a draw without one, such as a learned one.
    """
    quantile = quantile_of(draw)
    first, last = numbers_between(quantile, low, high)

    def function(u):
        # In the tail of a distribution neighbouring numbers are times that lie apart.
        return jnp.clip(quantile.function(first + (last - first) * u), low, high)

    return fixed_draw(lambda key, shape: function(quantile.numbers(key, shape)))._replace(
        quantile=Quantile(function, quantile.numbers)
    )


def quantile_of(draw: TimestepDraw) -> Quantile:
    """Raises InvalidInput for a draw without a quantile function."""
    if draw.quantile is None:
        raise invalid("draw", draw, "one with a quantile function is needed, such as uniform or logit_normal")
    return draw.quantile


def uniform(low: Number = 0.0, high: Number = 1.0, spread: str = "independent") -> TimestepDraw:
    """Uniform on [low, high]; a part of [0, 1] trains an expert for that window. spread: a key of `SPREADS`."""
    if not 0 <= low < high <= 1:
        raise InvalidInput(f"low and high are {low!r} and {high!r}, but 0 <= low < high <= 1 must hold.")
    return _quantile(lambda u: low + (high - low) * u, spread)


def stratified(low: Number = 0.0, high: Number = 1.0) -> TimestepDraw:
    """`uniform` with one time in each of B equal parts."""
    return uniform(low, high, "stratified")


def antithetic(low: Number = 0.0, high: Number = 1.0) -> TimestepDraw:
    """`uniform` in mirrored pairs: t and low + high - t."""
    return uniform(low, high, "antithetic")


def logit_normal(mean: Number = 0.0, std: Number = 1.0, spread: str = "independent") -> TimestepDraw:
    """`logit(t) ~ N(mean, std^2)` (Esser et al. 2024, SD3); t = 1 is noise, so a positive mean trains noisier times."""
    check_positive(std=std)
    return _quantile(lambda u: jax.nn.sigmoid(mean + std * ndtri(u)), spread)


def mode(scale: Number = 1.29, spread: str = "independent") -> TimestepDraw:
    """`t = 1 - u - scale (cos^2(pi u / 2) - 1 + u)` with uniform u (Esser et al. 2024, equation 20)."""
    limit = 2.0 / (jnp.pi - 2.0)
    if not -1 <= scale <= limit:
        raise invalid("scale", scale, f"t rises and falls outside [-1, {limit:.4f}]")
    return _quantile(lambda u: jnp.clip(1.0 - u - scale * (jnp.cos(0.5 * jnp.pi * u) ** 2 - 1.0 + u), 0.0, 1.0), spread)


def log_normal(process: Process, mean: Number = -1.2, std: Number = 1.2, spread: str = "independent") -> TimestepDraw:
    """`log(sigma / alpha) ~ N(mean, std^2)` (Karras et al. 2022); levels beyond the last are t = 1."""
    check_positive(std=std)
    return _quantile(lambda u: time_at_noise_ratio(process, jnp.exp(mean + std * ndtri(u))), spread)


def beta(alpha: Number = 1.0, beta: Number = 1.0) -> TimestepDraw:
    """`t ~ Beta(alpha, beta)`, mean `alpha / (alpha + beta)`."""
    check_positive(alpha=alpha, beta=beta)
    return fixed_draw(lambda key, shape: jax.random.beta(key, alpha, beta, tuple(shape)))


class LossHistory(NamedTuple):
    """losses: `[n, H]`, the last H losses of each bucket, a ring. count: `[n]` int32, how many were ever recorded."""

    losses: Any
    count: Any


def importance(
    num_buckets: int = 100, history: int = 10, uniform_share: Number = 0.001, spread: str = "independent"
) -> TimestepDraw:
    """Times drawn by recorded loss: bucket i with probability proportional to sqrt(E[loss^2]) (Nichol & Dhariwal 2021).

    [0, 1] is cut into `num_buckets`; t is uniform in its bucket and `weight = (1 / n) / p_i`, so that the weighted loss
    keeps the expectation it has under uniform t. Uniform until every bucket has `history` losses; a share
    `uniform_share` stays uniform. The losses recorded should not contain `weight`; non-finite ones are ignored.
    """
    if num_buckets < 1:
        raise invalid("num_buckets", num_buckets, "it must be at least 1")
    if history < 1:
        raise invalid("history", history, "it must be at least 1")
    if not 0 <= uniform_share <= 1:
        raise invalid("uniform_share", uniform_share, "it must lie in [0, 1]")
    numbers = _spread(spread)

    def init():
        return LossHistory(jnp.zeros((num_buckets, history)), jnp.zeros((num_buckets,), jnp.int32))

    def probabilities(state):
        scores = jnp.sqrt(jnp.mean(jnp.square(state.losses), axis=1))
        total = scores.sum()
        known = jnp.all(state.count >= history) & (total > 0)
        learned = jnp.where(known, scores / jnp.where(total > 0, total, 1.0), 1.0 / num_buckets)
        return (1.0 - uniform_share) * learned + uniform_share / num_buckets

    def draw(state, key, shape):
        p = probabilities(state)
        which_key, where_key = jax.random.split(key)
        cumulative = jnp.cumsum(p)
        u = numbers(which_key, shape) * cumulative[-1]
        index = jnp.minimum(jnp.searchsorted(cumulative, u, side="right"), num_buckets - 1)
        t = (index + jax.random.uniform(where_key, shape)) / num_buckets
        return t, 1.0 / (num_buckets * p[index])

    def update(state, t, loss):
        losses = jnp.broadcast_to(expand(jnp.asarray(loss, jnp.float32), t), t.shape).reshape(-1)
        valid = jnp.isfinite(losses)
        index = jnp.where(valid, bucket(t, num_buckets).reshape(-1), num_buckets)
        hits = (index[:, None] == jnp.arange(num_buckets)).astype(jnp.int32)
        rank = (
            jnp.take_along_axis(jnp.cumsum(hits, axis=0), jnp.minimum(index, num_buckets - 1)[:, None], axis=1)[:, 0]
            - 1
        )
        total = hits.sum(axis=0)
        # Of more than `history` losses of one bucket only the last are kept, so that no two are written to one place.
        kept = rank >= jnp.append(total, 0)[index] - history
        slot = (jnp.append(state.count, 0)[index] + rank) % history
        row = jnp.where(valid & kept, index, num_buckets)
        return LossHistory(state.losses.at[row, slot].set(losses, mode="drop"), state.count + total)

    return TimestepDraw(init, draw, update)


def on_grid(grid: Times, spread: str = "independent", last: bool = False) -> TimestepDraw:
    """Uniform over the entries of a grid `[S + 1]`, without its end at 0 unless `last` (UniDiffuser asks at 0 too).

    The indices of a shifted grid of 1000 steps are the times of flow models trained on such a grid (Liu et al. 2025,
    Pusa, with `shift(trailing(1000), 5)`).
    """
    whole = scalar_times(grid).astype(jnp.float32)
    times = whole if last else whole[:-1]
    size = times.shape[0]
    return _quantile(lambda u: times[jnp.minimum(jnp.floor(u * size).astype(jnp.int32), size - 1)], spread)


def by_weights(grid: Times, weights: Numbers, uniform_share: Number = 0.5, spread: str = "independent") -> TimestepDraw:
    """Entries of a grid `[S + 1]` but the last, drawn in proportion to `weights [S]`,

        p_i = (1 - uniform_share) weights_i / sum(weights) + uniform_share / S.

    `contributions(process, grid) ** 2` are the weights by which ADDP draws times. Losses are then not weighed by them
    as well: the draw's own weight is 1. Without a uniform share such a draw nearly never trains low noise.
    spread: a key of `SPREADS`. Raises InvalidInput for weights that are negative, not finite or all 0, another number
    of them, and a share outside of [0, 1].
    """
    times, share = scalar_times(grid)[:-1].astype(jnp.float32), grid_weights(grid, weights)
    if not 0 <= uniform_share <= 1:
        raise invalid("uniform_share", uniform_share, "it must lie in [0, 1]")
    p = (1.0 - uniform_share) * share / share.sum() + uniform_share / len(share)
    # In float64: of 1000 weights the smallest would otherwise be rounded away.
    ends = jnp.asarray((np.cumsum(p) / p.sum())[:-1], jnp.float32)
    return _quantile(lambda u: times[jnp.searchsorted(ends, u, side="right")], spread)
