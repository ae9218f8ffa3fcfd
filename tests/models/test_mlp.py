"""MLP for vectors: one time for all dimensions is the case of equal ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from tests.models.shared import T, image, labels, scramble


def test_times_per_dimension_contain_the_time_per_sample_bit_for_bit():
    network = models.mlp(width=16, depth=2, num_classes=3)
    x, cond = image((2, 4)), labels(0, 3)
    params = jax.jit(lambda key: scramble(network.init(key, x, T, cond)))(jax.random.key(0))
    apply = jax.jit(lambda t: network.apply(params, x, t, cond)[0])
    scalar = apply(T)
    assert scalar.shape == x.shape
    wide = jnp.broadcast_to(T[:, None], x.shape)
    np.testing.assert_array_equal(apply(wide), scalar)
    change = jnp.abs(apply(wide.at[0, 1].set(5.0)) - scalar)
    assert float(change[0].min()) > 0 and float(change[1].max()) == 0.0
    untrained = network.apply(network.init(jax.random.key(0), x, T, cond), x, T, cond)[0]
    assert float(jnp.abs(untrained).max()) == 0.0


@pytest.mark.parametrize(
    "fields, told", [({"width": 0}, "width"), ({"ratio": -1.0}, "ratio"), ({"dtype": "f32"}, "dtype")]
)
def test_mistakes_are_told(fields, told):
    with pytest.raises(InvalidInput, match=told):
        models.mlp(**fields)
