"""Bits under a budget: never above it, never fewer when it grows, and where the metric of a group says."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.quantization.allocation import (
    allocated_bits,
    average_bits,
    decoupled_bits,
    group_budgets,
    sensitivities,
)

BITS = (4, 6, 8)
RANDOM = np.random.default_rng(1)
SIZES = RANDOM.integers(1, 9, 6).astype(float)
LOSSES = RANDOM.uniform(size=(6, 3))
BUDGETS = np.linspace(4, 8.5, 40)
MEMBERS = {"content": (0, 3, 4), "quality": (1, 2, 5)}


def decoupled(budget, drops=LOSSES, errors=((1.0, 0.2, 0.1), (0.5, 0.3, 0.0))):
    by_group = {name: drops[list(items)] for name, items in MEMBERS.items()}
    return decoupled_bits(by_group, MEMBERS, dict(zip(MEMBERS, errors, strict=True)), SIZES, BITS, budget)


@pytest.mark.parametrize("allocate", [decoupled, lambda budget: allocated_bits(LOSSES, SIZES, BITS, budget)])
def test_bits_stay_within_the_budget_and_grow_with_it(allocate):
    tables = np.stack([allocate(budget) for budget in BUDGETS])
    assert np.all(np.diff(tables, axis=0) >= 0)
    assert all(average_bits(table, SIZES) <= budget + 1e-9 for table, budget in zip(tables, BUDGETS, strict=True))
    assert np.all(tables[0] == 4) and len(np.unique(tables, axis=0)) > 3


def test_where_every_step_costs_the_same_and_saves_less_than_the_last_no_table_is_better():
    falling = np.cumsum(np.sort(RANDOM.uniform(size=(5, 3)), axis=1), axis=1)[:, ::-1]
    ones, place = np.ones(5), {b: i for i, b in enumerate(BITS)}

    def loss(table):
        return sum(falling[i, place[b]] for i, b in enumerate(table))

    for steps in range(11):
        budget = 4 + 2 * steps / 5
        best = min(loss(table) for table in product(BITS, repeat=5) if sum(table) <= 5 * budget + 1e-9)
        assert loss(allocated_bits(falling, ones, BITS, budget)) == pytest.approx(best)


def test_groups_spend_the_budget_whole():
    for budget in (4.3, 5.7, 7.9):
        shares = group_budgets([[3.0, 2.0, 0.0], [9.0, 1.0, 0.5]], [5.0, 2.0], BITS, budget)
        assert average_bits(shares, [5.0, 2.0]) == pytest.approx(budget)


def test_within_a_group_only_its_own_metric_ranks():
    drops = LOSSES.copy()
    drops[list(MEMBERS["content"])] *= 1000.0
    for budget in (4.7, 5.5, 6.6):
        np.testing.assert_array_equal(decoupled(budget), decoupled(budget, drops))
    flipped = decoupled(5.0, errors=((0.0, 0.0, 0.0), (0.5, 0.3, 0.0)))
    assert np.all(flipped[list(MEMBERS["content"])] == 4) and flipped[list(MEMBERS["quality"])].max() > 4


def test_sensitivities_are_of_one_item_alone():
    weight = np.array([1.0, 10.0, 100.0], np.float32)
    found = sensitivities(lambda bits: {"sum": jnp.sum(weight * 2.0**-bits), "first": bits[0]}, 3, BITS)
    expected = weight[:, None] * (2.0 ** -np.array(BITS) - 2.0**-16)
    np.testing.assert_allclose(found["sum"], expected, rtol=1e-3)
    np.testing.assert_array_equal(found["first"], [[-12, -10, -8], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: allocated_bits(LOSSES, SIZES, BITS, 3.0),
        lambda: allocated_bits(LOSSES, SIZES, (8, 6, 4), 6.0),
        lambda: allocated_bits(LOSSES[:, :2], SIZES, BITS, 6.0),
        lambda: allocated_bits(LOSSES, 0 * SIZES, BITS, 6.0),
        lambda: decoupled_bits({}, {"content": (0, 1)}, {}, SIZES, BITS, 6.0),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(InvalidInput):
        wrong()
