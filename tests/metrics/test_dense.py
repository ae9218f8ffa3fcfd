"""Masks and depth maps against the truth."""

import numpy as np
import pytest

from diffusion_jax import metrics
from diffusion_jax.errors import InvalidInput


def test_overlap_is_intersection_over_union():
    true = np.asarray([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], bool)
    found = np.asarray([[[1, 0], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]], bool)
    np.testing.assert_allclose(metrics.mask_overlap(found, true), [1 / 3, 1.0, 0.0])
    with pytest.raises(InvalidInput, match="equal ones"):
        metrics.mask_overlap(found, true[:, :1])


def test_depth_is_compared_up_to_an_affine_map_where_it_is_known():
    rng = np.random.default_rng(0)
    true = rng.uniform(1, 5, (3, 4, 4))
    valid = rng.random((3, 4, 4)) < 0.7
    np.testing.assert_allclose(metrics.affine_depth_error(-2 * true + 3, true), 0.0, atol=1e-12)
    broken = np.where(valid, true, 0.0)
    for unknown in (broken, np.where(valid, true, np.nan)):
        np.testing.assert_allclose(metrics.affine_depth_error(true + 1, unknown, valid), 0.0, atol=1e-12)
    # A constant is fitted by the mean.
    mean = true.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(metrics.affine_depth_error(0 * true, true), (abs(mean - true) / true).mean(axis=(1, 2)))
    noisy = true + rng.standard_normal(true.shape)
    a, b = np.polyfit(noisy[0].ravel(), true[0].ravel(), 1)
    expected = (abs(a * noisy[0] + b - true[0]) / true[0]).mean()
    np.testing.assert_allclose(metrics.affine_depth_error(noisy, true)[0], expected)
    with pytest.raises(InvalidInput, match="must be positive"):
        metrics.affine_depth_error(true, broken)
