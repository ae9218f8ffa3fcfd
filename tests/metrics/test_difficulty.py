"""Difficulty of times: the entropies of Gaussians and mixtures, and drops of loss curves."""

import itertools

import jax
import numpy as np
import pytest

from diffusion_jax import denoisers, metrics, processes
from diffusion_jax.errors import InvalidInput

VP = processes.vp_linear()
KEY = jax.random.key(0)


def clusters(variance):
    """Sums over 50 pairs of neighbouring steps each, of the thousand steps of linear beta."""
    steps = np.arange(1, 1001) / 1000
    return metrics.gaussian_relative_entropies(VP, steps, variance)[:950].reshape(19, 50).sum(axis=1)


def test_the_known_entropies_of_linear_beta():
    """For variance 0.01, known to two digits. Only concentrated data are hardest at least noise."""
    found = clusters(0.01)
    known = [9.6e-3, 5.6e-3, 2.3e-3, 2.7e-4, 5.8e-6]
    np.testing.assert_allclose(found[[0, 1, 2, 5, 10]], known, rtol=0.025)
    assert (np.diff(found) < 0).all()
    assert clusters(0.25).argmax() == 2


def test_entropies_of_gaussians_add_up_over_coordinates_and_vanish_where_nothing_changes():
    times = np.array([0.1, 0.4, 0.4, 0.9])
    parts = [metrics.gaussian_relative_entropies(VP, times, v) for v in (0.1, 0.5)]
    np.testing.assert_allclose(metrics.gaussian_relative_entropies(VP, times, [0.1, 0.5]), sum(parts))
    assert parts[0][1] == 0 and (np.asarray(parts)[:, [0, 2]] > 0).all()
    # Data of the variance of the noise never change; points have no density.
    np.testing.assert_allclose(metrics.gaussian_relative_entropies(VP, times, 1.0), 0.0, atol=1e-12)
    assert metrics.gaussian_relative_entropies(VP, [0.0, 0.1], 0.0)[0] == np.inf


def test_entropies_of_mixtures():
    """Of one component those of a Gaussian; of two on a line the integral."""
    times, samples = np.array([0.02, 0.05, 0.1, 0.3, 0.31, 0.9]), 16_384
    stds = np.array([0.1, 0.3, 1.0])
    one = denoisers.gaussian_mixture(np.ones((1, 3)), stds[None])
    found = metrics.relative_entropies(KEY, VP, one, times, samples)
    # The mean of the data moves as well.
    alpha, sigma = (np.asarray(level(times.astype(np.float32)), np.float64) for level in (VP.alpha, VP.sigma))
    v = (alpha[:, None] * stds) ** 2 + sigma[:, None] ** 2
    moved = 0.5 * (np.diff(alpha)[:, None] ** 2 / v[1:]).sum(axis=1)
    exact = metrics.gaussian_relative_entropies(VP, times, stds**2) + moved
    np.testing.assert_allclose(found, exact, rtol=0.1)

    two = denoisers.gaussian_mixture(np.array([[-1.0], [1.0]]), 0.2)
    found = metrics.relative_entropies(KEY, VP, two, times, samples)
    axis = np.linspace(-5, 5, 4001)
    width = np.sqrt((0.2 * alpha) ** 2 + sigma**2)
    p = [
        sum(np.exp(-0.5 * ((axis - m * a) / w) ** 2) for m in (-1, 1)) / (2 * w * np.sqrt(2 * np.pi))
        for a, w in zip(alpha, width)
    ]
    exact = [np.sum(a * np.log(a / b)) * (axis[1] - axis[0]) for a, b in itertools.pairwise(p)]
    np.testing.assert_allclose(found, exact, rtol=0.1)


def test_a_drop_does_not_depend_on_scale_and_level():
    n = np.arange(400)
    fast, slow = np.exp(-n / 10), np.exp(-n / 40)
    losses = np.stack([1 + 5 * fast, 0.01 * fast, 1 + 5 * slow])
    drops = metrics.normalised_drop(losses)
    np.testing.assert_allclose(drops[0], drops[1], atol=1e-9)
    np.testing.assert_array_equal(drops[:, [0, -1]], [[1, 0]] * 3)
    # The logarithm of 10 is 2.3.
    np.testing.assert_array_equal(metrics.steps_to_drop(losses), [24, 24, 93])
    smooth = metrics.normalised_drop(losses, window=5)
    assert smooth.shape == (3, 396)
    np.testing.assert_allclose(metrics.normalised_drop(losses[0].tolist() + [1.0] * 99, 100)[-1], 0.0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: metrics.gaussian_relative_entropies(VP, [0.5], 1.0), "at least two times"),
        (lambda: metrics.gaussian_relative_entropies(VP, [0.5, 0.6], -1.0), "not negative"),
        (lambda: metrics.gaussian_relative_entropies(processes.absorbing(8), [0.5, 0.6], 1.0), "Gaussian"),
        (
            lambda: metrics.relative_entropies(KEY, VP, denoisers.gaussian_mixture(np.ones((1, 2)), 0.0), [0.0, 0.5]),
            "points, which have no density",
        ),
        (lambda: metrics.gaussian_relative_entropies(VP, [0.5, 0.6], np.nan), "finite numbers"),
        (lambda: metrics.normalised_drop([2.0, np.nan, 1.0]), "NaN"),
        (lambda: metrics.normalised_drop([2.0, 1.0, 2.0]), "ends where it began"),
        (lambda: metrics.normalised_drop([2.0, 1.0], window=2), "window is 2"),
        (lambda: metrics.steps_to_drop([2.0, 1.0], 1.0), "share is 1.0"),
    ],
)
def test_wrong_calls_are_told(call, told):
    with pytest.raises(InvalidInput, match=told):
        call()
