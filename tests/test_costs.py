"""Operations and bytes are those that one counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import acceleration, denoisers, models, processes
from diffusion_jax.costs import carry_bytes, count_bytes, count_flops, evaluation_flops, peak_flops, training_flops
from diffusion_jax.typing import Aux, Objective

WIDTH, HEADS, TOKENS, BATCH = 16, 2, 4, 3


def transformer(depth):
    """A DiT on 4 x 4 pixels in patches of 2, with the arguments of its `apply`."""
    network = models.dit("S/2", width=WIDTH, depth=depth, heads=HEADS, conditions=(models.label(3),))
    x, t, cond = jnp.zeros((BATCH, 4, 4, 1)), jnp.zeros(BATCH), {"label": jnp.zeros(BATCH, jnp.int32)}
    return network, (models.param_shapes(network, (1, 4, 4, 1), one(cond)), x, t, cond)


def one(cond):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1,), leaf.dtype), cond)


def test_a_block_of_a_transformer_costs_its_products():
    counts = {}
    for depth in (2, 3):
        network, arguments = transformer(depth)
        counts[depth] = count_flops(lambda *a, network=network: network.apply(*a)[0], *arguments)
    per_token = 4 * WIDTH**2 + 2 * 4 * WIDTH**2 + 2 * TOKENS * WIDTH
    modulation = 2 * 3 * WIDTH * WIDTH
    assert counts[3] - counts[2] == 2 * BATCH * (TOKENS * per_token + modulation)


def test_a_published_network_costs_what_was_published():
    """DiT-XL/2 at 256 pixels: 118.64 Gflops, where a multiplication and addition counts once (Peebles & Xie 2023)."""
    network, cond = (
        models.dit("XL/2", conditions=(models.label(1000),), learn_sigma=True),
        {"label": jnp.zeros(1, jnp.int32)},
    )
    params = models.param_shapes(network, (1, 32, 32, 4), one(cond))
    count = count_flops(lambda *a: network.apply(*a)[0], params, jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), cond)
    assert abs(count / 2e9 - 118.64) < 0.05


def test_products_convolutions_and_loops():
    a, b = jnp.zeros((2, 3, 5)), jnp.zeros((2, 5, 7))
    assert count_flops(jnp.matmul, a, b) == 2 * 2 * 3 * 5 * 7
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 2, 6))

    def convolve(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dims, feature_group_count=2)

    assert count_flops(convolve, x, kernel) == 2 * (4 * 4 * 6) * 3 * 3 * 2
    square = jnp.zeros((4, 4))

    def repeated(m):
        return jax.lax.scan(lambda h, _: (jax.jit(jnp.matmul)(h, m), None), m, None, length=5)[0]

    assert count_flops(repeated, square) == 5 * 2 * 4**3
    dearest = count_flops(lambda m: jax.lax.cond(m[0, 0] > 0, lambda m: m @ m @ m, lambda m: m @ m, m), square)
    assert dearest == 2 * 2 * 4**3


def test_what_nothing_depends_on_is_not_counted_and_nothing_is_computed():
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def function(m):
        unused = m @ m
        return jax.checkpoint(lambda m: m @ m)(m), unused[:0]

    assert count_flops(lambda m: function(m)[0], square) == 2 * 4**3
    assert count_flops(lambda m: m + 1, square) == 0


def test_bytes_of_arrays_and_of_their_shapes():
    tree = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": [jax.ShapeDtypeStruct((5,), jnp.float32)], "c": None}
    assert count_bytes(tree) == 2 * 3 * 2 + 5 * 4
    assert count_bytes(()) == 0


def test_an_evaluation_costs_what_it_computes_and_a_carry_what_it_keeps():
    network, (params, x, t, cond) = transformer(3)
    whole = count_flops(lambda *inputs: network.apply(*inputs)[0], params, x, t, cond)
    assert evaluation_flops(network, params, jax.ShapeDtypeStruct(x.shape, x.dtype), cond) == whole > 0
    process = processes.vp_linear()
    reused = acceleration.cached_features(network, process, acceleration.reuse(), acceleration.every(2))
    # Two modules in each of three blocks; a knot, a basis of one and three counters.
    assert carry_bytes(reused, params, x, cond) == 4 * (6 * BATCH * TOKENS * WIDTH + 5)
    assert carry_bytes(denoisers.denoiser(network, process), params, x, cond) == 0


@pytest.mark.parametrize("remat", [False, True])
def test_a_training_step_is_three_forward_passes_whatever_is_computed_again(remat):
    """Two layers; the first one's gradient with respect to the data is not needed."""

    def layer(h, kernel):
        return jnp.tanh(h @ kernel)

    def loss(params, state, batch, key):
        h = batch["x0"]
        for name in ("a", "b"):
            h = (jax.checkpoint(layer) if remat else layer)(h, params.get(name, state))
        return jnp.square(h).mean(axis=1), Aux(state, {}, {})

    objective = Objective(lambda *a: None, loss)
    kernel, batch = jnp.ones((WIDTH, WIDTH)), {"x0": jnp.ones((BATCH, WIDTH))}
    one_layer = 2 * BATCH * WIDTH**2
    both = training_flops(objective, {"a": kernel, "b": kernel}, kernel, batch)
    assert both == (6 if remat else 5) * one_layer
    if not remat:
        assert training_flops(objective, {"b": kernel}, kernel, batch) == 3 * one_layer


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 MIG 3g.71gb", None),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_what_devices_call_themselves(kind, peak):
    assert peak_flops(kind) == peak
