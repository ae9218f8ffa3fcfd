"""Forecasts of any pytree from its last values: reuse, Taylor, Newton, Hermite and FoCa, from one table of values.

A feature of a network, seen along a run, is a smooth curve y(s) of a coordinate s (see `refresh.COORDINATES`). From its
values at the times s_0 > s_1 > ... at which it was really computed, the newest first, come differences

    D^0 = y(s_0),        D^k_new = (D^(k-1)_new - D^(k-1)_old) / span_k                                        (1)

and a forecast is a weighted sum of them, `y(s) = sum_k w_k(s) D^k`, over the orders that exist already: after q values
those are 0 .. q - 1. A forecaster is a rule for the spans and one for the weights; its order is a number. One that is
fitted to the values themselves (`modes.dmd`) takes the table and no differences.

Differences are linear in the values, so the table keeps the values themselves, in a ring of order + 1 places, and (1)
as a small matrix: a new value is written once and nothing else is moved. Values are kept in float32 at least.
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

    values: its last m + 1 values, each leaf with a new axis of as many places. knots: `[m + 1]`, s_0 .. s_m.
    basis: `[m + 1, m + 1]`, D^k as sums over the places. count: how many values came in.
    """

    values: Any
    knots: Float[Array, " places"]
    basis: Float[Array, "places places"]
    count: Int[Array, ""]


def table_axes(places: Any = 0) -> Table:
    """Where the batch stands in a table of values that have it first: behind the places, see `typing.BatchAxes`.

    places: the `axes` of `init`, where each leaf has its places.
    """
    return Table._make((jax.tree.map(lambda axis: axis + 1, places), None, None, None))


class Forecaster(NamedTuple):
    """A rule that forecasts pytrees; `init`, `update` and `predict` below are what one does with it.

    order: m. spans: (knots [m + 1], at) -> [m], what the differences are divided by when a value at `at` comes in.
    weights: (knots [m + 1], at) -> [m + 1], of D^0 .. D^m in a forecast.
    fitted: in the place of both where it is given, the forecast of one leaf: (values [m + 1, *lead, ...], newest first,
        lead, knots [m + 1], at, count) -> [*lead, ...]. lead counts the axes up to the batch; what is fitted must be
        fitted to each entry of those alone, so that samples do not depend on their batch.
    """

    order: int
    spans: Callable[[Any, Any], Any]
    weights: Callable[[Any, Any], Any]
    fitted: Callable[[Any, int, Any, Any, Any], Any] | None = None


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
    if not contraction > 0:
        raise invalid("contraction", contraction, "it must be positive")

    def weights(knots, at):
        u = contraction * (at - knots[0])
        polynomials = [jnp.ones_like(u), 2 * u]
        for k in range(1, order):
            polynomials.append(2 * u * polynomials[k] - 2 * k * polynomials[k - 1])
        return jnp.stack([contraction**k / math.factorial(k) * polynomials[k] for k in range(order + 1)])

    return Forecaster(order, taylor(order).spans, weights)


def foca(step: float = 1.0) -> Forecaster:
    """A predictor of BDF2 type and a corrector of Heun type, one step after the other (after Zheng et al. 2025, FoCa).

    The values follow an ODE. At each skipped step BDF2 with its last slope held, `y_p = 4/3 y_k - 1/3 y_(k-1) + 2/3 d`
    with `d = y_k - y_(k-1)`, predicts, and half of what the slope between the two last computed values, D, differs
    from d corrects:

        y_(k+1) = y_p + (D - d) / 2 = y_k + (d + D) / 2                                                        (2)

    y_(k-1), y_k are the last two values of the run, computed or forecast. So d halves its distance to D at each step,
    and after k steps from s_0 the forecast is `y(s_0) + k D + (1 - 2^-k) (d_0 - D)`. d_0 looks back to the forecast one
    step before s_0, from s_1 along the slope D' of the two values before: `d_0 - D = (N - 1) (D - D')` for computed
    values N steps apart. Straight lines are exact; what is left of a curve is bounded, however far ahead.

    step: the distance between two calls in the coordinate, 1 for the index.

    The abstract of the paper and the code of cache-dit (1.5) were read, not the paper. There D is the plain difference
    of computed values, also where they are several steps apart, and d_0 remembers all forecasts before.
    """
    if not step > 0:
        raise invalid("step", step, "it must be positive")

    def weights(knots, at):
        ahead, span = at - knots[0], knots[0] - knots[1]
        unit = jnp.where(span < 0, -step, step)
        drift = jnp.where(span / unit > 1, span - unit, 0.0)
        return jnp.stack([jnp.ones_like(ahead), ahead, (1 - 2.0 ** -(ahead / unit)) * drift * span])

    return Forecaster(2, taylor(2).spans, weights)


