"""Laws of ControlNets, and of the sizes and pooled vectors of Stable Diffusion XL, on which they are tested."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import (
    by_path,
    context,
    control_from_unet,
    controlled,
    controlnet,
    intercepted,
    param_shapes,
    pooled,
    taps,
)
from diffusion_jax.models.unet import add_residuals, unet
from diffusion_jax.sampling import sample
from tests.models.drawn import drawn
from tests.models.shared import T, changed, compiled, image

TINY = {"channels": 8, "multipliers": (1,), "num_residual": 1, "attention": (0,), "mid_attention": 0, "groups": 4}
X, CONTEXT = image((2, 4, 6, 3)), {"context": image((2, 5, 6), 2)}
STABLE = {
    "preset": "sdxl",
    "channels": 8,
    "multipliers": (1, 1.5),
    "num_residual": 1,
    "attention": (0, 0),
    "mid_attention": 1,
    "mid_residual": 1,
    "heads": (1, 3),
    "groups": 4,
    "time_features": 8,
    "in_channels": 3,
    "conditions": (context("none", 6), pooled(2, 5 + 2 * 4, 4)),
}
SIZES = {**CONTEXT, "pooled": jnp.ones((2, 5)), "time_ids": jnp.array([[8.0, 12.0], [8.0, 3.0]])}
PICTURE = {"control": jax.device_put(np.random.default_rng(6).random((2, 8, 12, 3), np.float32))}
NEGATIVE = {"control": 1 - np.asarray(PICTURE["control"])}


@cache
def stable():
    network = unet(**STABLE)
    params = drawn(param_shapes(network, X.shape, SIZES))
    return network, params, compiled(lambda *args: network.apply(*args)[0])


@cache
def steered():
    """The network of `stable` with a ControlNet, and parameters of both."""
    network, params, _ = stable()
    control = controlnet(**STABLE, control_features=(4, 5))
    shapes = param_shapes(control, X.shape, {**SIZES, **PICTURE})
    return controlled(network, control, 0.5), {"unet": params, "control": drawn(shapes, 1)}, control


COMPILED = []


@cache
def steer():
    """`(parameters of both, cond, scale) -> output`, one program for all tests."""
    network, _, _ = stable()
    _, _, control = steered()

    def run(both, cond, scale):
        COMPILED.append(scale)
        return controlled(network, control, scale).apply(both, X, T, cond)[0]

    return compiled(run)


def test_sizes_enter_with_the_pooled_vector_and_equal_times_per_pixel_are_one_time():
    _, params, apply = stable()
    y = apply(params, X, T, SIZES)
    moved = {**SIZES, "time_ids": changed(SIZES["time_ids"], (1, 1), 12.0)}
    other = apply(params, X, T, moved)
    np.testing.assert_array_equal(other[0], y[0])
    assert np.abs(other[1] - y[1]).max() > 1e-2
    field = np.broadcast_to(np.asarray(T)[:, None, None], X.shape[:3])
    np.testing.assert_allclose(apply(params, X, field, SIZES), y, atol=2e-5)


def test_control_of_zero_changes_nothing_bit_for_bit():
    _, params, apply = stable()
    _, both, control = steered()
    zero = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if "zero_" in jax.tree_util.keystr(path) else p, jax.device_get(both["control"])
    )

    def run(control, picture):
        return steer()({**both, "control": control}, {**SIZES, **picture}, 0.5)

    y = run(zero, PICTURE)
    np.testing.assert_array_equal(run(zero, NEGATIVE), y)
    # Another program, which XLA fuses otherwise.
    np.testing.assert_allclose(y, apply(params, X, T, SIZES), atol=1e-5)
    assert np.abs(run(both["control"], PICTURE) - y).max() > 1e-2
    shapes = jax.eval_shape(control.apply, both["control"], X, T, {**SIZES, **PICTURE})[0]
    residuals = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    h, skips = residuals[-1] + np.float32(0.3), [leaf - np.float32(0.7) for leaf in residuals[:-1]]
    chex.assert_trees_all_equal(compiled(add_residuals)(h, skips, residuals), (h, skips))


def test_a_new_controlnet_is_silent_and_begins_as_the_way_down():
    control = controlnet("digits", **TINY, control_features=(3, 4))
    params = drawn(param_shapes(unet(**TINY), X.shape))
    new = control.init(jax.random.key(0), X, T, PICTURE)
    begun = control_from_unet(params, new)
    assert begun["down_0_0"] is params["down_0_0"] and begun["control_in"] is new["control_in"]
    residuals, _ = compiled(control.apply)(begun, X, T, PICTURE)
    assert len(residuals) == 3 and all(not leaf.any() for leaf in residuals)


def test_two_controls_of_a_half_are_one_and_a_traced_scale_does_not_compile_anew():
    network, params, _ = stable()
    _, both, control = steered()
    cond = {**SIZES, **PICTURE}
    y, half = (steer()(both, cond, scale) for scale in (1.0, 0.5))
    assert np.abs(y - half).max() > 1e-3 and len(COMPILED) == 1
    twice = controlled(network, (control, control), (0.5, 0.5))
    params = {"unet": params, "control_0": both["control"], "control_1": both["control"]}
    told = {**SIZES, "control": (PICTURE["control"],) * 2}
    np.testing.assert_allclose(compiled(twice.apply)(params, X, T, told)[0], y, atol=1e-5)
    # Opened, each still has its own parameters, equal modules though they are.
    params["control_1"] = jax.tree.map(lambda leaf: 0 * leaf, params["control_1"])
    seen, extras, _ = compiled(intercepted(twice, taps("zero_mid")).apply)(params, {}, X, T, told)
    np.testing.assert_allclose(seen, half, atol=1e-5)
    assert {path.split("/")[0] for path in by_path(extras["taps"])} == {"control_0", "control_1"}


def test_the_whole_can_be_intercepted_and_edited_parts_can_be_controlled():
    whole, both, control = steered()
    cond = {**SIZES, **PICTURE}
    y = steer()(both, cond, 0.5)
    opened = intercepted(whole, taps("cross_attention"))
    seen, extras, _ = compiled(opened.apply)(both, {}, X, T, cond)
    np.testing.assert_allclose(seen, y, atol=1e-5)
    assert {name.split("/")[0] for name in by_path(extras["taps"])} == {"unet", "control"}
    network, params, _ = stable()
    adapted = lora(network, rank=2, select=("q",))
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), params, X, T, SIZES)
    factors = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    both = {"unet": {"params": params, "lora": factors}, "control": both["control"]}
    edited = controlled(adapted.network, control, 0.5)
    np.testing.assert_allclose(compiled(edited.apply)(both, X, T, cond)[0], y, atol=1e-5)


def test_a_controlled_network_is_guided_and_sampled():
    whole, both, _ = steered()
    told = denoisers.guided(denoisers.denoiser(whole, processes.vp_linear()), 3.0, {"context": 0.0})
    cond, grid = {**SIZES, **PICTURE}, timesteps.linspace(2)
    run = compiled(lambda p, c: sample(jax.random.key(0), told, p, solvers.ddim(), grid, shape=X.shape, cond=c).x)
    first = run(both, cond)
    other = run(both, {**cond, **NEGATIVE})
    assert first.shape == X.shape and np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": PICTURE["control"][:, :4]}, "2 times the size of x"),
        ({"control": (PICTURE["control"],) * 2}, "2 pictures"),
        ({"control": None}, r"needs cond\['control'\]"),
        ({"residuals": (X,)}, "another ControlNet"),
        ({"pooled": jnp.ones((2, 6))}, "channels=13 in total"),
        ({"context": jnp.ones((2, 5, 7))}, r"shape \[2, 5, 6\]"),
    ],
)
def test_wrong_conditions_are_told(change, message):
    whole, both, _ = steered()
    network, params, _ = stable()
    cond = {**SIZES, **PICTURE, **change}
    with pytest.raises(InvalidInput, match=message):
        if "residuals" in change:
            jax.eval_shape(network.apply, params, X, T, {**SIZES, **change})
        else:
            jax.eval_shape(whole.apply, both, X, T, cond)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "sd1.5"}, "did you mean 'sd15'"),
        ({"control_feature": (4,)}, "did you mean 'control_features'"),
        ({"control_features": ()}, "positive integers"),
        ({"control_channels": 0}, "control_channels is 0"),
    ],
)
def test_wrong_fields_are_told_at_construction(fields, message):
    with pytest.raises(InvalidInput, match=message):
        controlnet(**fields)


def test_wrong_numbers_of_controls_are_told():
    network, _, _ = stable()
    _, _, control = steered()
    with pytest.raises(InvalidInput, match="at least one"):
        controlled(network, ())
    with pytest.raises(InvalidInput, match="each of the 2 ControlNets"):
        controlled(network, (control, control), (1.0,))
