"""Forecasts of any pytree from its last values: reuse, Taylor, Newton and Hermite, from one table of differences.

A feature of a network, seen along a run, is a smooth curve y(s) of a coordinate s (see `coordinates`). A table keeps
what is known of it at the times s_0 > s_1 > ... at which it was really computed, the newest first:

    D^0 = y(s_0),        D^k_new = (D^(k-1)_new - D^(k-1)_old) / span_k                                        (1)

and every forecast is a weighted sum of it, `y(s) = sum_k w_k(s) D^k`, over the orders that exist already: after q
values those are 0 .. q - 1. So a forecaster is a rule for the spans and one for the weights; its order is a number, and
the state is explicit. Values are kept in float32 whatever they come in: differences of nearly equal bfloat16 numbers
are noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import invalid


class Table(NamedTuple):
    """What is known of a pytree.

    factors: D^0 .. D^m of equation (1), one pytree each. knots: `[m + 1]`, s_0 .. s_m. count: how many values came in.
    """

    factors: tuple[Any, ...]
    knots: Float[Array, " m"]
    count: Int[Array, ""]


class Forecaster(NamedTuple):
    """A rule that forecasts pytrees; `init`, `update` and `predict` below are what one does with it.

    order: m. spans: (knots [m + 1], at) -> [m], what the differences are divided by when a value at `at` comes in.
    weights: (knots [m + 1], at) -> [m + 1], of D^0 .. D^m in a forecast.
    """

    order: int
    spans: Callable[[Any, Any], Any]
    weights: Callable[[Any, Any], Any]


def reuse() -> Forecaster:
    """The last value, as it is: order 0."""
    return taylor(0)


def taylor(order: int = 1) -> Forecaster:
    """Truncated Taylor series, `w_k = h^k / k!` with h since the newest value (Liu et al. 2025, TaylorSeer, eq. 7).

    Differences are divided by the distance of the two newest values, so D^k approximates the k-th derivative. Exact for
    straight lines only, whatever the order: the differences look backwards.
    """
    _check_order(order)

    def spans(knots, at):
        return jnp.broadcast_to(at - knots[0], (order,))

    def weights(knots, at):
        return _powers(at - knots[0], order)

    return Forecaster(order, spans, weights)


def newton(order: int = 1) -> Forecaster:
    """Newton's interpolation through the last values, `w_k = prod_{q<k} (s - s_q)`, on divided differences.

    Exact for polynomials of degree `order`, whatever the spacing. Equal to `taylor` for orders 0 and 1; on a regular
    grid of spacing N its second weight is h (h + N) / 2 where Taylor's is h^2 / 2.
    """
    _check_order(order)

    def spans(knots, at):
        return at - knots[:order]

    def weights(knots, at):
        return jnp.concatenate([jnp.ones(1), jnp.cumprod(at - knots[:order])])

    return Forecaster(order, spans, weights)


def hermite(order: int = 1, contraction: float = 0.5) -> Forecaster:
    """Hermite polynomials in place of powers, `w_k = He~_k(h) / k!` (Feng et al. 2025, HiCache).

        He~_k(h) = c^k H_k(c h),        H_0 = 1, H_1(u) = 2u, H_(k+1)(u) = 2u H_k(u) - 2k H_(k-1)(u)

    with the physicists' H_k and the contraction c, which tames the high orders over long distances. c = sqrt(1/2) makes
    order 1 the Taylor forecast. Differences are those of `taylor`.
    """
    _check_order(order)
    if contraction <= 0:
        raise invalid("contraction", contraction, "it must be positive")

    def weights(knots, at):
        u = contraction * (at - knots[0])
        polynomials = [jnp.ones_like(u), 2 * u]
        for k in range(1, order):
            polynomials.append(2 * u * polynomials[k] - 2 * k * polynomials[k - 1])
        return jnp.stack([contraction**k / math.factorial(k) * polynomials[k] for k in range(order + 1)])

    return Forecaster(order, taylor(order).spans, weights)


def init(forecaster: Forecaster, value: Any) -> Table:
    """An empty table for values like `value` (arrays or their shapes)."""

    def zeros():
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf.dtype)), value)

    size = forecaster.order + 1
    return Table(tuple(zeros() for _ in range(size)), jnp.zeros(size), jnp.int32(0))


def update(forecaster: Forecaster, table: Table, value: Any, at: Any) -> Table:
    """The table with `value`, computed at `at`. A value at the time of the last one replaces D^0 and nothing else."""
    at = jnp.asarray(at, jnp.float32)
    spans = forecaster.spans(table.knots, at)
    same = (table.count > 0) & (at == table.knots[0])
    factors = [jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), value, table.factors[0])]
    for k in range(forecaster.order):
        known = (table.count > k) & ~same
        # Where nothing is known yet the factor stays zero, and no weight ever reaches it.
        scale = jnp.where(known & (spans[k] != 0), 1.0 / jnp.where(spans[k] == 0, 1.0, spans[k]), 0.0)
        new = jax.tree.map(lambda new, old, s=scale: (new - old) * s, factors[k], table.factors[k])
        factors.append(jax.tree.map(lambda new, old: jnp.where(same, old, new), new, table.factors[k + 1]))
    moved = jnp.concatenate([at[None], table.knots[:-1]])
    knots = jnp.where(same, table.knots, moved)
    return Table(tuple(factors), knots, jnp.where(same, table.count, table.count + 1))


def weights(forecaster: Forecaster, table: Table, at: Any) -> Float[Array, " m"]:
    """The weights of D^0 .. D^m in the forecast at `at`: zero for orders that do not exist yet."""
    known = jnp.arange(forecaster.order + 1) < table.count
    return jnp.where(known, forecaster.weights(table.knots, jnp.asarray(at, jnp.float32)), 0.0)


def combine(factors: tuple[Any, ...], weights: Float[Array, " m"]) -> Any:
    """`sum_k w_k D^k`; order 0 alone is D^0 itself, bit for bit."""
    if len(factors) == 1:
        return factors[0]
    return jax.tree.map(lambda first, *more: sum((w * f for w, f in zip(weights[1:], more)), first), *factors)


def predict(forecaster: Forecaster, table: Table, at: Any) -> Any:
    """The forecast at `at`, a pytree like the values."""
    return combine(table.factors, weights(forecaster, table, at))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _powers(h, order):
    factorials = jnp.asarray([math.factorial(k) for k in range(order + 1)], jnp.float32)
    # 0^0 is 1 here, also for the derivative.
    return jnp.concatenate([jnp.ones(1), jnp.cumprod(jnp.broadcast_to(h, (order,)))]) / factorials


def _check_order(order):
    if not isinstance(order, int) or order < 0:
        raise invalid("order", order, "it must be an integer, 0 (reuse) or more")
