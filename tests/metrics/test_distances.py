"""Distances between sets: closed forms, zeros, invariances."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist

from diffusion_jax import metrics
from diffusion_jax.errors import InvalidInput
from diffusion_jax.metrics.kernel import squared_distances


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


@pytest.mark.parametrize(
    ("shift", "sizes", "options"),
    [
        (0.0, (120, 120), {}),
        (1.0, (120, 120), {}),
        (0.0, (60, 150), {"subsets": 30, "subset_size": 40}),
        (0.7, (60, 150), {"subsets": 30, "subset_size": 40}),
        (0.7, (150, 150), {"subsets": 3, "subset_size": 50}),
    ],
)
def test_the_standard_error_is_the_spread_of_the_estimate_over_draws_and_covers_the_truth(rng, shift, sizes, options):
    """In one dimension the kernel is `1 + 3xy + 3x^2y^2 + x^3y^3`, so MMD^2 is a sum over differences of moments."""
    means, errors = np.transpose(
        [
            metrics.kernel_distance(
                rng.uniform(-1, 1, (sizes[0], 1)), rng.uniform(-1, 1, (sizes[1], 1)) + shift, **options
            )
            for _ in range(200)
        ]
    )
    moments = [[0, 1 / 3, 0], [shift, 1 / 3 + shift**2, shift + shift**3]]
    truth = np.square(np.subtract(*moments)) @ [3, 3, 1]
    np.testing.assert_allclose(means.mean(), truth, atol=4 * means.std() / np.sqrt(len(means)))
    ratio = np.sqrt(np.mean(errors**2)) / means.std()
    assert 0.8 < ratio < (1.25 if shift else 1.9)
    assert np.mean(np.abs(means - truth) < 1.96 * errors) > 0.89


def test_the_standard_error_is_not_made_small_by_many_subsets_or_equal_sets(rng):
    x, y = rng.standard_normal((2, 100, 3))
    all_at_once = metrics.kernel_distance(x, y).standard_error
    errors = [metrics.kernel_distance(x, y, subsets=n, subset_size=50).standard_error for n in (10, 100, 1000)]
    assert min(errors) > 0.7 * all_at_once
    assert metrics.kernel_distance(x, x).standard_error > 0.5 * all_at_once
    assert np.isnan(metrics.kernel_distance(x[:3], y[:3]).standard_error)


def test_far_from_the_origin_no_digits_are_lost(rng):
    x, y = rng.standard_normal((40, 3)), rng.standard_normal((30, 3)) + 0.5
    # An offset of which x + offset - offset is x: to the last bit nothing but a shift.
    far = 2.0**30
    x, y = (np.round(one * 2**10) / 2**10 for one in (x, y))
    for measure in (
        lambda x, y: metrics.mmd2(x, y, "gaussian", 1.0),
        lambda x, y: metrics.mmd2(x, y, "laplace"),
        metrics.sliced_wasserstein,
        metrics.energy_distance,
        metrics.frechet_distance,
    ):
        np.testing.assert_allclose(measure(x + far, y + far), measure(x, y), rtol=1e-6)
    assert metrics.manifold(x + far, y + far) == metrics.manifold(x, y)
    np.testing.assert_allclose(squared_distances(x + far, y + far), cdist(x, y, "sqeuclidean"), rtol=1e-12)
    # The polynomial kernel itself moves with the offset: in extended precision it is as it stands.
    a, b = (one.astype(np.longdouble) + 1000 for one in (x, y))
    values = [((u @ v.T) / 3 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b))]
    inside = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in values[:2]]
    expected = float(sum(inside) - 2 * values[2].mean())
    np.testing.assert_allclose(metrics.mmd2(x + 1000, y + 1000, "polynomial"), expected, rtol=1e-7)


@pytest.mark.parametrize(("n", "m", "dimensions"), [(5, 6, 300), (40, 30, 20)])
def test_frechet_of_few_samples_is_that_of_their_own_factors(rng, n, m, dimensions):
    """With S = R'R, R the centred samples themselves, the trace of the root is the nuclear norm of an N x M matrix."""
    x, y = rng.standard_normal((n, dimensions)), 1.3 * rng.standard_normal((m, dimensions)) + 0.1
    a, b = (x - x.mean(0)) / np.sqrt(n - 1), (y - y.mean(0)) / np.sqrt(m - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-11)


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


