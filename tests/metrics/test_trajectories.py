"""Errors at the end of a run, similarity along it, and how varied samples are: closed forms and invariances."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import metrics
from diffusion_jax.errors import InvalidInput


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_endpoint_error_is_the_rms_and_the_relative_one_has_no_unit(rng):
    x = rng.standard_normal((8, 4, 4, 1))
    assert metrics.endpoint_error(x, x) == 0
    np.testing.assert_allclose(metrics.endpoint_error(x + 0.3, x), 0.3, rtol=1e-12)
    np.testing.assert_allclose(metrics.endpoint_error(1.25 * x, x, relative=True), 0.25, rtol=1e-12)
    np.testing.assert_allclose(metrics.endpoint_error(jnp.zeros(x.shape), x, relative=True), 1.0, rtol=1e-12)
    with pytest.raises(InvalidInput, match="compared with"):
        metrics.endpoint_error(x, x[:4])
    with pytest.raises(InvalidInput, match="relative to zero"):
        metrics.endpoint_error(x, 0 * x, relative=True)


def test_similarity_is_one_along_a_direction_minus_one_against_it_and_the_cosine_between(rng):
    a = rng.standard_normal((5, 8, 3, 3, 1))
    signs = np.array([1, 1, -1, -1, 1.0])
    scaled = a * (signs * [1, 2, 3, 4, 5])[:, None, None, None, None]
    np.testing.assert_allclose(metrics.trajectory_similarity(a, scaled), signs, rtol=1e-12)
    angle = np.linspace(0, np.pi, 7)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]
    straight = np.broadcast_to([2.0, 0.0], circle.shape)
    np.testing.assert_allclose(metrics.trajectory_similarity(straight, circle), np.cos(angle), atol=1e-12)
    with pytest.raises(InvalidInput, match="direction"):
        metrics.trajectory_similarity(a, 0 * a)


def test_as_many_modes_are_counted_as_are_equally_frequent(rng):
    np.testing.assert_allclose(metrics.effective_modes(np.repeat([3, 7, 9], 5)), 3.0)
    np.testing.assert_allclose(metrics.effective_modes(jnp.full((6,), 2)), 1.0)
    np.testing.assert_allclose(metrics.effective_modes(np.full((4, 10), 0.1)), 10.0)
    np.testing.assert_allclose(metrics.effective_modes(np.eye(8)[:4]), 4.0)
    assert 1 < metrics.effective_modes(np.array([0] * 9 + [1])) < 2
    with pytest.raises(InvalidInput, match="sum to 1"):
        metrics.effective_modes(np.full((4, 10), 0.2))
    with pytest.raises(InvalidInput, match="integers"):
        metrics.effective_modes(rng.standard_normal(5))


def test_the_pairwise_distance_counts_different_samples_and_stays_within_a_condition(rng):
    features = rng.standard_normal((30, 6))
    gaps = np.linalg.norm(features[:, None] - features[None], axis=-1)
    np.testing.assert_allclose(metrics.pairwise_distance(features), gaps.sum() / (30 * 29))
    two = np.array([[0.0, 0], [3, 4], [100, 0], [100, 1]])
    np.testing.assert_allclose(metrics.pairwise_distance(two, [0, 0, 1, 1]), (5 + 1) / 2)
    np.testing.assert_allclose(metrics.pairwise_distance(np.ones((4, 2, 2))), 0.0)
    with pytest.raises(InvalidInput, match="at least two"):
        metrics.pairwise_distance(two, [0, 0, 1, 2])
    with pytest.raises(InvalidInput, match="labels"):
        metrics.pairwise_distance(two, [0, 0])


def test_errors_by_sample_make_up_the_endpoint_error_and_their_median_is_not_moved_by_one(rng):
    x, reference = rng.standard_normal((2, 9, 4, 4, 1))
    apart = metrics.errors_by_sample(x, reference)
    np.testing.assert_allclose(np.sqrt(np.mean(apart**2)), metrics.endpoint_error(x, reference), rtol=1e-12)
    far = reference + 0.5
    far[0] += 100
    assert np.median(metrics.errors_by_sample(far, reference)) == pytest.approx(0.5)
    with pytest.raises(InvalidInput, match="compared with"):
        metrics.errors_by_sample(x, reference[:4])


def test_what_is_undecided_is_the_relative_distance_to_what_becomes_of_a_sample(rng):
    x = rng.standard_normal((6, 4, 4, 1))
    distances = metrics.undecided(np.stack([0 * x, x, 3 * x]), x)
    np.testing.assert_allclose(distances, [1.0, 0.0, 2.0], atol=1e-12)
    # Each sample counts the same, however large it is.
    said = np.stack([x, x])
    said[1, 0] = 0.0
    np.testing.assert_allclose(metrics.undecided(said, x), [0.0, 1 / 6], atol=1e-12)
    with pytest.raises(InvalidInput, match="shape of x"):
        metrics.undecided(said[:, :3], x)
    with pytest.raises(InvalidInput, match="relative to zero"):
        metrics.undecided(said, 0 * x)
