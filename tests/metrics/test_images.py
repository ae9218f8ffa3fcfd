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
    slope = jax.jit(jax.grad(lambda x, b: metrics.ssim(x, b).sum()))
    assert np.isfinite(slope(a, b)).all() and np.abs(slope(a, b)).max() > 0
    # At equal and at constant images, where deviations vanish, it is finite too.
    for same in (a, jnp.zeros_like(a), jnp.full_like(a, -0.5)):
        np.testing.assert_allclose(slope(same, same), 0, atol=1e-5)


TYPES = {
    "uint8": (255, None),
    "uint16": (65535, None),
    "bool": (1, None),
    "int32": (1000, 1000.0),
    "float16": (2, None),
    "bfloat16": (2, None),
    "float64": (2, None),
}


@pytest.mark.parametrize("name", TYPES)
def test_images_of_every_type_are_compared_by_the_arithmetic_of_their_values(pair, name):
    """Integers are not subtracted as integers, which wrap, and half precision is not rounded on the way."""
    span, data_range = TYPES[name]
    dtype = jnp.dtype(name)
    if jnp.issubdtype(dtype, jnp.floating):
        a, b = (np.asarray(one).astype(dtype) for one in pair)
    else:
        a, b = (np.round((one + 1) / 2 * span).astype(dtype) for one in pair)
    exact = [one.astype(np.float64) for one in (a, b)]
    psnr = 10 * np.log10(span**2 / np.square(exact[0] - exact[1]).mean((1, 2, 3)))
    ssim = [structural_similarity(*both, data_range=span, channel_axis=-1) for both in zip(*exact)]
    for convert in (np.asarray, jnp.asarray):
        np.testing.assert_allclose(metrics.psnr(convert(a), convert(b), data_range=data_range), psnr, rtol=1e-5)
        np.testing.assert_allclose(metrics.ssim(convert(a), convert(b), data_range=data_range), ssim, atol=5e-5)
    traced = jax.jit(lambda a, b: metrics.psnr(a, b, data_range=data_range))(a, b)
    np.testing.assert_allclose(traced, psnr, rtol=1e-5)


def test_a_nan_is_that_of_its_image_and_an_empty_mask_compares_nothing(pair):
    a, b = (np.array(one) for one in pair)
    a[1, 3, 3, 0] = np.nan
    for measure in (metrics.psnr, metrics.ssim):
        np.testing.assert_array_equal(np.isnan(measure(a, b)), np.arange(len(a)) == 1)
    mask = np.ones((*b.shape[:3], 1), bool)
    mask[2] = False
    np.testing.assert_array_equal(np.isnan(metrics.psnr(b, pair[0], mask=mask)), np.arange(len(a)) == 2)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_images_whose_range_is_another_are_refused(pair, measure):
    a, b = pair
    for first, second, options, part in [
        (a, b[:1], {}, "two batches of one shape"),
        (a[0], b[0], {}, "two batches of one shape"),
        (a[:0], b[:0], {}, "two batches of one shape"),
        ((a + 1) / 2, (b + 1) / 2, {}, "nothing negative"),
        ((a + 1) * 127.5, (b + 1) * 127.5, {}, "span"),
        ((a + 1) * 127.5, b, {"data_range": 2.0}, "span"),
        ((a * 100).astype(np.uint8), b, {}, "give data_range"),
        ((a * 100).astype(np.int32), (b * 100).astype(np.int32), {}, "give data_range"),
        (a + 1j, b, {}, "real numbers"),
        (a, b, {"data_range": 0}, "data_range"),
        (a, b, {"data_range": np.nan}, "data_range"),
    ]:
        with pytest.raises(InvalidInput, match=part):
            measure(first, second, **options)
    with pytest.raises(InvalidInput, match=r"mask\.shape"):
        metrics.psnr(a, b, mask=np.ones(a.shape))
    np.testing.assert_allclose(metrics.psnr((a + 1) / 2, (b + 1) / 2, data_range=1), metrics.psnr(a, b), rtol=1e-5)


def test_an_image_smaller_than_the_window_is_refused():
    with pytest.raises(InvalidInput, match="at least 7 x 7"):
        metrics.ssim(jnp.zeros((1, 6, 6, 1)), jnp.zeros((1, 6, 6, 1)))


def test_class_accuracy_counts_over_all_and_per_class():
    logits = np.eye(4)[[0, 1, 1, 2]]
    result = metrics.class_accuracy(logits, None, [0, 1, 2, 2])
    assert result.mean == 0.75
    np.testing.assert_array_equal(result.per_class, [1, 1, 0.5, np.nan])
    assert metrics.class_accuracy(lambda images: images, logits, [0, 1, 1, 2]).mean == 1
    for labels in ([0, 1], [0, 1, 2, 4], [-1, 1, 2, 2], [0.0, 1.0, 2.0, 2.0], np.eye(4), ["a", "b", "c", "c"]):
        with pytest.raises(InvalidInput, match="label"):
            metrics.class_accuracy(logits, None, labels)
    for wrong in (logits[:0], logits * np.nan, logits[0]):
        with pytest.raises(InvalidInput, match="logits"):
            metrics.class_accuracy(wrong, None, [0, 1, 2, 2])


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
