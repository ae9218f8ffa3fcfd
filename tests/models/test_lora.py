"""LoRA: identical at initialisation, trained alone, merged exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.adapters import lora
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from tests.models.shared import dit_case, scramble


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


def test_an_adapted_network_is_a_network():
    network, params, x, t, cond, _ = dit_case()
    adapted = lora(network, rank=1).network
    both = jax.eval_shape(adapted.init, jax.random.key(0), x, t, cond)
    assert set(both) == {"params", "lora"}
    assert jax.tree.map(jnp.shape, both["params"]) == jax.tree.map(jnp.shape, params)


def test_mistakes_are_told():
    network, params, x, t, cond, _ = dit_case()
    with pytest.raises(InvalidInput, match="rank is 0"):
        lora(network, rank=0)
    with pytest.raises(InvalidInput, match=r"selects no module; there are .*attention"):
        lora(network, select="query").init(jax.random.key(0), params, x, t, cond)
    with pytest.raises(InvalidInput, match="adapts Dense layers"):
        lora(network, select="label").init(jax.random.key(0), params, x, t, cond)