def init(forecaster: Forecaster, value: Any, axes: Any = 0) -> Table:
    """An empty table for values like `value` (arrays or their shapes).

    axes: where each leaf's new axis stands: one number, or a pytree of them.
    """
    size = forecaster.order + 1

    def empty(leaf, axis):
        return jnp.zeros((*leaf.shape[:axis], size, *leaf.shape[axis:]), jnp.promote_types(leaf.dtype, jnp.float32))

    return Table(jax.tree.map(empty, value, _each(axes, value)), jnp.zeros(size), jnp.zeros((size, size)), jnp.int32(0))


def update(forecaster: Forecaster, table: Table, value: Any, at: Any, axes: Any = 0) -> Table:
    """The table with `value`, computed at `at`; axes as they were given to `init`.

    A value at the time of the last one takes its place.
    """
    at, size = jnp.asarray(at, jnp.float32), forecaster.order + 1
    same = (table.count > 0) & (at == table.knots[0])
    place = (table.count - same) % size
    spans = forecaster.spans(table.knots, at)
    rows = [jax.nn.one_hot(place, size)]
    for k in range(forecaster.order):
        known = (table.count > k) & (spans[k] != 0)
        new = (rows[k] - table.basis[k]) / jnp.where(known, spans[k], 1.0)
        rows.append(jnp.where(known, new, 0.0))
    knots = jnp.concatenate([at[None], table.knots[:-1]])

    def written(leaf, value, axis):
        return jax.lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), place, axis)

    return Table(
        jax.tree.map(written, table.values, value, _each(axes, value)),
        jnp.where(same, table.knots, knots),
        jnp.where(same, table.basis, jnp.stack(rows)),
        jnp.where(same, table.count, table.count + 1),
    )


def weights(forecaster: Forecaster, table: Table, at: Any) -> Float[Array, " places"]:
    """The weight of each place in the forecast at `at`; orders that do not exist yet have none.

    Of a rule without `fitted`, whose weights depend on times alone.
    """
    known = jnp.arange(forecaster.order + 1) < table.count
    orders = jnp.where(known, forecaster.weights(table.knots, jnp.asarray(at, jnp.float32)), 0.0)
    # In full precision everywhere: high orders are differences of nearly equal values.
    return jnp.matmul(orders, table.basis, precision="highest")


def combine(values: Array, weights: Float[Array, " places"], axis: int = 0) -> Array:
    """The weighted sum over the places of one leaf, for weights that sum to 1, as those of every forecast do.

    Written as the first place and what the others differ from it: values that are equal are forecast bit for bit,
    however far ahead, where large weights of opposite sign would leave their rounding.
    """
    first, *others = (jax.lax.index_in_dim(values, k, axis, keepdims=False) for k in range(values.shape[axis]))
    return first + sum(weight * (place - first) for weight, place in zip(weights[1:], others)) if others else first


def predict(forecaster: Forecaster, table: Table, at: Any, axes: Any = 0) -> Any:
    """The forecast at `at`, a pytree like the values; axes as they were given to `init`."""
    if forecaster.fitted is None:
        own = weights(forecaster, table, at)
        return jax.tree.map(lambda leaf, axis: combine(leaf, own, axis), table.values, _each(axes, table.values))
    fitted, at = forecaster.fitted, jnp.asarray(at, jnp.float32)
    size = forecaster.order + 1
    newest_first = (table.count - 1 - jnp.arange(size)) % size

    def forecast(leaf, axis):
        values = jnp.moveaxis(jnp.take(leaf, newest_first, axis=axis), axis, 0)
        return fitted(values, axis + 1, table.knots, at, table.count)

    return jax.tree.map(forecast, table.values, _each(axes, table.values))


def summands(forecaster: Forecaster, table: Table, at: Any, axes: Any = 0) -> tuple[Any, Float[Array, " places"]]:
    """`(values, weights)` of which `combine` makes the forecast, leaf by leaf, wherever it is needed: the places of the
    table, or of a fitted rule its forecast as the only one."""
    if forecaster.fitted is None:
        return table.values, weights(forecaster, table, at)
    found = predict(forecaster, table, at, axes)
    return jax.tree.map(jnp.expand_dims, found, _each(axes, found)), jnp.ones(1)


def _each(axes, tree):
    return jax.tree.map(lambda leaf: axes, tree) if isinstance(axes, int) else axes


def _powers(h, order):
    factorials = jnp.asarray([math.factorial(k) for k in range(order + 1)], jnp.float32)
    # 0^0 is 1 here, also for the derivative.
    return jnp.concatenate([jnp.ones(1), jnp.cumprod(jnp.broadcast_to(h, (order,)))]) / factorials


def _check_order(order):
    if not isinstance(order, int) or order < 0:
        raise invalid("order", order, "it must be an integer, 0 (reuse) or more")
