"""Networks of actions are told what was observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput


def test_observations_are_the_pooled_vector():
    plain = models.mlp(width=16, depth=1, pooled=True)
    network = models.observing(plain)
    x, t = jax.random.normal(jax.random.key(0), (3, 4)), jnp.full((3,), 0.5)
    seen = jax.random.normal(jax.random.key(1), (3, 2, 5))
    params = network.init(jax.random.key(2), x, t, {"observation": seen})
    # The heads begin at zero, where every condition says the same.
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    output, _ = network.apply(params, x, t, {"observation": seen})
    expected, _ = plain.apply(params, x, t, {"pooled": seen.reshape(3, 10)})
    np.testing.assert_array_equal(output, expected)
    other, _ = network.apply(params, x, t, {"observation": seen + 1})
    assert np.abs(np.asarray(other - output)).max() > 1e-3
    with pytest.raises(InvalidInput, match="observation"):
        network.apply(params, x, t, {"pooled": seen.reshape(3, 10)})
