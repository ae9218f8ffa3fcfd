"""Quantised networks: the plain one at rounded weights, integers in the compiled program, ranges by time, and that
LoRA, caches, guidance, early exit, meshes and checkpoints work with them."""

from functools import cache

import jax
import numpy as np
import pytest

from diffusion_jax import (
    acceleration,
    adapters,
    denoisers,
    distributed,
    models,
    processes,
    quantization,
    solvers,
    timesteps,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from diffusion_jax.quantization import affine, quantized, symmetric
from diffusion_jax.sampling import sample
from tests.models.openings import LEVELS
from tests.models.shared import T, drawn_params, image, labels, tiny_dit

FLOW = processes.rectified_flow()
X, COND = image((2, 4, 4, 3)), labels(0, 2)
NETWORK = tiny_dit()
PARAMS = drawn_params(NETWORK, X, T, COND)
W8A8 = {"weights": symmetric(8), "activations": affine(8, "token")}


@cache
def made():
    one = quantized(NETWORK, **W8A8)
    return one, one.quantize(PARAMS, X, T, COND)


@cache
def plain():
    return jax.device_get(jax.jit(lambda: NETWORK.apply(PARAMS, X, T, COND)[0])())


def answer(network, params, x=X, t=T, cond=COND):
    return jax.device_get(jax.jit(lambda params: network.apply(params, x, t, cond)[0])(params))


def test_with_weights_alone_it_is_the_network_at_rounded_weights_and_leaves_the_ends_alone():
    one = quantized(NETWORK, symmetric(4))
    parameters = one.quantize(PARAMS, X, T, COND)
    rounded = one.dequantize(parameters)
    np.testing.assert_allclose(answer(one.network, parameters), answer(NETWORK, rounded), atol=1e-5)
    before, after = by_path(PARAMS), by_path(rounded)
    assert set(before) == set(after)
    changed = {path for path in before if np.abs(before[path] - after[path]).max() > 0}
    assert changed and all(path.startswith("blocks/") and path.endswith("kernel") for path in changed)
    for path in changed:
        # One step for each block and output channel: at most half of it.
        step = np.abs(before[path]).max(axis=1, keepdims=True) / 7
        assert (np.abs(before[path] - after[path]) <= 0.5001 * step).all()
    kept = set(by_path(parameters["params"]))
    assert kept == {path for path in before if path not in changed}
    whole = quantization.quantized_bytes({"params": PARAMS}, symmetric(4))
    packed = quantization.quantized_bytes(parameters, symmetric(4))
    saved = sum(before[path].size for path in changed) * 3.5
    scales = sum(before[path].size // before[path].shape[1] for path in changed) * 5
    assert whole - packed == saved - scales


def test_sixteen_times_the_levels_are_as_much_closer_and_inputs_count():
    errors = [
        np.abs(answer(one.network, one.quantize(PARAMS, X, T, COND)) - plain()).mean()
        for one in (quantized(NETWORK, symmetric(8)), quantized(NETWORK, symmetric(4)), quantized(NETWORK, **W8A8))
    ]
    assert 6 * errors[0] < errors[1] and errors[0] < errors[2] < 0.05 * np.abs(plain()).mean()


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_products_of_integers_are_the_simulated_ones_and_are_in_the_program(per):
    how = {"weights": symmetric(8), "activations": affine(8, per)}
    simulated, integer = (quantized(NETWORK, **how, arithmetic=kind) for kind in ("simulated", "integer"))
    parameters = simulated.quantize(PARAMS, X, T, COND)
    program = jax.jit(lambda params: integer.network.apply(params, X, T, COND)[0])
    np.testing.assert_allclose(program(parameters), answer(simulated.network, parameters), atol=1e-5 * np.ptp(plain()))
    text = program.lower(parameters).as_text()
    # Of one block: q, k, v, out, the modulation and two of the feed-forward part.
    assert text.count("xi8>") and sum("dot_general" in line and "xi8>" in line for line in text.splitlines()) >= 6


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(per):
    one = quantized(NETWORK, symmetric(8), affine(4, per))
    parameters, program = one.quantize(PARAMS, X, T, COND), jax.jit(one.network.apply)
    alone = program(parameters, X, T, COND)[0]
    beside = program(parameters, np.stack([X[0], 100 * X[1]]), T, COND)[0]
    np.testing.assert_allclose(beside[0], alone[0], atol=1e-5)
    assert np.abs(beside[1] - alone[1]).max() > 1e-3


def test_a_convolution_computes_with_integers_too():
    network = models.unet("digits", **LEVELS)
    params = drawn_params(network, X, T, None)
    one, integer = (quantized(network, **W8A8, arithmetic=kind) for kind in ("simulated", "integer"))
    parameters = one.quantize(params, X, T)
    found = [answer(each.network, parameters, cond=None) for each in (one, integer)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-5 * np.ptp(found[0]))
    float32 = answer(network, params, cond=None)
    assert 0 < np.abs(found[0] - float32).mean() < 0.1 * np.abs(float32).mean()


def test_static_ranges_are_those_of_the_time_of_each_sample():
    edges, times = (400.0,), np.float32([0.9, 0.5, 0.3, 0.1])
    states = np.stack([(1 + 3 * i) * X for i in range(4)], axis=1)
    given = {"cond": COND, "null": {"label": np.int32([3])}}
    ranges = quantization.input_ranges(NETWORK, FLOW, PARAMS, states, times, **given, edges=edges)
    whole = quantization.input_ranges(NETWORK, FLOW, PARAMS, states, times, **given)
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], ranges) for i in range(2))
    for path, leaf in by_path(whole).items():
        ends = np.stack([by_path(part)[path] for part in (first, last)])
        np.testing.assert_array_equal(leaf[0], (np.minimum if path.endswith("low") else np.maximum)(*ends))
        assert leaf.shape == (1, 3)
    # The branch without a condition counts as well, and a moving average begins at the noisiest time.
    own = quantization.input_ranges(NETWORK, FLOW, PARAMS, states, times, COND)
    other = quantization.input_ranges(NETWORK, FLOW, PARAMS, states, times, {"label": np.int32([3, 3])})
    for path, leaf in by_path(whole).items():
        joined = np.minimum if path.endswith("low") else np.maximum
        np.testing.assert_allclose(leaf, joined(by_path(own)[path], by_path(other)[path]), rtol=1e-5)
    assert any(np.abs(by_path(own)[path] - leaf).max() > 1e-3 for path, leaf in by_path(whole).items())
    mean = quantization.input_ranges(NETWORK, FLOW, PARAMS, states, times, **given, edges=edges, momentum=0.75)
    one, two = (
        quantization.input_ranges(NETWORK, FLOW, PARAMS, states[:, i : i + 1], times[i : i + 1], **given)
        for i in (0, 1)
    )
    for path, leaf in by_path(mean).items():
        np.testing.assert_allclose(leaf[1], 0.75 * by_path(one)[path][0] + 0.25 * by_path(two)[path][0], rtol=1e-4)
    how = {"weights": symmetric(8), "activations": affine(4, "tensor"), "dynamic": False}
    timed, alone = quantized(NETWORK, **how, edges=edges), quantized(NETWORK, **how)
    parameters = timed.quantize(PARAMS, X, T, COND, ranges)
    found = answer(timed.network, parameters)
    for i, part in enumerate((first, last)):
        one = alone.quantize(PARAMS, X, T, COND, jax.tree.map(lambda leaf: leaf[None], part))
        np.testing.assert_allclose(found[i], answer(alone.network, one)[i], atol=1e-5)
    assert np.abs(found[0] - answer(alone.network, one)[0]).max() > 1e-3
    assert set(by_path(timed.dequantize(parameters))) == set(by_path(PARAMS))
    with pytest.raises(InvalidInput, match=r"no state within the intervals \[0\]"):
        quantization.input_ranges(NETWORK, FLOW, PARAMS, states, 0.5 + 0.5 * times, edges=edges, cond=COND)
    with pytest.raises(InvalidInput, match="those of 2 intervals"):
        timed.quantize(PARAMS, X, T, COND, whole)
    with pytest.raises(InvalidInput, match="give ranges="):
        alone.quantize(PARAMS, X, T, COND)


