"""Image measures agree with scikit-image; what sampling costs is read and timed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffusion_jax import data, metrics
from diffusion_jax.errors import InvalidInput
from diffusion_jax.typing import Cost


@pytest.fixture(scope="module")
def pair():
    images = data.patches(size=24, downscale=4).x0[::40][:5]
    noisy = np.clip(
        images
        + np.linspace(0.05, 0.6, 5)[:, None, None, None] * np.random.default_rng(0).standard_normal(images.shape),
        -1,
        1,
    ).astype(np.float32)
    return images, noisy


def test_psnr_is_that_of_scikit_image(pair):
    got = jax.jit(metrics.psnr)(*map(jnp.asarray, pair))
    expected = [peak_signal_noise_ratio(a, b, data_range=2) for a, b in zip(*pair, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.isinf(metrics.psnr(jnp.asarray(pair[0]), jnp.asarray(pair[0]))).all()


def test_psnr_under_a_mask_is_that_of_what_it_shows(pair):
    a, b = map(jnp.asarray, pair)
    mask = np.zeros((*a.shape[:3], 1), np.float32)
    mask[:, 2:7, 1:6] = 1
    got = jax.jit(lambda a, b: metrics.psnr(a, b, mask=mask))(a, b)
    np.testing.assert_allclose(got, metrics.psnr(a[:, 2:7, 1:6], b[:, 2:7, 1:6]), rtol=1e-5)


@pytest.mark.parametrize("gaussian", [False, True])
def test_ssim_is_that_of_scikit_image(pair, gaussian):
    options = {"gaussian_weights": True, "use_sample_covariance": False} if gaussian else {}
    measure = jax.jit(lambda a, b: metrics.ssim(a, b, gaussian=gaussian))
    expected = [
        structural_similarity(a.astype(np.float64), b.astype(np.float64), data_range=2, channel_axis=-1, **options)
        for a, b in zip(*pair, strict=True)
    ]
    np.testing.assert_allclose(measure(*map(jnp.asarray, pair)), expected, atol=2e-5)
    np.testing.assert_allclose(measure(jnp.asarray(pair[0]), jnp.asarray(pair[0])), 1.0, atol=1e-6)


def test_ssim_falls_with_noise_and_has_a_gradient(pair):
    a, b = map(jnp.asarray, pair)
    values = np.asarray(
        metrics.ssim(a[:1].repeat(3, 0), a[:1] + jnp.array([0.05, 0.2, 0.6])[:, None, None, None] * (b - a)[4:])
    )
    assert (np.diff(values) < 0).all()
    gradient = jax.jit(jax.grad(lambda x: metrics.ssim(x, b).sum()))(a)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_an_image_smaller_than_the_window_is_refused():
    with pytest.raises(InvalidInput, match="at least 7 x 7"):
        metrics.ssim(jnp.zeros((1, 6, 6, 1)), jnp.zeros((1, 6, 6, 1)))


def test_class_accuracy_counts_over_all_and_per_class():
    logits = np.eye(4)[[0, 1, 1, 2]]
    result = metrics.class_accuracy(logits, None, [0, 1, 2, 2])
    assert result.mean == 0.75
    np.testing.assert_array_equal(result.per_class, [1, 1, 0.5, np.nan])
    assert metrics.class_accuracy(lambda images: images, logits, [0, 1, 1, 2]).mean == 1
    with pytest.raises(InvalidInput, match="labels"):
        metrics.class_accuracy(logits, None, [0, 1])


class Result(NamedTuple):
    x: jax.Array
    cost: Cost


def test_sampling_cost_reads_the_evaluations_and_leaves_the_first_call_out():
    calls = []

    def run():
        calls.append(None)
        return Result(jnp.ones(4), Cost(jnp.float32(20), jnp.float32(7.5)))

    cost = metrics.sampling_cost(run, 4, repeats=3)
    assert len(calls) == 4
    assert (cost.nfe, cost.compute) == (20, 7.5)
    np.testing.assert_allclose(cost.seconds_per_sample * cost.images_per_second, 1)
    assert np.isnan(metrics.sampling_cost(lambda: jnp.ones(3), 3, repeats=1).nfe)
    with pytest.raises(InvalidInput, match="num_samples"):
        metrics.sampling_cost(run, 0)
