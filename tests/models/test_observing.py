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


def test_frames_and_nothing_else_tell_the_network_what_is_there():
    network = models.watching(models.mlp(width=16, depth=1, pooled=True), patch=4, features=8, hidden=12)
    x, t = jax.random.normal(jax.random.key(0), (3, 4)), jnp.full((3,), 0.5)
    cond = {"frames": jax.random.normal(jax.random.key(1), (3, 2, 8, 8, 3)), "observation": jnp.ones((3, 2, 5))}
    params = network.init(jax.random.key(2), x, t, cond)
    assert params["frames"]["patches"]["kernel"].shape == (4 * 4 * 2 * 3, 8)
    # The heads begin at zero, where every condition says the same.
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    apply = jax.jit(lambda cond: network.apply(params, x, t, cond)[0])
    output = apply(cond)
    np.testing.assert_array_equal(output, apply({**cond, "observation": jnp.zeros((3, 2, 5))}))
    for frame in range(2):
        other = apply({**cond, "frames": cond["frames"].at[1, frame, 5, 6].add(1.0)})
        assert np.abs(np.asarray(other - output))[1].max() > 1e-4
        np.testing.assert_allclose(other[0], output[0], atol=1e-6)
    # Its encoder is trained with it.
    gradient = jax.grad(lambda params: jnp.square(network.apply(params, x, t, cond)[0]).sum())(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["frames"]))


def test_mistakes_are_told_in_one_sentence():
    network, params = models.watching(models.mlp(width=16, depth=1, pooled=True)), {"frames": {}, "network": {}}
    for call, message in [
        (lambda: network.apply(params, jnp.zeros((1, 4)), jnp.zeros(1), {"pooled": jnp.zeros((1, 2))}), "needs cond"),
        (
            lambda: network.apply(params, jnp.zeros((1, 4)), jnp.zeros(1), {"frames": jnp.zeros((1, 2, 6, 6, 3))}),
            "divide by the patch 4",
        ),
        (lambda: models.watching(models.mlp(), patch=0), "patch is 0"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            call()
