"""Verdicts: paired differences over seeds against their bound, and nothing else."""

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes.verdicts import Row, judge

NOISE = np.array([0.3, -0.2, 0.05, -0.15])


def verdict(ours, against, direction, **bounds):
    return judge(Row("a claim", "figure", ours, against, direction, **bounds)).verdict


def test_differences_are_paired():
    """Seeds differ by far more than the sides do: unpaired, nothing could be said."""
    hard = np.array([1.0, 50.0, 9.0, 200.0])
    assert verdict((hard + 1 + 0.1 * NOISE).tolist(), hard.tolist(), "higher") == "holds"
    assert verdict((hard + 1 + 0.1 * NOISE).tolist(), hard.tolist(), "lower") == "fails"
    assert verdict((hard + 1 + 0.1 * NOISE)[::-1].tolist(), hard.tolist(), "higher") == "undecided"


@pytest.mark.parametrize(
    "direction, shift, expected",
    [
        ("higher", 2.0, "holds"),
        ("higher", -2.0, "fails"),
        ("higher", 0.01, "undecided"),
        ("lower", -2.0, "holds"),
        ("lower", 2.0, "fails"),
        ("lower", -0.01, "undecided"),
    ],
)
def test_the_interval_over_seeds_decides(direction, shift, expected):
    assert verdict((shift + NOISE).tolist(), [0.0] * 4, direction) == expected


def test_the_interval_is_students():
    judged = judge(Row("a claim", "figure", NOISE.tolist(), 0.0, "higher"))
    expected = stats.ttest_1samp(NOISE, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(judged.interval, expected)


@pytest.mark.parametrize("ours, expected", [(1.02, "holds"), (1.2, "fails"), (0.8, "fails"), (1.1, "undecided")])
def test_equal_is_within_its_margin(ours, expected):
    assert verdict((ours + 0.1 * NOISE).tolist(), [1.0] * 4, "equal", margin=0.1) == expected


def test_factor_and_margin_move_the_bound():
    ours, against = [4.0, 4.1, 3.9], [10.0, 10.0, 10.0]
    assert verdict(ours, against, "lower", factor=0.5) == "holds"
    assert verdict(ours, against, "lower", factor=0.3) == "fails"
    assert verdict(ours, against, "higher", margin=-7.0) == "holds"
    assert verdict(ours, against, "higher", margin=-3.0) == "fails"


def test_few_seeds_decide_nothing_but_plain_numbers_are_exact():
    assert verdict([5.0, 5.0], [1.0, 1.0], "higher") == "undecided"
    assert verdict([5.0], 1.0, "higher") == "undecided"
    assert verdict(5.0, 1.0, "higher") == "holds"
    assert verdict(1.0, 1.0, "higher") == "fails"
    assert verdict(1.0, 1.0, "equal") == "holds"
    assert verdict([3.0, 3.0, 3.0], 3.0, "equal") == "holds"


def test_what_is_not_finite_fails():
    assert verdict([1.0, float("nan"), 1.0], 0.0, "higher") == "fails"
    assert verdict(float("inf"), 0.0, "higher") == "fails"


def test_wrong_rows_are_refused():
    with pytest.raises(InvalidInput, match="did you mean 'higher'"):
        verdict(1.0, 0.0, "highr")
    with pytest.raises(InvalidInput, match="has 2 values of ours and 3"):
        verdict([1.0, 2.0], [1.0, 2.0, 3.0], "higher")
    with pytest.raises(InvalidInput, match="margin of 'a claim' is -1"):
        verdict(1.0, 0.0, "equal", margin=-1.0)
