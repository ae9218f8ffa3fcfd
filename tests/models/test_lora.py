"""LoRA: identical at initialisation, trained alone, merged exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.adapters import (
    adapted_modules,
    at_scale,
    attached,
    combined_adapters,
    largest_rank,
    lora,
    merged,
    relative_change,
    transplanted,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path, unet
from tests.models.drawn import drawn
from tests.models.shared import compiled, dit_case, drawn_params, image, scramble


def test_factors_change_nothing_at_first_learn_alone_and_merge_into_the_weights():
    network, params, x, t, cond, output = dit_case()
    adapted = lora(network, rank=2, alpha=4.0, select=("q", "feed_forward/down"))
    factors = adapted.init(jax.random.key(1), params, x, t, cond)
    shapes = {path: leaf.shape for path, leaf in by_path(factors).items()}
    assert shapes == {
        "blocks/block/attention/attention/q/a": (3, 16, 2),
        "blocks/block/attention/attention/q/b": (3, 2, 16),
        "blocks/block/mlp/feed_forward/down/a": (3, 64, 2),
        "blocks/block/mlp/feed_forward/down/b": (3, 2, 16),
    }
    layers = by_path(factors)["blocks/block/attention/attention/q/a"]
    assert float(jnp.abs(layers[0] - layers[1]).min()) > 0

    jitted = jax.jit(adapted.network.apply)

    def apply(factors):
        return jitted({"params": params, "lora": factors}, x, t, cond)[0]

    np.testing.assert_array_equal(apply(factors), output)
    gradient = by_path(jax.jit(jax.grad(lambda factors: (apply(factors) ** 2).mean()))(factors))
    assert all(float(jnp.abs(leaf).max()) > 0 for path, leaf in gradient.items() if path.endswith("/b"))

    trained = scramble(factors)
    moved = apply(trained)
    assert float(jnp.abs(moved - output).max()) > 0.1
    merged = adapted.merge(params, trained)
    np.testing.assert_allclose(jax.jit(network.apply)(merged, x, t, cond)[0], moved, atol=1e-4)
    np.testing.assert_array_equal(by_path(params)["condition/time/up/bias"], by_path(merged)["condition/time/up/bias"])


def test_the_scale_of_an_adapter_is_an_argument_and_its_change_of_the_weights_is_told():
    network, params, x, t, cond, output = dit_case()
    adapted = lora(network, rank=2, select=("q", "feed_forward/down"))
    factors = drawn(jax.eval_shape(adapted.init, jax.random.key(1), params, x, t, cond))
    program = compiled(lambda p, f, scale: adapted.network.apply(at_scale(p, f, scale), x, t, cond)[0])
    apply = functools.partial(program, params, factors)
    np.testing.assert_array_equal(apply(0.0), output)
    np.testing.assert_allclose(apply(1.4), network.apply(merged(params, factors, 1.4), x, t, cond)[0], atol=1e-4)
    assert np.abs(apply(1.4) - apply(1.0)).max() > 0.01
    once, twice = (relative_change(params, factors, scale) for scale in (1.0, 2.0))
    assert set(once) == set(adapted_modules(factors)) and min(once.values()) > 0
    for path, change in once.items():
        assert twice[path] == pytest.approx(2 * change, rel=1e-4)
    path = "blocks/block/attention/attention/q"
    a, b = (np.asarray(by_path(factors)[f"{path}/{name}"]) for name in "ab")
    size = np.linalg.norm(by_path(params)[f"{path}/kernel"])
    assert once[path] == pytest.approx(np.linalg.norm(a @ b) / size, rel=1e-4)


def test_an_adapted_network_is_a_network():
    network, params, x, t, cond, _ = dit_case()
    adapted = lora(network, rank=1).network
    both = jax.eval_shape(adapted.init, jax.random.key(0), x, t, cond)
    assert set(both) == {"params", "lora"}
    assert jax.tree.map(jnp.shape, both["params"]) == jax.tree.map(jnp.shape, params)


def test_convolutions_are_adapted_and_merged():
    sizes = {"multipliers": (1, 1), "attention": (0, 0), "mid_attention": 0, "mid_residual": 0}
    network = unet("digits", channels=8, groups=4, **sizes)
    x, t = image((2, 8, 8, 1)), jnp.full((2,), 0.3)
    params = drawn_params(network, x, t)
    # One convolution keeps the size, one halves it.
    adapted = lora(network, rank=2, select=("down_0_0/residual/conv_in", "down_0/conv"))
    factors = scramble(drawn(jax.eval_shape(adapted.init, jax.random.key(2), params, x, t)))
    assert by_path(factors)["down_0/conv/a"].shape == (3, 3, 8, 2)
    moved = compiled(adapted.network.apply)({"params": params, "lora": factors}, x, t)[0]
    plain = compiled(network.apply)
    np.testing.assert_allclose(plain(jax.jit(adapted.merge)(params, factors), x, t)[0], moved, atol=1e-4)
    assert np.abs(plain(params, x, t)[0] - moved).max() > 0.1


def test_adapters_side_by_side_are_their_sum_and_swap_without_compiling():
    network, params, x, t, cond, output = dit_case()
    style = lora(network, rank=2, select=("q", "v"))
    subject = lora(network, rank=3, select=("q", "feed_forward/down"))
    first = scramble(style.init(jax.random.key(1), params, x, t, cond), seed=1)
    second = scramble(subject.init(jax.random.key(2), params, x, t, cond), seed=2)
    both = combined_adapters([(first, 0.5), (second, -2.0)], rank=6)
    assert {leaf.shape[-1] for path, leaf in by_path(both).items() if path.endswith("/a")} == {6}
    adapted = lora(network, rank=6, select=adapted_modules(both))

    traces = []

    @jax.jit
    def apply(factors):
        traces.append(1)
        return adapted.network.apply({"params": params, "lora": factors}, x, t, cond)[0]

    weights = merged(merged(params, first, 0.5), second, -2.0)
    np.testing.assert_allclose(apply(both), jax.jit(network.apply)(weights, x, t, cond)[0], atol=2e-4)
    alone = combined_adapters([(first, 1.0)], rank=6, like=both)
    np.testing.assert_allclose(apply(alone), jax.jit(network.apply)(merged(params, first), x, t, cond)[0], atol=2e-4)
    np.testing.assert_allclose(apply(combined_adapters([], rank=6, like=both)), output, atol=1e-5)
    assert len(traces) == 1


def test_adapters_that_do_not_fit():
    network, params, x, t, cond, _ = dit_case()
    style = lora(network, rank=2, select=("q", "v")).init(jax.random.key(1), params, x, t, cond)
    other = lora(network, rank=2, select=("k",)).init(jax.random.key(1), params, x, t, cond)
    with pytest.raises(InvalidInput, match="rank is 3, but the adapters of blocks/block/attention/attention/q have 4"):
        combined_adapters([(style, 1.0), (style, 1.0)], rank=3)
    with pytest.raises(InvalidInput, match="attention/k, which `like` lacks"):
        combined_adapters([(other, 1.0)], rank=2, like=style)


def test_mistakes_are_told():
    network, params, x, t, cond, _ = dit_case()
    with pytest.raises(InvalidInput, match="rank is 0"):
        lora(network, rank=0)
    for alpha in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(InvalidInput, match="it must be a positive number"):
            lora(network, alpha=alpha)
    with pytest.raises(InvalidInput, match=r"selects no module; there are .*attention"):
        lora(network, select="query").init(jax.random.key(0), params, x, t, cond)
    with pytest.raises(InvalidInput, match="adapts Dense layers and convolutions"):
        lora(network, select="label").init(jax.random.key(0), params, x, t, cond)


def test_factors_move_to_another_network_of_the_same_shape():
    network, params, x, t, cond, output = dit_case()
    adapted = lora(network, rank=2, select=("q", "feed_forward/down"))
    factors = scramble(adapted.init(jax.random.key(1), params, x, t, cond))
    other = scramble(params, seed=9, size=0.1)
    apply, plain = jax.jit(adapted.network.apply), jax.jit(network.apply)

    def beside(weights, scale):
        return apply({"params": weights, "lora": transplanted(factors, weights, scale)}, x, t, cond)[0]

    np.testing.assert_array_equal(
        beside(other, 0.0),
        apply({"params": other, "lora": adapted.init(jax.random.key(1), params, x, t, cond)}, x, t, cond)[0],
    )
    np.testing.assert_array_equal(beside(params, 0.0), output)
    for weights in (params, other):
        for scale in (-1.0, 0.5):
            into = merged(weights, transplanted(factors, weights, scale))
            np.testing.assert_allclose(beside(weights, scale), plain(into, x, t, cond)[0], atol=2e-4)
    opposite, there = transplanted(factors, other, -1.0), transplanted(factors, other)
    for path, leaf in by_path(opposite).items():
        np.testing.assert_array_equal(leaf, -by_path(there)[path] if path.endswith("/b") else by_path(there)[path])
    # A slider: the same beside the weights and within them, at any strength, back and forth.
    for weights in (params, other):
        strong = jax.jit(adapted.merge)(weights, factors, 0.7)
        np.testing.assert_allclose(plain(strong, x, t, cond)[0], beside(weights, 0.7), atol=2e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), adapted.merge(strong, factors, -0.7), weights
        )
        jax.tree.map(np.testing.assert_array_equal, adapted.merge(weights, factors, 0.0), weights)
    # Some modules alone.
    assert adapted_modules(transplanted(factors, other, select="q")) == ("blocks/block/attention/attention/q",)
    with pytest.raises(InvalidInput, match="selects no module"):
        transplanted(factors, other, select="v")
    with pytest.raises(InvalidInput, match="which the network does not have"):
        transplanted(factors, {"blocks": {}})
    kernels = {"blocks": {"block": {"attention": {"attention": {"q": {"kernel": jnp.zeros((3, 16, 32))}}}}}}
    with pytest.raises(InvalidInput, match=r"those of a kernel \(3, 16, 32\)"):
        transplanted(factors, kernels, select="q")


def test_changes_of_any_parameter_are_attached_merged_and_summed():
    """Of a kernel, a bias and a norm, beside factors: run beside the network they are its changed parameters."""
    sizes = {"multipliers": (1, 1), "attention": (0, 0), "mid_attention": 0, "mid_residual": 0}
    network = unet("digits", channels=8, groups=4, **sizes)
    x, t = image((2, 8, 8, 1)), jnp.full((2,), 0.3)
    params = drawn_params(network, x, t)
    rng = np.random.default_rng(0)

    def like(*path):
        return (0.3 * rng.normal(size=by_path(params)["/".join(path)].shape)).astype(np.float32)

    # The residual block has a conv_in too, which stays as it is.
    first = {
        "conv_in": {"a": rng.normal(size=(3, 3, 1, 2)), "b": rng.normal(size=(2, 8)), "bias": like("conv_in", "bias")}
    }
    inner = {"norm_in": {"scale": like("down_0_0", "residual", "norm_in", "scale")}}
    inner["conv_out"] = {"kernel": like("down_0_0", "residual", "conv_out", "kernel")}
    second = {"down_0_0": {"residual": inner}}
    both = combined_adapters([(first, 0.5), (second, -2.0)], largest_rank(first))
    assert set(adapted_modules(both)) == {
        "conv_in", "down_0_0/residual/norm_in", "down_0_0/residual/conv_out"
    }  # fmt: skip
    adapted = compiled(attached(network, both).apply)
    weights = merged(merged(params, first, 0.5), second, -2.0)
    plain = compiled(network.apply)
    found = adapted({"params": params, "lora": both}, x, t)[0]
    np.testing.assert_allclose(found, plain(weights, x, t)[0], atol=1e-4)
    assert np.abs(found - plain(params, x, t)[0]).max() > 0.1
    np.testing.assert_array_equal(adapted(at_scale(params, both, 0.0), x, t)[0], plain(params, x, t)[0])
    opposite = transplanted(both, params, -1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged(weights, opposite), dict(params))
    path = "down_0_0/residual/norm_in"
    size = np.linalg.norm(2 * inner["norm_in"]["scale"]) / np.linalg.norm(by_path(params)[f"{path}/scale"])
    assert relative_change(params, both)[path] == pytest.approx(size, rel=1e-4)
    with pytest.raises(InvalidInput, match="change of down_0_0/residual/norm_in/scale is"):
        transplanted({"down_0_0": {"residual": {"norm_in": {"scale": np.zeros(3)}}}}, params)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.8", None, True])
def test_a_scale_that_is_no_finite_number(scale):
    factors = {"q": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
    params = {"q": {"kernel": jnp.zeros((2, 2))}}
    for call in (
        lambda: merged(params, factors, scale),
        lambda: at_scale(params, factors, scale),
        lambda: combined_adapters([(factors, scale)], rank=1),
        lambda: transplanted(factors, params, scale),
    ):
        with pytest.raises(InvalidInput, match="the scale of an adapter is a finite number"):
            call()
