"""Quantisers: what is on their grid stays, errors are at most half a step, groups are apart, bits may be data."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import quantization
from diffusion_jax.errors import InvalidInput
from diffusion_jax.quantization import affine, symmetric

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((3, 8, 4)) * np.asarray([0.1, 1.0, 10.0, 100.0]) + 0.5).astype(np.float32)


@pytest.mark.parametrize("per", ["tensor", "channel", "token", 4])
@pytest.mark.parametrize("make", [symmetric, affine])
def test_errors_are_at_most_half_a_step_and_the_grid_stays(make, per):
    quantizer = make(5, per)

    @jax.jit
    def run(w):
        scales = quantization.scales_of(w, quantizer)
        integers = quantization.quantize(w, scales, quantizer)
        back = quantization.dequantize(integers, scales)
        return (
            scales,
            integers,
            back,
            quantization.quantize(back, scales, quantizer),
            quantization.fake_quantize(w, scales, quantizer),
        )

    scales, integers, back, again, fake = jax.device_get(run(W))
    assert integers.dtype == np.int8 and integers.min() >= -16 and integers.max() <= 15
    np.testing.assert_array_equal(again, integers)
    np.testing.assert_array_equal(fake, back)
    shape = {"tensor": (1, 1, 1), "channel": (1, 1, 4), "token": (3, 8, 1), 4: (3, 2, 1, 4)}[per]
    assert scales.step.shape == shape
    step = scales.step
    wide = np.repeat(step, 4, axis=2).reshape(3, 8, 4) if per == 4 else np.broadcast_to(step, W.shape)
    assert (np.abs(W - back) <= 0.5001 * wide).all()
    # Zero is always there, exactly.
    zero = quantization.dequantize(quantization.quantize(0 * W, scales, quantizer), scales)
    np.testing.assert_array_equal(zero, 0.0)


def test_a_searched_range_gives_up_outliers_and_is_never_worse_in_its_measure():
    values = np.append(RNG.standard_normal(999), 12.0).astype(np.float32)[:, None]
    quantizer, found = affine(4, "tensor"), {}
    for finder in ("max", "mse"):
        scales = quantization.scales_of(values, quantizer, finder)
        found[finder] = np.abs(values - quantization.fake_quantize(values, scales, quantizer)) ** 2.4
    assert found["mse"].sum() < 0.9 * found["max"].sum()
    assert found["mse"][:-1].sum() < 0.8 * found["max"][:-1].sum()


def test_bits_may_be_data_and_more_of_them_are_closer():
    quantizer = affine(8, "channel")

    @jax.jit
    def error(bits):
        scales = quantization.scales_of(W, quantizer, bits=bits)
        return jnp.abs(W - quantization.fake_quantize(W, scales, quantizer, bits)).mean()

    errors = [float(error(np.float32(bits))) for bits in (2, 4, 6, 8)]
    assert all(3 * more < less for less, more in itertools.pairwise(errors))
    assert error._cache_size() == 1
    fixed = quantization.scales_of(W, affine(4, "channel"))
    np.testing.assert_allclose(
        errors[1], np.abs(W - quantization.fake_quantize(W, fixed, affine(4, "channel"))).mean(), rtol=1e-5
    )


def test_rounding_passes_gradients_and_clipping_does_not():
    quantizer = symmetric(4, "tensor")
    scales = quantization.scales_of_range(np.float32([[-1.0]]), np.float32([[1.0]]), quantizer)
    values = np.float32([[-3.0, -0.8, 0.0, 0.33, 2.0]])

    def total(values, step):
        return quantization.fake_quantize(values, scales._replace(step=step), quantizer).sum()

    by_value, by_step = jax.jit(jax.grad(total, (0, 1)))(values, scales.step)
    np.testing.assert_array_equal(by_value, [[0, 1, 1, 1, 0]])
    # LSQ: round(u) - u within the range, the end of the range beyond it.
    u = values / np.asarray(scales.step)
    expected = np.where(np.abs(values) < 1, np.round(u) - u, [[-8, 0, 0, 0, 7]])
    np.testing.assert_allclose(by_step, expected.sum(), rtol=1e-4)


def test_values_without_a_range_are_kept_and_finite():
    quantizer = affine(8, "token")
    values = np.float32([[0, 0], [3, 3], [-2, -2]])
    found = quantization.fake_quantize(values, quantization.scales_of(values, quantizer), quantizer)
    np.testing.assert_allclose(found, values, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: symmetric(1), "bits is 1"),
        (lambda: symmetric(9), "bits is 9"),
        (lambda: affine(4, "chanel"), "did you mean 'channel'"),
        (lambda: affine(4, 0), "per is 0"),
        (lambda: quantization.scales_of(W, affine(4, 3)), r"per is 3.*\(3, 8, 4\)"),
        (lambda: quantization.scales_of(W, affine(4), "mean"), "finder is 'mean'"),
    ],
)
def test_wrong_calls_are_told(call, told):
    with pytest.raises(InvalidInput, match=told):
        call()
