"""Networks of actions are told what was observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.errors import InvalidInput
from tests.models.shared import changed, compiled, drawn_params, image


def test_observations_are_the_pooled_vector():
    plain = models.mlp(width=16, depth=1, conditions=(models.pooled(),))
    network = models.observing(plain)
    x, t, seen = image((3, 4)), jnp.full((3,), 0.5), np.asarray(image((3, 2, 5)))
    params = drawn_params(network, x, t, {"observation": seen})
    apply = compiled(network.apply)
    output, _ = apply(params, x, t, {"observation": seen})
    expected, _ = compiled(plain.apply)(params, x, t, {"pooled": seen.reshape(3, 10)})
    np.testing.assert_array_equal(output, expected)
    other, _ = apply(params, x, t, {"observation": seen + 1})
    assert np.abs(other - output).max() > 1e-3
    with pytest.raises(InvalidInput, match="observation"):
        network.apply(params, x, t, {"pooled": seen.reshape(3, 10)})


def test_frames_and_nothing_else_tell_the_network_what_is_there():
    network = models.watching(
        models.mlp(width=16, depth=1, conditions=(models.pooled(),)), patch=4, features=8, hidden=12
    )
    x, t, frames = image((3, 4)), jnp.full((3,), 0.5), image((3, 2, 8, 8, 3))
    cond = {"frames": frames, "observation": jnp.ones((3, 2, 5))}
    params = drawn_params(network, x, t, cond)
    assert params["frames"]["patches"]["kernel"].shape == (4 * 4 * 2 * 3, 8)
    apply = compiled(lambda cond: network.apply(params, x, t, cond)[0])
    output = apply(cond)
    np.testing.assert_array_equal(output, apply({**cond, "observation": np.zeros((3, 2, 5), np.float32)}))
    for frame in range(2):
        place = (1, frame, 5, 6)
        other = apply({**cond, "frames": changed(frames, place, np.asarray(frames)[place] + 1.0)})
        assert np.abs(other - output)[1].max() > 1e-4
        np.testing.assert_allclose(other[0], output[0], atol=1e-6)
    # Its encoder is trained with it.
    gradient = compiled(jax.grad(lambda params: jnp.square(network.apply(params, x, t, cond)[0]).sum()))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["frames"]))


def test_mistakes_are_told_in_one_sentence():
    network, params = (
        models.watching(models.mlp(width=16, depth=1, conditions=(models.pooled(),))),
        {"frames": {}, "network": {}},
    )
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
