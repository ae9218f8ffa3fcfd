"""Balancing and rotation leave a float layer as it is; statistics and copies of weights are lookups by time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.quantization.balancing import balance, balanced, balanced_input, in_bucket, static_dynamic
from diffusion_jax.quantization.rotation import hadamard, hadamard_block, rotated_kernel
from diffusion_jax.quantization.statistics import no_maxima, pooled_maxima, time_edges, with_batch
from diffusion_jax.timesteps import bucket_of

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(4, 5, 24)).astype(np.float32) * np.logspace(-1, 2, 24, dtype=np.float32)
W = RANDOM.normal(size=(24, 8)).astype(np.float32)
EDGES = time_edges([250.5, 500.5])
T = np.array([10.0, 250.0, 251.0, 1000.0], np.float32)


@jax.jit
def collected(x, t):
    start = no_maxima({"layer": x}, 3)
    return with_batch(start, {"layer": x}, t, EDGES), with_batch(
        with_batch(start, {"layer": x}, t, EDGES), {"layer": 3 * x}, jnp.zeros_like(t), EDGES
    )


def relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def test_the_hadamard_matrix_is_orthogonal_and_of_blocks_of_equal_magnitudes():
    for channels, block in ((16, 16), (24, 8)):
        matrix = np.asarray(hadamard(np.eye(channels, dtype=np.float32)))
        assert hadamard_block(channels) == block
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(channels), atol=1e-6)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-7)
        inside = np.kron(np.eye(channels // block), np.ones((block, block)))
        np.testing.assert_allclose(np.abs(matrix), inside / np.sqrt(block), atol=1e-6)


def test_a_rotation_spreads_one_extreme_channel_over_its_block():
    single = 8.0 * np.eye(16, dtype=np.float32)[3]
    assert np.abs(hadamard(single)).max() == pytest.approx(2.0)


def test_balancing_and_rotation_do_not_change_a_float_layer():
    a = np.abs(X).max(1).mean(0)[None]
    expected = X.astype(np.float64) @ W

    @jax.jit
    def outputs(x, kernel):
        layers = [(balanced(kernel, balance(a, kernel, 0.3)), False), (static_dynamic(a, kernel, 0.3), True)]
        return [jnp.matmul(balanced_input(x, m[0], rotated), k[0], precision="highest") for (m, k), rotated in layers]

    for found in outputs(X, W):
        assert relative(found, expected) < 1e-5


def test_balancing_evens_out_inputs_at_one_and_weights_at_zero():
    a = np.abs(X).max((0, 1))[None]
    inputs = np.abs(balanced_input(X, balance(a, W, 1.0)[0])).max((0, 1))
    weights = np.abs(balanced(W, balance(a, W, 0.0)).kernel[0]).max(-1)
    np.testing.assert_allclose(inputs, 1.0, rtol=1e-5)
    np.testing.assert_allclose(weights, 1.0, rtol=1e-5)


def test_channels_without_values_or_weights_have_finite_factors_other_than_zero():
    a, kernel = np.abs(X).max((0, 1))[None].copy(), W.copy()
    a[:, 2], kernel[5] = 0, 0
    for found in (balance(a, kernel, 0.5), balance(np.zeros_like(a), np.zeros_like(W), 0.5)):
        assert np.all(np.isfinite(found)) and np.all(np.asarray(found) > 0)


def test_times_belong_to_the_published_ranges():
    times = np.array([0.0, 500.0, 501.0, 1000.0])
    np.testing.assert_array_equal(bucket_of(times, time_edges([500.5])), [0, 0, 1, 1])
    assert int(bucket_of(999.0, time_edges([]))) == 0


def test_a_batch_counts_in_the_buckets_of_its_samples_and_nowhere_else():
    once, twice = collected(X, T)
    largest = np.abs(X).max(1)
    np.testing.assert_array_equal(once.samples, [2, 1, 1])
    np.testing.assert_allclose(once.maxima["layer"], [largest[:2].mean(0), largest[2], largest[3]], rtol=1e-6)
    # A second batch, three times as large and in the first bucket alone.
    first = 0.95 * largest[:2].mean(0) + 0.05 * 3 * largest.mean(0)
    np.testing.assert_allclose(twice.maxima["layer"], [first, largest[2], largest[3]], rtol=1e-5)
    np.testing.assert_array_equal(twice.batches, [2, 1, 1])


def test_buckets_with_pooled_statistics_are_one_bucket():
    pooled = pooled_maxima(collected(X, T)[0]).maxima["layer"]
    single = np.abs(X).max(1).mean(0)[None]
    np.testing.assert_allclose(pooled, np.broadcast_to(single, pooled.shape), rtol=1e-5)
    np.testing.assert_allclose(balance(pooled, W, [0.3] * 3)[1], balance(single, W, 0.3)[0], rtol=1e-5)


def test_weights_by_time_are_a_lookup_in_one_program():
    layer = balanced(W, np.stack([np.full(24, m, np.float32) for m in (1.0, 2.0, 4.0)]))
    traces = []

    @jax.jit
    def at(t):
        traces.append(t)
        return in_bucket(layer, t, EDGES)

    for t, m in ((0.0, 1.0), (250.0, 1.0), (300.0, 2.0), (999.0, 4.0)):
        factors, kernel = at(t)
        np.testing.assert_array_equal(factors, np.full(24, m))
        np.testing.assert_allclose(kernel, m * W, rtol=1e-6)
    assert len(traces) == 1


def test_layers_stacked_over_depth_are_those_layers():
    a, kernels = np.abs(RANDOM.normal(size=(3, 2, 24))).astype(np.float32), np.stack([W, 2 * W])
    together = balance(a, kernels, [0.1, 0.2, 0.3])
    folded = balanced(kernels, together, rotated=True)
    for depth in range(2):
        alone = balance(a[:, depth], kernels[depth], [0.1, 0.2, 0.3])
        np.testing.assert_allclose(together[:, depth], alone, rtol=1e-6)
        expected = rotated_kernel(np.asarray(alone)[..., None] * kernels[depth])
        np.testing.assert_allclose(folded.kernel[:, depth], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: hadamard(X, 3),
        lambda: hadamard(X, 16),
        lambda: time_edges([500.0, 250.0]),
        lambda: no_maxima(X, 0),
        lambda: balance(X[:1, 0], W, 1.5),
        lambda: in_bucket(balanced(W, np.ones((3, 24))), T, EDGES),
        lambda: in_bucket(balanced(W, np.ones((3, 24))), 1.0, EDGES[:1]),
        lambda: with_batch(no_maxima(X, 3), X, T, EDGES[:1]),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(InvalidInput):
        wrong()