def test_factors_beside_a_quantised_network_have_the_effect_that_they_have_beside_the_plain_one():
    """To 5 % of it."""
    one, parameters = made()
    beside, own = adapters.lora(one.network, 2), adapters.lora(NETWORK, 2)
    factors = own.init(jax.random.key(0), PARAMS, X, T, COND)
    factors = jax.tree.map(lambda leaf: leaf + 0.05, factors)
    effect = answer(own.network, {"params": PARAMS, "lora": factors}) - plain()
    found = answer(beside.network, {**parameters, "lora": factors}) - answer(one.network, parameters)
    np.testing.assert_allclose((found * effect).sum() / np.square(effect).sum(), 1.0, atol=0.05)
    assert np.abs(found - effect).mean() < 0.1 * np.abs(effect).mean()


def run(denoiser, params, cond=COND, steps=4):
    grid = timesteps.linspace(steps)
    return jax.device_get(
        jax.jit(lambda p: sample(jax.random.key(0), denoiser, p, solvers.ddim(), grid, shape=X.shape, cond=cond))(
            params
        )
    )


AROUND = {
    "guided": lambda network: denoisers.guided(denoisers.denoiser(network, FLOW), 2.0, null={"label": 3}),
    "TaylorSeer": lambda network: acceleration.cached_features(
        network, FLOW, acceleration.taylor(1), acceleration.every(2)
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_guidance_and_forecasts_are_those_of_the_network_at_rounded_weights(name):
    one = quantized(NETWORK, symmetric(8))
    parameters = one.quantize(PARAMS, X, T, COND)
    found, expected = run(AROUND[name](one.network), parameters), run(AROUND[name](NETWORK), one.dequantize(parameters))
    np.testing.assert_allclose(found.x, expected.x, atol=2e-4)
    assert found.cost.evaluations == expected.cost.evaluations


def test_times_of_their_own_and_a_mesh_change_nothing_else():
    one, parameters = made()
    tokens = jax.device_put(np.linspace(50, 900, 8).reshape(2, 4).astype(np.float32))
    found = answer(one.network, parameters, t=tokens)
    assert np.isfinite(found).all() and np.abs(found - answer(one.network, parameters)).max() > 1e-3
    mesh = distributed.make_mesh()
    many = {"x": np.repeat(X, 4, 0), "t": np.repeat(T, 4), "cond": {"label": np.repeat(COND["label"], 4)}}
    spread = jax.device_put(many, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    shared = jax.jit(lambda p, b: one.network.apply(p, b["x"], b["t"], b["cond"])[0])(parameters, spread)
    np.testing.assert_allclose(shared[::4], answer(one.network, parameters), atol=1e-5)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"weights": 8}, "weights is 8"),
        ({"weights": symmetric(8), "activations": affine(8, "channel")}, "activations.per is 'channel'"),
        ({"weights": affine(8), "activations": affine(8, "token"), "arithmetic": "integer"}, "symmetric"),
        ({"weights": symmetric(8), "arithmetic": "integers"}, "did you mean 'integer'"),
        ({**W8A8, "dynamic": False}, "static ranges"),
        ({**W8A8, "edges": (400.0,)}, "dynamic=False"),
        ({"weights": symmetric(8, "token")}, "weights.per is 'token'"),
        ({"weights": symmetric(8), "select": "blocks"}, "Dense and Conv"),
    ],
)
def test_wrong_calls_are_told(how, told):
    with pytest.raises(InvalidInput, match=told):
        quantized.__wrapped__(NETWORK, **how).quantize(PARAMS, X, T, COND)
