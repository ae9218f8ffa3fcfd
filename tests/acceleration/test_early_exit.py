"""Thresholds for a budget of blocks, by estimates alone."""

import numpy as np
import pytest

from diffusion_jax.acceleration import exit_depths, threshold_for_depth
from diffusion_jax.errors import InvalidInput

UNCERTAINTY = np.sort(np.random.default_rng(0).uniform(size=(6, 8, 16)), axis=1)[:, ::-1]


def test_samples_leave_at_the_first_estimate_that_is_small_enough():
    estimates = np.array([[[0.9, 0.2], [0.4, 0.9], [0.6, 0.9]]])
    np.testing.assert_array_equal(exit_depths(estimates, 0.5), [[2, 1]])
    np.testing.assert_array_equal(exit_depths(estimates, 0.1), [[3, 3]])
    np.testing.assert_array_equal(exit_depths(estimates, 0.9), [[1, 1]])


@pytest.mark.parametrize("depth", [1.0, 3.0, 5.5, 8.0])
def test_the_smallest_threshold_is_found_for_a_number_of_blocks(depth):
    threshold = threshold_for_depth(UNCERTAINTY, depth)
    assert exit_depths(UNCERTAINTY, threshold).mean() <= depth
    assert exit_depths(UNCERTAINTY, threshold).mean() == pytest.approx(depth, abs=0.02)
    if depth < 8:
        assert exit_depths(UNCERTAINTY, np.nextafter(threshold, 0)).mean() > depth


def test_a_depth_that_there_is_not_is_told():
    with pytest.raises(InvalidInput, match="from 1 to 8"):
        threshold_for_depth(UNCERTAINTY, 8.5)
