"""MLP for vectors: one time for all dimensions is the case of equal ones."""

import jax
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from tests.models.shared import T, changed, compiled, drawn_params, image, labels


def test_times_per_dimension_contain_the_time_per_sample_bit_for_bit():
    network = models.mlp(width=16, depth=2, conditions=(models.label(3),))
    x, cond = image((2, 4)), labels(0, 3)
    params = drawn_params(network, x, T, cond)
    apply = compiled(lambda t: network.apply(params, x, t, cond)[0])
    scalar = apply(T)
    assert scalar.shape == x.shape
    wide = np.broadcast_to(np.asarray(T)[:, None], x.shape)
    np.testing.assert_array_equal(apply(wide), scalar)
    change = np.abs(apply(changed(wide, (0, 1), 5.0)) - scalar)
    assert change[0].min() > 0 and change[1].max() == 0.0
    untrained = compiled(lambda key: network.apply(network.init(key, x, T, cond), x, T, cond)[0])
    assert np.abs(untrained(jax.random.key(0))).max() == 0.0


@pytest.mark.parametrize(
    "fields, told", [({"width": 0}, "width"), ({"ratio": -1.0}, "ratio"), ({"dtype": "f32"}, "dtype")]
)
def test_mistakes_are_told(fields, told):
    with pytest.raises(InvalidInput, match=told):
        models.mlp(**fields)
