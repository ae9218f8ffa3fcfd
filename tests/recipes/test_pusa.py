"""Pusa: the published settings make an adapter of a large network."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.config import build, load


def test_the_published_settings_make_an_adapter_of_a_large_network():
    config = load("configs/recipes/pusa.py:paper")
    entry = config.arms.vta
    base = build(entry.model)
    adapted = build(entry.lora, network=base)
    x, cond = jnp.zeros((1, 2, 4, 4, 16)), {"context": jnp.zeros((1, 3, 4096))}
    params = jax.eval_shape(base.init, jax.random.key(0), x, jnp.zeros(1), cond)
    factors = jax.eval_shape(adapted.init, jax.random.key(0), params, x, jnp.zeros(1), cond)
    whole, part = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, factors))
    assert whole > 14e9
    # Rank 512 of q, k, v, o (twice: also towards the text) and of both matrices of the feed-forward layer, 40 blocks.
    assert part == 40 * 512 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    objective = build(entry.objective, network=adapted.network, process=build(entry.process))
    batch = {"x0": jnp.zeros((500, 2, 1, 1, 1)), "index": jnp.arange(500)}
    t = objective.prepare((), batch, jax.random.key(1))["t"]
    assert t.shape == (500, 2)
    assert float(jnp.median(t)) == pytest.approx(5 / 6, abs=0.02)
    assert build(config.grid).shape == (11,)
