"""The front holds what nothing dominates; the choice is the cheapest that is good enough."""

import numpy as np
import pytest

from diffusion_jax import metrics
from diffusion_jax.errors import InvalidInput


def test_the_front_is_what_nothing_dominates_and_every_other_setting_is_dominated_by_it():
    costs, errors = np.random.default_rng(0).integers(0, 12, (2, 60)).astype(float)
    front = metrics.pareto_front(costs, errors)
    dominates = (
        (costs[:, None] <= costs)
        & (errors[:, None] <= errors)
        & ((costs[:, None] < costs) | (errors[:, None] < errors))
    )
    points = {(costs[i], errors[i]) for i in range(60) if not dominates[:, i].any()}
    assert {(costs[i], errors[i]) for i in front} == points
    assert len(front) == len(points)
    assert (np.diff(costs[front]) > 0).all()
    assert (np.diff(errors[front]) < 0).all()


def test_the_choice_is_the_cheapest_within_the_tolerance_of_the_reference():
    costs, errors = [1.0, 0.8, 0.6, 0.6, 0.1], [1.0, 1.04, 1.09, 1.02, 3.0]
    assert [metrics.cheapest_within(costs, errors, tolerance) for tolerance in (0.0, 0.05, 0.1, 5.0)] == [0, 3, 3, 4]
    assert metrics.cheapest_within(costs, errors, 0.02, reference=3) == 3
    # With nothing allowed, what is better and cheaper is taken all the same.
    assert metrics.cheapest_within([1.0, 0.5], [1.0, 0.9], 0.0) == 1


def test_settings_without_numbers_are_refused():
    for costs, errors in (([], []), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, np.nan])):
        with pytest.raises(InvalidInput):
            metrics.pareto_front(costs, errors)
    with pytest.raises(InvalidInput, match="tolerance"):
        metrics.cheapest_within([1.0], [1.0], -0.1)
    with pytest.raises(InvalidInput, match="reference"):
        metrics.cheapest_within([1.0], [1.0], 0.1, reference=1)


def test_errors_at_equal_cost_lie_on_a_line_of_logarithms_and_nothing_is_extrapolated():
    costs, errors = [4.0, 2.0, 1.0], [0.01, 1.0, 3.0]
    assert metrics.error_at_cost(costs, errors, 3.0) == pytest.approx(0.1)
    assert [metrics.error_at_cost(costs, errors, cost) for cost in costs] == pytest.approx(errors)
    for cost in (0.9, 4.1):
        with pytest.raises(InvalidInput, match="between those of the settings"):
            metrics.error_at_cost(costs, errors, cost)
    with pytest.raises(InvalidInput, match="no logarithm"):
        metrics.error_at_cost(costs, [0.0, 1.0, 3.0], 2.0)
