"""Learned rounding: it begins at the weights, ends on their grid, and each block comes closer to the plain one."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, processes, quantization
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from diffusion_jax.quantization import affine, quantized, reconstructed, symmetric
from diffusion_jax.quantization.quantizers import grouped
from tests.models.openings import LEVELS
from tests.models.shared import T, drawn_params, image, labels, tiny_dit

FLOW = processes.rectified_flow()
X, COND = image((2, 4, 4, 3)), labels(0, 2)
NETWORK = tiny_dit()
PARAMS = drawn_params(NETWORK, X, T, COND)
WEIGHTS = symmetric(3)
TIMES = np.asarray([0.9, 0.6, 0.3, 0.1], np.float32)
STATES = np.random.default_rng(0).standard_normal((2, 4, 4, 4, 3)).astype(np.float32)
HOW = {"key": jax.random.key(0), "steps": 500, "batch": 8, "learning_rate": 2e-2, "strength": 0.1}


@cache
def parameters():
    return quantized(NETWORK, WEIGHTS).quantize(PARAMS, X, T, COND)


@cache
def found():
    given = {"cond": COND, "null": {"label": np.asarray([3], np.int32)}}
    return reconstructed(NETWORK, parameters(), WEIGHTS, FLOW, PARAMS, STATES, TIMES, **given, **HOW)


@pytest.mark.parametrize("quantizer", [symmetric(3), affine(4, 8)])
def test_soft_weights_begin_at_the_weights_and_only_move_between_their_neighbours(quantizer):
    kernel = np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32)
    scales = quantization.scales_of(kernel, quantizer)

    @jax.jit
    def tried(kernel, scales):
        exact = grouped(kernel, quantizer.per) / scales.step
        v = quantization.rounding_start(exact - jnp.floor(exact))
        penalty = jax.grad(lambda v: quantization.rounding_penalty(v, 4.0).sum())
        ends = [quantization.softly_rounded(kernel, scales, quantizer, np.full(v.shape, e, "f")) for e in (-9, 9)]
        soft = quantization.softly_rounded(kernel, scales, quantizer, v)
        nearest = quantization.fake_quantize(kernel, scales, quantizer)
        return soft, ends, quantization.rounding_share(v), penalty(v), nearest

    soft, (down, up), share, slope, nearest = jax.device_get(tried(kernel, scales))
    # But for what lies beyond the ends of the grid, as the rounded zero point has them.
    wide = grouped(kernel, quantizer.per)
    most = 2 ** (quantizer.bits - 1)
    ends = [np.asarray(scales.step) * (end - np.asarray(scales.zero, np.float32)) for end in (-most, most - 1)]
    np.testing.assert_allclose(soft, np.clip(wide, *ends).reshape(kernel.shape), atol=2e-6)
    assert ((np.abs(nearest - down) < 1e-5) | (np.abs(nearest - up) < 1e-5)).all()
    assert np.isfinite(slope).all()
    # Descent of the penalty goes to the end that is nearer.
    inside = (np.abs(share - 0.5) > 0.01) & (share > 0) & (share < 1)
    assert inside.any() and (np.sign(-slope) == np.sign(share - 0.5))[inside].all()


def test_every_block_comes_closer_and_the_weights_are_neighbours_on_the_grid():
    made = found()
    (path,) = made.nearest
    assert made.nearest[path].shape == (3,) and (made.learned[path] < made.nearest[path]).all()
    assert min(share.min() for share in made.settled.values()) > 0.99
    before, after, plain = by_path(parameters()), by_path(made.parameters), by_path(PARAMS)
    assert set(before) == set(after)
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved and all(name.startswith("quantized/blocks/") and name.endswith("/kernel") for name in moved)
    for name in moved:
        step = np.asarray(before[name.replace("/kernel", "/step")])
        exact = np.asarray(plain[name.removeprefix("quantized/")]) / step
        assert (np.abs(np.clip(exact, -4, 3) - np.asarray(after[name], np.float32)) <= 1.0001).all()


def test_the_whole_network_is_closer_than_with_weights_rounded_to_the_nearest():
    x, t = STATES.reshape(8, 4, 4, 3), np.tile(TIMES * 1000, 2)
    cond = {"label": np.repeat(np.asarray([0, 2], np.int32), 4)}
    one = quantized(NETWORK, WEIGHTS)
    plain = jax.jit(lambda x, t: NETWORK.apply(PARAMS, x, t, cond)[0])(x, t)
    program = jax.jit(lambda params, x, t: one.network.apply(params, x, t, cond)[0])
    nearest, learned = (
        float(np.mean((program(params, x, t) - plain) ** 2)) for params in (parameters(), found().parameters)
    )
    assert learned < nearest / 2


def test_blocks_without_depth_are_learned_in_the_order_in_which_they_run():
    network = models.unet("digits", **LEVELS)
    params = drawn_params(network, X, T, None)
    made = quantized(network, WEIGHTS).quantize(params, X, T)
    blocks = ("*residual*",)
    done = reconstructed(network, made, WEIGHTS, FLOW, params, STATES, TIMES, blocks=blocks, **HOW)
    assert len(done.nearest) > 1
    assert all(done.learned[path] < done.nearest[path] for path in done.nearest)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidInput, match="no quantised kernel"):
        reconstructed(
            NETWORK, parameters(), WEIGHTS, FLOW, PARAMS, STATES, TIMES, COND, blocks="condition", key=HOW["key"]
        )
    with pytest.raises(InvalidInput, match="states and times"):
        reconstructed(NETWORK, parameters(), WEIGHTS, FLOW, PARAMS, STATES[:, 1:], TIMES, COND, key=HOW["key"])
