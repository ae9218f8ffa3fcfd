"""Distances between sets: closed forms, zeros, invariances."""

import numpy as np
import pytest
import scipy.stats

from diffusion_jax import metrics
from diffusion_jax.errors import InvalidInput


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rotation(rng, dimensions):
    return np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]


@pytest.mark.parametrize(("count", "dimensions"), [(200, 8), (10, 40)])
def test_frechet_of_a_set_with_itself_is_zero_even_when_singular(rng, count, dimensions):
    x = rng.standard_normal((count, dimensions))
    assert metrics.frechet_distance(x, x) < 1e-8


def test_frechet_of_two_gaussians_that_share_axes_has_a_closed_form(rng):
    a, b, apart = rng.uniform(0.2, 2, 6), rng.uniform(0.2, 2, 6), rng.standard_normal(6)
    turn = rotation(rng, 6)
    got = metrics.gaussian_frechet_distance(
        np.zeros(6), turn @ np.diag(a**2) @ turn.T, apart, turn @ np.diag(b**2) @ turn.T
    )
    np.testing.assert_allclose(got, apart @ apart + ((a - b) ** 2).sum(), rtol=1e-10)


def test_frechet_of_gaussians_that_do_not_commute_agrees_with_the_matrix_root(rng):
    a, b = (m @ m.T for m in rng.standard_normal((2, 5, 5)))
    expected = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b).real)
    np.testing.assert_allclose(metrics.gaussian_frechet_distance(np.zeros(5), a, np.zeros(5), b), expected, rtol=1e-8)


def test_frechet_is_symmetric_and_unmoved_by_rotations_shifts_and_scales_with_squares(rng):
    x, y = rng.standard_normal((80, 6)), rng.standard_normal((90, 6)) * rng.uniform(0.5, 2, 6) + 0.3
    distance = metrics.frechet_distance(x, y)
    turn = rotation(rng, 6)
    np.testing.assert_allclose(metrics.frechet_distance(y, x), distance, rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(x @ turn + 5, y @ turn + 5), distance, rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(3 * x, 3 * y), 9 * distance, rtol=1e-9)


def test_moments_merge_in_any_grouping(rng):
    x = rng.standard_normal((100, 4)) + 1e4
    parts = [metrics.moments(part) for part in np.split(x, [1, 30, 77])]
    left = metrics.merge(metrics.merge(metrics.merge(parts[0], parts[1]), parts[2]), parts[3])
    right = metrics.merge(parts[3], metrics.merge(parts[2], metrics.merge(parts[1], parts[0])))
    for merged in (left, right):
        assert merged.count == 100
        np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=1e-7, atol=1e-9)
    assert metrics.frechet_distance(left, x) < 1e-6


def test_the_kernel_distance_is_unbiased(rng):
    values = [
        metrics.kernel_distance(rng.standard_normal((40, 4)), rng.standard_normal((30, 4)), subsets=4).mean
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)
    shifted = metrics.kernel_distance(rng.standard_normal((300, 4)), rng.standard_normal((300, 4)) + 1)
    assert shifted.mean > 10 * np.std(values)


def test_the_biased_discrepancy_of_a_set_with_itself_is_zero_and_all_kernels_see_a_shift(rng):
    x, y = rng.standard_normal((200, 3)), rng.standard_normal((150, 3)) + 0.8
    for kernel in ("gaussian", "laplace", "polynomial"):
        assert abs(metrics.mmd2(x, x, kernel, unbiased=False)) < 1e-9
        assert metrics.mmd2(x, y, kernel) > 5 * abs(metrics.mmd2(x[:100], x[100:], kernel))


def test_the_gaussian_discrepancy_of_two_gaussians_has_a_closed_form(rng):
    # E k(X, Y) for unit normals at distance d and bandwidth h: (h^2 / (h^2 + 2))^(D / 2) exp(-d^2 / (2 h^2 + 4)).
    h, d = 1.5, 1.2
    expected = 2 * (h**2 / (h**2 + 2)) * (1 - np.exp(-(d**2) / (2 * h**2 + 4)))
    x, y = rng.standard_normal((3000, 2)), rng.standard_normal((3000, 2)) + np.array([d, 0])
    np.testing.assert_allclose(metrics.mmd2(x, y, bandwidth=h), expected, rtol=0.06)


