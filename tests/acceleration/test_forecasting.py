"""Forecasts of curves: which are exact for which polynomials, and that orders count only once they exist."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.acceleration import foca, forecasting, hermite, newton, reuse, taylor
from diffusion_jax.errors import InvalidInput

LEAF = jnp.array([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])


def polynomial(degree):
    """A pytree of polynomials of `s`, of the given degree."""
    return lambda s: {"a": LEAF * s**degree + 2.0 * s - LEAF, "b": {"c": (0.5 * s) ** degree + LEAF[0]}}


def known(forecaster, curve, times, axes=0):
    """The table after values of `curve` at `times`."""
    table = forecasting.init(forecaster, curve(jnp.float32(0)), axes)
    for at in times:
        table = forecasting.update(forecaster, table, curve(jnp.float32(at)), at, axes)
    return table


def error(forecaster, degree, times, at):
    """The largest error of a forecast of a polynomial."""
    curve = polynomial(degree)
    found = forecasting.predict(forecaster, known(forecaster, curve, times), at)
    wrong = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, curve(jnp.float32(at)))
    return max(jax.tree.leaves(wrong))


@pytest.mark.parametrize("rule", [taylor, newton])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_straight_lines_are_exact_from_the_second_value_on(rule, order):
    for times in ([0, 1], [0, 1, 2, 5], [0, 1, 2, 5, 8]):
        assert error(rule(order), 1, times, times[-1] + 2) < 2e-4


def test_parabolas_are_exact_for_newton_alone():
    even, uneven = [-2, -1, 0], [0, 1, 4, 6]
    assert error(newton(2), 2, even, 1) < 1e-4
    assert error(newton(2), 2, uneven, 9) < 2e-3
    assert error(taylor(2), 2, even, 1) > 0.5
    assert error(newton(1), 2, even, 1) > 0.5
    # The card's example: i^2 at -2, -1, 0, forecast at 1.
    for rule, expected in ((taylor(2), 0.0), (newton(2), 1.0)):
        table = known(rule, lambda s: s**2, even)
        assert float(forecasting.predict(rule, table, 1)) == pytest.approx(expected, abs=1e-6)


def test_newton_is_exact_for_its_degree_on_uneven_falling_times():
    for order in (3, 4):
        times = [1.0, 0.9, 0.7, 0.6, 0.45][: order + 1]
        assert error(newton(order), order, times, 0.3) < 1e-3


def test_the_two_agree_for_orders_0_and_1():
    curve = polynomial(3)
    for order in (0, 1):
        both = [forecasting.predict(rule(order), known(rule(order), curve, [0, 1, 4]), 6) for rule in (taylor, newton)]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *both)


def test_reuse_is_the_last_value_bit_for_bit():
    curve = polynomial(2)
    table = known(reuse(), curve, [0.1, 0.37, 0.71])
    chex.assert_trees_all_equal(forecasting.predict(reuse(), table, 5.0), curve(jnp.float32(0.71)))
    assert [leaf.shape[0] for leaf in jax.tree.leaves(table.values)] == [1, 1]


def predicted_and_corrected(values, times, until):
    """The recursion of FoCa written out: BDF2 with its last slope held, then half of what the slopes differ."""
    curve, (s2, s1, s0) = [], times
    slopes = [(values[1] - values[0]) / (s1 - s2), (values[2] - values[1]) / (s0 - s1)]
    before = values[1] + slopes[0] * (s0 - 1 - s1)
    last = values[2]
    for _ in range(s0, until):
        d = last - before
        predicted = 4 / 3 * last - 1 / 3 * before + 2 / 3 * d
        before, last = last, predicted + (slopes[1] - d) / 2
        curve.append(last)
    return curve


@pytest.mark.parametrize("times", [(0, 3, 6), (0, 1, 6), (0, 1, 2), (0, 5, 6)])
def test_foca_predicts_by_bdf2_and_corrects_by_half_the_difference_of_the_slopes(times):
    curve = polynomial(3)
    table = known(foca(), curve, times)
    expected = predicted_and_corrected([np.asarray(curve(jnp.float32(at))["a"]) for at in times], times, times[-1] + 8)
    for ahead, value in enumerate(expected, 1):
        found = forecasting.predict(foca(), table, times[-1] + ahead)["a"]
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-3)


def test_foca_is_exact_on_lines_and_its_correction_is_bounded_where_that_of_a_parabola_is_not():
    for times in ([0, 1], [0, 1, 6], [0, 3, 6, 9]):
        assert error(foca(), 1, times, times[-1] + 4) < 1e-4
    assert error(foca(), 2, [-3, 0], 2) == pytest.approx(error(taylor(1), 2, [-3, 0], 2))
    far = [
        np.asarray(forecasting.predict(rule, known(rule, lambda s: s**2, [0, 3, 6]), 106))
        for rule in (foca(), taylor(1), newton(2))
    ]
    # (N - 1) (D - D') = 2 (9 - 3), where Newton follows the parabola.
    assert far[0] - far[1] == pytest.approx(12.0, rel=1e-4) and far[2] == pytest.approx(106**2, rel=1e-4)


def test_foca_knows_the_step_of_a_falling_coordinate():
    """Times from 1 down in steps of 0.1 are indices, of the same values."""
    by_index, by_time = foca(), foca(0.1)
    tables = [forecasting.init(rule, LEAF) for rule in (by_index, by_time)]
    for i in (0, 3, 6):
        tables = [
            forecasting.update(r, table, LEAF * i**2, at)
            for r, table, at in zip((by_index, by_time), tables, (i, 1 - 0.1 * i))
        ]
    expected, found = forecasting.predict(by_index, tables[0], 8), forecasting.predict(by_time, tables[1], 0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("rule", [taylor, newton, hermite])
def test_orders_that_do_not_exist_yet_have_no_say(rule):
    curve = polynomial(3)
    for many in (1, 2, 3):
        times = [0, 1, 3][:many]
        high = forecasting.predict(rule(4), known(rule(4), curve, times), 5)
        low = forecasting.predict(rule(many - 1), known(rule(many - 1), curve, times), 5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), high, low)


@pytest.mark.parametrize("rule", [taylor, newton])
def test_only_the_last_values_have_a_say(rule):
    """Newton looks at its last m + 1 values; so does Taylor, whose spans divide by the newest distance alone."""
    late = [5, 6, 8, 9]
    first, second = ([*early, *late] for early in ([0, 1, 2, 3, 4], [4]))
    tables = [known(rule(2), polynomial(3), times) for times in (first, second)]
    found = [forecasting.predict(rule(2), table, 11) for table in tables]
    np.testing.assert_allclose(found[0]["a"], found[1]["a"], rtol=1e-4, atol=1e-3)


def test_a_table_of_differences_says_the_same_as_the_ring_of_values():
    """The recurrence of the publication, written out on the differences themselves."""
    curve, order, times = polynomial(3), 3, [0, 1, 4, 7, 10]
    differences = []
    for index, at in enumerate(times):
        new = [np.asarray(curve(jnp.float32(at))["a"], np.float64)]
        for k in range(min(order, len(differences))):
            new.append((new[k] - differences[k]) / (at - times[index - 1]))
        differences = new
    expected = sum(2.0**k / np.prod(np.arange(1, k + 1)) * value for k, value in enumerate(differences))
    found = forecasting.predict(taylor(order), known(taylor(order), curve, times), 12)["a"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_hermite_weights_are_contracted_hermite_polynomials():
    c, h = 0.6, 3.0
    table = known(hermite(3, c), polynomial(1), [0, 1, 2, 3])
    found = hermite(3, c).weights(table.knots, 3 + h)
    u = c * h
    expected = [1.0, c * 2 * u, c**2 / 2 * (4 * u**2 - 2), c**3 / 6 * (8 * u**3 - 12 * u)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The contraction at which order 1 is Taylor's.
    np.testing.assert_allclose(hermite(1, 0.5**0.5).weights(table.knots[:2], 7.0), [1.0, 4.0], rtol=1e-6)


def test_a_second_value_at_one_time_takes_the_place_of_the_first():
    curve, rule = polynomial(2), newton(2)
    straight = known(rule, curve, [0, 1, 3])
    corrected = known(rule, curve, [0, 1])
    corrected = forecasting.update(rule, corrected, jax.tree.map(jnp.zeros_like, curve(jnp.float32(0))), 3)
    corrected = forecasting.update(rule, corrected, curve(jnp.float32(3)), 3)
    assert int(corrected.count) == 3
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(corrected)):
        np.testing.assert_array_equal(one, other)


def test_places_stand_where_they_are_asked_to_and_values_are_float32_at_least():
    value = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(4)}
    axes = {"a": 1, "b": 0}
    table = forecasting.init(taylor(2), value, axes)
    table = forecasting.update(taylor(2), table, value, 0, axes)
    assert table.values["a"].shape == (2, 3, 3) and table.values["a"].dtype == jnp.float32
    assert table.values["b"].shape == (3, 4)
    assert forecasting.predict(taylor(2), table, 1, axes)["a"].shape == (2, 3)


def test_updates_and_forecasts_are_one_scan_and_other_times_compile_nothing():
    rule, curve, traces = taylor(2), polynomial(2), []

    @jax.jit
    def through(times):
        traces.append(1)

        def body(table, at):
            said = forecasting.predict(rule, table, at)
            return forecasting.update(rule, table, curve(at), at), said

        return jax.lax.scan(body, forecasting.init(rule, curve(times[0])), times)[0]

    for times in (jnp.arange(5.0), jnp.array([0.0, 2.0, 3.0, 7.0, 9.0])):
        loop = known(rule, curve, times)
        for one, other in zip(jax.tree.leaves(through(times)), jax.tree.leaves(loop)):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert len(traces) == 1


def test_forecasters_that_cannot_be_are_refused():
    for rule in (taylor, newton, hermite):
        with pytest.raises(InvalidInput, match="order"):
            rule(-1)
    with pytest.raises(InvalidInput, match="contraction"):
        hermite(1, 0.0)
    with pytest.raises(InvalidInput, match="step"):
        foca(0.0)
