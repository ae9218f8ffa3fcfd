"""Laws of the U-Net under interception: taps, caches, gates and LoRA of its branches."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.adapters import lora
from diffusion_jax.models import by_path, cached, gates, intercepted, taps
from diffusion_jax.models.layers import Branch
from tests.models.drawn import drawn
from tests.models.shared import T, compiled
from tests.models.test_unet import X, model

BRANCHES = ("residual", "attention", "cross_attention", "mlp")


def is_branch(module):
    return isinstance(module, Branch)


@cache
def read_and_cached():
    """`(collections, x) -> (output, what is read, collections)` of the text network with both edits, and those."""
    network, params, _, cond = model("text")
    opened = intercepted(network, taps(is_branch), cached(is_branch))
    shapes = jax.eval_shape(opened.init, jax.random.key(0), params, X, T, cond)
    collections = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    return jax.jit(lambda collections, x: opened.apply(params, collections, x, T, cond)), collections


def test_taps_read_every_branch_and_every_attention_map():
    _, params, apply, cond = model("text")
    run, collections = read_and_cached()
    y, extras, _ = run(collections, X)
    np.testing.assert_allclose(y, apply(params, X, T, cond), atol=1e-5)
    tapped = by_path(extras["taps"])
    assert {name.split("/")[-2] for name in tapped} == set(BRANCHES)
    assert tapped["mid_attention/blocks/block/cross_attention/output"].shape == (2, 2, 4, 6, 8)


def test_cache_returns_the_network_when_refreshed_and_the_last_branches_when_not():
    _, params, apply, cond = model("text")
    run, collections = read_and_cached()
    y, _, filled = jax.device_get(run(collections, X))
    np.testing.assert_allclose(y, apply(params, X, T, cond), atol=1e-5)
    stale = {**filled, "policy": jax.tree.map(np.zeros_like, filled["policy"])}
    # Nothing is refreshed: the same input gives the same output again, another one goes through the shortcuts only.
    again, _, kept = run(stale, X)
    np.testing.assert_allclose(again, y, atol=1e-5)
    twice = 2 * np.asarray(X)
    assert np.abs(np.asarray(run(stale, twice)[0]) - apply(params, twice, T, cond)).max() > 1e-2
    chex.assert_trees_all_equal(kept["cache"], filled["cache"])
    assert " conditional(" in run.lower(stale, X).compile().as_text()


def test_closed_gates_leave_the_shortcuts():
    network, params, apply, cond = model("text")
    opened = intercepted(network, gates("residual"))
    shapes = jax.eval_shape(opened.init, jax.random.key(0), params, X, T, cond)
    run = compiled(
        lambda gate: opened.apply(params, jax.tree.map(lambda g: jnp.full(g.shape, gate), shapes), X, T, cond)[0]
    )
    np.testing.assert_allclose(run(1.0), apply(params, X, T, cond), atol=1e-5)
    silenced = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if "'residual'" in (key := jax.tree_util.keystr(path)) and "conv_out" in key else p,
        jax.device_get(params),
    )
    np.testing.assert_allclose(run(0.0), apply(silenced, X, T, cond), atol=1e-5)


def test_lora_starts_as_nothing_and_merges_into_the_weights():
    network, params, apply, cond = model("text")
    adapted = lora(network, rank=2, select=("q", "v"))
    factors = drawn(jax.eval_shape(adapted.init, jax.random.key(0), params, X, T, cond))
    run = compiled(lambda factors: adapted.network.apply({"params": params, "lora": factors}, X, T, cond)[0])
    y = apply(params, X, T, cond)
    np.testing.assert_allclose(run(jax.tree.map(np.zeros_like, jax.device_get(factors))), y, atol=1e-5)
    moved = run(factors)
    assert np.abs(moved - y).max() > 1e-2
    np.testing.assert_allclose(moved, apply(jax.jit(adapted.merge)(params, factors), X, T, cond), atol=1e-4)