def test_precision_and_recall_of_identical_sets_are_one_and_of_distant_ones_zero(rng):
    x = rng.standard_normal((100, 5))
    same = metrics.manifold(x, x)
    assert same.precision == same.recall == same.coverage == 1.0 and same.density >= 1.0
    assert metrics.manifold(x, x + 100) == (0, 0, 0, 0)


def test_precision_falls_with_bad_samples_and_recall_with_lost_modes(rng):
    modes = np.array([[-20.0, 0.0], [20.0, 0.0]])
    real = rng.standard_normal((200, 2)) + np.repeat(modes, 100, axis=0)
    one_mode = rng.standard_normal((200, 2)) + modes[0]
    lost = metrics.manifold(real, one_mode)
    assert lost.precision > 0.9 and lost.recall < 0.55 and lost.coverage < 0.55
    half_noise = np.concatenate([one_mode[:100], rng.standard_normal((100, 2)) + np.array([0, 500])])
    assert metrics.manifold(real, half_noise).precision < 0.55


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension(rng):
    x, shift = rng.standard_normal((60, 3)), np.array([1.0, -2.0, 0.5])
    got = metrics.sliced_wasserstein(x, x + shift, projections=20_000)
    np.testing.assert_allclose(got, np.linalg.norm(shift) / np.sqrt(3), rtol=0.02)
    assert metrics.sliced_wasserstein(x, x[::-1]) == 0
    np.testing.assert_allclose(metrics.wasserstein(x, rng.permutation(x + shift)), np.linalg.norm(shift), rtol=1e-10)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 70), (7, 100)])
def test_one_dimensional_distances_agree_with_scipy(rng, n, m):
    x, y = rng.standard_normal(n), rng.exponential(size=m)
    got = metrics.wasserstein_1d(x[:, None], y[:, None], p=1.0)[0]
    np.testing.assert_allclose(got, scipy.stats.wasserstein_distance(x, y), rtol=1e-9)
    energy = metrics.energy_distance(x[:, None], y[:, None])
    np.testing.assert_allclose(energy, scipy.stats.energy_distance(x, y) ** 2, rtol=1e-9)


def test_sliced_never_exceeds_the_whole_and_neither_depends_on_order(rng):
    x, y = rng.standard_normal((40, 2)), rng.uniform(-2, 2, (40, 2))
    assert metrics.sliced_wasserstein(x, y) <= metrics.wasserstein(x, y)
    np.testing.assert_allclose(metrics.wasserstein(x, y), metrics.wasserstein(y[::-1], x), rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda x: metrics.frechet_distance(x, x[:, :2]), "features"),
        (lambda x: metrics.frechet_distance(x[:1], x), "at least two"),
        (lambda x: metrics.frechet_distance(x * np.nan, x), "NaN"),
        (lambda x: metrics.moments(x[0]), "features.shape"),
        (lambda x: metrics.kernel_distance(x, x[:, :2]), "shapes"),
        (lambda x: metrics.kernel_distance(x, x, subsets=0), "subsets"),
        (lambda x: metrics.mmd2(x, x, "gausian"), "did you mean 'gaussian'"),
        (lambda x: metrics.mmd2(x, x, bandwidth=-1.0), "bandwidth"),
        (lambda x: metrics.manifold(x, x, k=len(x)), "k is"),
        (lambda x: metrics.sliced_wasserstein(x, x, projections=0), "projections"),
        (lambda x: metrics.wasserstein(x, x[1:]), "equal sizes"),
        (lambda x: metrics.energy_distance(x, x[:, :1]), "shapes"),
    ],
)
def test_wrong_input_is_named(rng, call, part):
    with pytest.raises(InvalidInput, match=part):
        call(rng.standard_normal((10, 3)))
