"""Merged components keep the moments of their groups, and of the whole."""

import numpy as np
import pytest

from diffusion_jax.denoisers import gaussian_mixture, merged_components
from diffusion_jax.errors import InvalidInput

MEANS, WEIGHTS = np.random.default_rng(0).normal(size=(5, 3)), np.array([1.0, 2.0, 1.0, 3.0, 1.0])
DENSE = np.stack([np.cov(np.random.default_rng(seed).normal(size=(3, 9))) for seed in range(5)])


def moments(mixture):
    weights, means = np.exp(mixture.log_weights), np.asarray(mixture.means).reshape(len(mixture.means), -1)
    if mixture.covariances is None:
        covariances = [np.diag(np.ravel(row)) for row in mixture.variances]
    else:
        covariances = np.asarray(mixture.covariances)
    mean = weights @ means
    second = np.einsum("k,kij->ij", weights, np.asarray(covariances) + means[:, :, None] * means[:, None])
    return mean, second - np.outer(mean, mean)


@pytest.mark.parametrize("spread", [{"stds": 0.3}, {"covariances": DENSE}], ids=["diagonal", "dense"])
def test_mean_and_covariance_of_the_whole_stay_what_they_are(spread):
    mixture = gaussian_mixture(MEANS, weights=WEIGHTS, **spread)
    for groups in ([0] * 5, [0, 0, 1, 1, 2], [1, 0, 1, 0, 1]):
        merged = merged_components(mixture, groups)
        assert merged.means.shape == (max(groups) + 1, 3)
        np.testing.assert_allclose(np.exp(merged.log_weights), np.bincount(groups, WEIGHTS) / 8, rtol=1e-5)
        for found, expected in zip(moments(merged), moments(mixture)):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_component_alone_stays_as_it_is():
    mixture = gaussian_mixture(MEANS.reshape(5, 3, 1), weights=WEIGHTS, covariances=DENSE)
    same = merged_components(mixture, np.arange(5))
    for found, expected in ((same.means, mixture.means), (same.covariances, DENSE)):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("groups", [[0, 0, 1], [0, 0, 2, 2, 2], [-1, 0, 0, 0, 0]])
def test_groups_that_are_none_are_refused(groups):
    with pytest.raises(InvalidInput, match="groups"):
        merged_components(gaussian_mixture(MEANS), groups)
