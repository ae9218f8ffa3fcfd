"""TD-LoRA: nothing at first, LoRA with one expert, one matrix at a fixed time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters
from diffusion_jax.errors import InvalidInput
from tests.models.shared import dit_case, scramble

SELECT = ("q", "feed_forward/down", "attention/modulation/dense")


@functools.cache
def learned(experts):
    network, params, x, t, cond, output = dit_case()
    adapted = adapters.time_lora(network, rank=2, experts=experts, alpha=4.0, select=SELECT)
    made = adapted.init(jax.random.key(1), params, x, t, cond)
    run = jax.jit(adapted.network.apply)
    np.testing.assert_array_equal(run({"params": params, **made}, x, t, cond)[0], output)
    return adapted, run, {"params": params, **scramble(made)}


def test_with_one_expert_it_is_lora():
    network, params, x, t, cond, _ = dit_case()
    _, run, tree = learned(1)
    plain = adapters.lora(network, rank=2, alpha=4.0, select=SELECT)
    factors = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[..., 0, :, :] if path[-1].key == "b" else leaf, tree["lora"]
    )
    expected = jax.jit(plain.network.apply)({"params": params, "lora": factors}, x, t, cond)[0]
    np.testing.assert_allclose(run(tree, x, t, cond)[0], expected, atol=1e-5)


def test_at_a_fixed_time_it_merges_into_the_weights_and_at_another_into_others():
    network, params, x, _, cond, _ = dit_case()
    adapted, run, tree = learned(3)
    at = jnp.full((2,), 300.0)
    out = run(tree, x, at, cond)[0]
    apply = jax.jit(network.apply)
    np.testing.assert_allclose(apply(adapted.merge(tree, 300.0), x, at, cond)[0], out, atol=1e-5)
    assert np.abs(out - apply(params, x, at, cond)[0]).max() > 0.01
    assert np.abs(apply(adapted.merge(tree, 900.0), x, at, cond)[0] - out).max() > 1e-3


def test_what_cannot_be_mixed_is_told():
    network = dit_case()[0]
    for field, value in (("rank", 0), ("experts", 0), ("alpha", -1.0)):
        with pytest.raises(InvalidInput, match=field):
            adapters.time_lora(network, **{field: value})
