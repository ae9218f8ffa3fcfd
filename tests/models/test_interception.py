"""Interception on a scanned, rematerialised DiT: nothing changes until asked, and what is skipped is not computed."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.layers import attention_probabilities
from tests.models.shared import dit_case, tiny_dit

ATTENTION = "blocks/block/attention"


def opened(*edits, network=None):
    """(apply of collections and x, collections, x, plain output)"""
    plain, params, x, t, cond, output = dit_case()
    inside = models.intercepted(plain if network is None else network, *edits)
    collections = inside.init(jax.random.key(1), params, x, t, cond)
    apply = jax.jit(inside.apply)

    # Everything stays an argument, as in the plain run: XLA folds constants with other roundings.
    def function(collections, x):
        return apply(params, collections, x, t, cond)

    function.lower = lambda collections, x: apply.lower(params, collections, x, t, cond)
    function.cache_size = apply._cache_size
    return function, collections, x, output


def test_blocks_of_a_scan_are_traced_once():
    network, params, x, t, cond, _ = dit_case()
    called = []

    def count(step, args, kwargs, context):
        called.append(context.module.name)
        return step(*args, **kwargs)

    with nn.intercept_methods(count):
        jax.eval_shape(network.apply, params, x, t, cond)
    assert called.count("attention") == 2, "the branch and the layer in it, once each"


def products(jaxpr, inside=False):
    """How many matrix products are within a conditional, and how many are not."""
    counts = [0, 0]
    for equation in jaxpr.eqns:
        counts[not inside] += equation.primitive.name == "dot_general"
        for sub in jaxprs_in_params(equation.params):
            found = products(sub, inside or equation.primitive.name == "cond")
            counts = [a + b for a, b in zip(counts, found, strict=True)]
    return counts


def skippable(function, *args):
    """The matrix products that a run may leave out, once the compiled program is seen to have conditionals."""
    within, _ = products(jax.make_jaxpr(function)(*args).jaxpr)
    assert (function.lower(*args).compile().as_text().count(" conditional(") > 0) == (within > 0)
    return within


def test_taps_are_stacked_over_depth_and_leave_the_output_alone():
    def read(out, q, k, v, mask):
        return {"q": q, "map": attention_probabilities(q, k, mask), "v": v, "out": out}

    function, collections, x, output = opened(models.taps("attend", read), network=tiny_dit(remat="full"))
    found, extras, _ = function(collections, x)
    np.testing.assert_array_equal(found, output)
    told = extras["taps"]["blocks"]["block"]["attention"]["attention"]["attend"]["output"]
    assert told["q"].shape == (3, 2, 6, 2, 8) and told["map"].shape == (3, 2, 2, 6, 6)
    np.testing.assert_allclose(told["map"].sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.einsum("lbhnm,lbmhd->lbnhd", told["map"], told["v"]), told["out"], atol=1e-5)
    assert float(jnp.abs(told["q"][0] - told["q"][1]).max()) > 0.1


def test_override_acts_in_the_layers_it_is_told():
    function, collections, x, output = opened(models.override("block/attention"), models.taps("block/mlp"))
    assert set(models.by_path(collections)) == {f"overrides/{ATTENTION}/use", f"overrides/{ATTENTION}/value"}
    entry = collections["overrides"]["blocks"]["block"]["attention"]
    before, taps, _ = function(collections, x)
    np.testing.assert_allclose(before, output, atol=1e-5)
    entry["use"] = jnp.array([False, True, False])
    entry["value"] = entry["value"] + 3.0
    after, new_taps, _ = function(collections, x)
    (old,), (new,) = models.by_path(taps["taps"]).values(), models.by_path(new_taps["taps"]).values()
    np.testing.assert_array_equal(old[0], new[0])
    assert float(jnp.abs(old[1] - new[1]).max()) > 0.1 and float(jnp.abs(after - before).max()) > 0.1


def test_attention_maps_can_be_replaced():
    def uniform(run, data, q, k, v, mask):
        return jnp.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)

    function, collections, x, output = opened(models.taps("attend"), models.edit("attend", uniform))
    found, extras, _ = function(collections, x)
    (told,) = models.by_path(extras["taps"]).values()
    np.testing.assert_array_equal(told, jnp.broadcast_to(told[:, :, :1], told.shape))
    assert float(jnp.abs(found - output).max()) > 1e-3


@pytest.mark.parametrize("select", [("attention/attention", "feed_forward"), ("block/attention", "block/mlp")])
def test_cache_refreshed_everywhere_is_the_plain_network_and_reuse_skips(select):
    function, collections, x, output = opened(models.cached(select))
    fresh, _, filled = function(collections, x)
    # Modules that end in a matrix product are exact; behind a gate, XLA may fuse product and sum into one rounding.
    np.testing.assert_allclose(fresh, output, atol=0 if "feed_forward" in select else 2e-5, rtol=0)
    # Per block: q, k, v, out and the two of the map; up and down; and the modulations when whole branches are skipped.
    assert skippable(function, collections, x) == (8 if "feed_forward" in select else 10)

    reuse = {**filled, "policy": models.per_layer(filled["policy"], False)}
    again, _, kept = function(reuse, x)
    np.testing.assert_allclose(again, output, atol=2e-5)
    chex.assert_trees_all_equal(kept["cache"], filled["cache"])

    elsewhere, _, kept = function(reuse, x + 1)
    poisoned = {**reuse, "cache": jax.tree.map(lambda a: a * jnp.nan, reuse["cache"])}
    assert bool(jnp.isnan(function(poisoned, x + 1)[0]).all())
    assert float(jnp.abs(elsewhere - function(collections, x + 1)[0]).max()) > 1e-3

    last = {**reuse, "policy": models.per_layer(filled["policy"], [False, False, True])}
    _, _, kept = function(last, x + 1)
    for old, new in zip(jax.tree.leaves(filled["cache"]), jax.tree.leaves(kept["cache"]), strict=True):
        np.testing.assert_array_equal(old[:2], new[:2])
        assert float(jnp.abs(old[2] - new[2]).max()) > 0


def test_cache_can_extrapolate():
    linear = models.cached(
        "block/mlp",
        start=lambda output: (jnp.zeros_like(output), jnp.zeros_like(output)),
        update=lambda state, output, data: (output, output - state[0]),
        predict=lambda state, data: state[0] + data["distance"] * state[1],
        data={"distance": 0.0},
    )
    function, collections, x, _ = opened(models.taps("block/mlp"), linear)
    _, first, collections = function(collections, x)
    _, second, collections = function(collections, x + 0.1)
    policy = collections["policy"]["blocks"]["block"]["mlp"]
    collections["policy"]["blocks"]["block"]["mlp"] = {
        "refresh": jnp.zeros_like(policy["refresh"]),
        "distance": jnp.full_like(policy["distance"], 2.0),
    }
    _, third, _ = function(collections, x)
    (a,), (b,), (c,) = (models.by_path(taps["taps"]).values() for taps in (first, second, third))
    np.testing.assert_allclose(c, b + 2 * (b - a), atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_gates_of_one_are_the_identity_and_of_zero_remove_the_branch(skip):
    function, collections, x, output = opened(models.gates("block/mlp", skip=skip))
    np.testing.assert_allclose(function(collections, x)[0], output, atol=2e-5)
    assert (skippable(function, collections, x) > 0) == skip
    closed = function({"gates": models.per_layer(collections["gates"], 0.0)}, x)[0]
    remove, none, _, _ = opened(models.edit("block/mlp", lambda run, data, h, c, side: jnp.zeros_like(h)))
    np.testing.assert_allclose(closed, remove(none, x)[0], atol=2e-5)
    assert float(jnp.abs(closed - output).max()) > 0.1


def test_early_exit_stops_and_the_blocks_behind_it_do_not_matter():
    network, params, x, t, cond, output = dit_case()
    inside = models.intercepted(network, models.exits(), models.taps("block/mlp"))
    collections = inside.init(jax.random.key(1), params, x, t, cond)
    apply = jax.jit(lambda params, collections: inside.apply(params, collections, x, t, cond))
    whole, extras, after = apply(params, collections)
    np.testing.assert_allclose(whole, output, atol=2e-5)
    flow = extras["flow"]["blocks"]["block"]
    assert flow["executed"].tolist() == [3, 3] and not flow["left"].any() and int(flow["computed"]) == 3
    assert skippable(apply, params, collections) == 10

    early = {**after, "exit": models.per_layer(after["exit"], [False, True, False])}
    left, extras, _ = apply(params, early)
    assert extras["flow"]["blocks"]["block"]["executed"].tolist() == [2, 2]
    (told,) = models.by_path(extras["taps"]).values()
    assert float(jnp.abs(told[2]).max()) == 0.0 and float(jnp.abs(told[1]).max()) > 0
    broken = {**params, "blocks": jax.tree.map(lambda a: a.at[2].set(jnp.nan), params["blocks"])}
    np.testing.assert_array_equal(apply(broken, early)[0], left)
    assert float(jnp.abs(left - output).max()) > 0.01


def test_exit_may_be_decided_from_what_a_block_did():
    still = models.exits(
        lambda data, output, h, c, side: jnp.abs(output - h).mean() < data["threshold"], {"threshold": jnp.inf}
    )
    function, collections, x, _ = opened(still)
    assert int(function(collections, x)[1]["flow"]["blocks"]["block"]["computed"]) == 1


def test_samples_leave_by_themselves_and_stay_as_they_are():
    function, collections, x, output = opened(models.exits())
    (stop,) = models.by_path(collections).values()
    assert stop.shape == (3,)

    def left_behind(*depths):
        stop = jnp.arange(1, 4)[:, None] >= jnp.array(depths)
        found, extras, _ = function({"exit": {"blocks": {"block": {"stop": stop}}}}, x)
        flow = extras["flow"]["blocks"]["block"]
        assert flow["executed"].tolist() == list(depths) and int(flow["computed"]) == max(depths)
        return found

    mixed = left_behind(1, 3)
    np.testing.assert_array_equal(mixed[0], left_behind(1, 1)[0])
    np.testing.assert_array_equal(mixed[1], left_behind(2, 3)[1])
    np.testing.assert_allclose(mixed[1], output[1], atol=2e-5)
    assert float(jnp.abs(mixed[0] - output[0]).max()) > 0.01


def test_kernels_can_be_rounded_layer_by_layer():
    def rounded(params, data):
        scale = data["scale"]
        kernel = jnp.where(scale > 0, jnp.round(params["kernel"] / jnp.maximum(scale, 1e-9)) * scale, params["kernel"])
        return {**params, "kernel": kernel}

    quantised = models.reweighted(lambda module: isinstance(module, nn.Dense), rounded, {"scale": 0.0})
    function, collections, x, output = opened(quantised)
    np.testing.assert_allclose(function(collections, x)[0], output, atol=1e-5)
    blocks = collections["weights"]["blocks"]
    errors = []
    for bits in (4, 8):
        scale = [0.0, 0.0, 2.0 ** (2 - bits)]
        some = {"weights": {**collections["weights"], "blocks": models.per_layer(blocks, scale)}}
        errors.append(float(jnp.abs(function(some, x)[0] - output).mean()))
    assert errors[0] > 4 * errors[1] > 0


def test_edits_compose_and_an_opened_network_can_be_opened_again():
    network, params, x, t, cond, output = dit_case()
    edits = (models.taps("block/mlp"), models.cached(("block/mlp", "block/attention")), models.exits())
    inner = models.intercepted(network, models.gates("block/attention")).network
    inside = models.intercepted(inner, *edits)
    gates = {
        "gates": models.intercepted(network, models.gates("block/attention")).init(
            jax.random.key(0), params, x, t, cond
        )["gates"]
    }
    both = {"params": params, **gates}
    collections = inside.init(jax.random.key(0), both, x, t, cond)
    assert set(collections) == {"cache", "policy", "exit"}
    found, extras, _ = jax.jit(inside.apply)(both, collections, x, t, cond)
    np.testing.assert_allclose(found, output, atol=2e-5)
    assert set(extras) == {"taps", "flow"}
    np.testing.assert_allclose(inside.network.apply({**both, **collections}, x, t, cond)[0], output, atol=2e-5)
    with pytest.raises(InvalidInput, match="gates are used by the network already"):
        models.intercepted(inner, models.gates("block/mlp"))


def test_one_program_serves_all_policies():
    function, collections, x, _ = opened(models.cached("block/mlp"))
    for refresh in (True, False, [True, False, True]):
        function({**collections, "policy": models.per_layer(collections["policy"], refresh)}, x)
    assert function.cache_size() == 1


def test_mistakes_are_told():
    network, params, x, t, cond, _ = dit_case()
    with pytest.raises(InvalidInput, match=r"selects no module; there are .*blocks/block/attention"):
        models.intercepted(network, models.taps("atention")).apply(params, {}, x, t, cond)
    with pytest.raises(InvalidInput, match="lacks blocks/block/mlp/gate: make it with init"):
        models.intercepted(network, models.gates("block/mlp")).apply(params, {}, x, t, cond)
    for around in (lambda inner, *inputs: (inner(*inputs)[0], {}), lambda inner, *inputs: inner(*inputs)[0]):
        with pytest.raises(InvalidInput, match=r"does not return \(output, extras\)"):
            models.intercepted(models.wrapped(network, around), models.taps("mlp")).apply(params, {}, x, t, cond)
    with pytest.raises(InvalidInput, match="needs parameters with the entries params, gates"):
        models.intercepted(network, models.gates("block/mlp")).network.apply(params, x, t, cond)
    with pytest.raises(InvalidInput, match=r"network.module is missing"):
        models.intercepted(network._replace(module=None), models.gates("mlp"))