@pytest.mark.parametrize("closed", [False, True])
def test_ties_are_outside_as_in_prdc_or_inside_as_in_the_first_publication(rng, closed):
    """Whole numbers have ties everywhere; distances are those of integers, which nothing rounds."""
    real, drawn = (rng.integers(0, 4, (size, 3)) for size in (60, 50))

    def reach(points, k):
        return np.sort(((points[:, None] - points) ** 2).sum(-1), axis=1)[:, k]

    across = ((real[:, None] - drawn) ** 2).sum(-1)
    inside = np.less_equal if closed else np.less
    for k in (1, 3, 5):
        of_real, of_drawn = inside(across, reach(real, k)[:, None]), inside(across, reach(drawn, k))
        expected = of_real.any(0).mean(), of_drawn.any(1).mean(), of_real.sum(0).mean() / k, of_real.any(1).mean()
        for offset in (0, 10**6):
            got = metrics.manifold(real + offset, drawn + offset, k, closed=closed)
            np.testing.assert_allclose(got, expected, rtol=1e-12)
    copies = np.repeat(rng.standard_normal((5, 2)), 4, axis=0)
    # Of k + 1 copies each has a ball of radius 0: it holds its own place only where it is closed.
    assert metrics.manifold(copies, copies, 3, closed=closed) == ((1, 1, 4 / 3, 1) if closed else (0, 0, 0, 0))


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
        (lambda x: metrics.mmd2(x, x, bandwidth=np.nan), "bandwidth"),
        (lambda x: metrics.wasserstein(x, x, p=np.inf), "p is"),
        (lambda x: metrics.gaussian_frechet_distance(x[0], np.eye(3), x[0], np.eye(2)), "covariances"),
        (lambda x: metrics.gaussian_frechet_distance(x[0], np.eye(3) * np.nan, x[0], np.eye(3)), "NaN"),
        (lambda x: metrics.endpoint_error(x, x + 1j), "real numbers"),
    ],
)
def test_wrong_input_is_named(rng, call, part):
    with pytest.raises(InvalidInput, match=part):
        call(rng.standard_normal((10, 3)))


SETS = {
    "frechet": metrics.frechet_distance,
    "kernel": metrics.kernel_distance,
    "mmd2": metrics.mmd2,
    "manifold": metrics.manifold,
    "sliced": metrics.sliced_wasserstein,
    "wasserstein": metrics.wasserstein,
    "one dimension": metrics.wasserstein_1d,
    "energy": metrics.energy_distance,
}


@pytest.mark.parametrize("name", SETS)
def test_every_distance_of_sets_is_that_of_numbers_whatever_their_type_and_of_nothing_else(rng, name):
    """Differences of unsigned integers and of half precision would wrap and round."""
    measure = SETS[name]
    x, y = rng.integers(0, 250, (2, 20, 3))
    expected = measure(x.astype(float), y.astype(float))
    for dtype in (np.uint8, np.uint16, np.int64, np.float32, jnp.bfloat16):
        # Eight bits of bfloat16 hold these integers.
        np.testing.assert_array_equal(measure(x.astype(dtype), y.astype(dtype)), expected)
    for wrong, part in (
        (np.where(x == x[0], np.nan, x), "NaN or an infinity"),
        (np.where(x == x[0], np.inf, x), "NaN or an infinity"),
        (x[:0], "shape"),
        (x[:, 0], "shape"),
        (x + 1j, "real numbers"),
        (x.astype(str), "real numbers"),
        ([[1.0, 2.0], [3.0]], "real numbers"),
    ):
        for pair in ((wrong, y), (y, wrong)):
            with pytest.raises(InvalidInput, match=part):
                measure(*pair)
