"""A reconstruction from two views: its loss reaches every weight, and the frame of the world changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, models, objectives
from diffusion_jax.errors import InvalidInput
from diffusion_jax.rendering import Camera
from tests.models.drawn import drawn

KEY = jax.random.key(0)
SOURCE = data.splat_scenes(length=4, frames=3, size=8)
NETWORK = models.pixel_reconstructor(1.6, 4.4, planes=4, width=8, depth=1)


@pytest.fixture(scope="module")
def trained():
    batch = SOURCE.take([0, 1])
    ends = jax.tree.map(lambda leaf: leaf[:, [0, 2]], (batch["x0"], Camera(**batch["cond"])))
    params = drawn(jax.eval_shape(NETWORK.init, KEY, *ends))
    objective = objectives.splat_rendering(NETWORK, 3)

    @jax.jit
    def both(params, batch):
        value, grads = jax.value_and_grad(lambda p: objective.loss(p, (), batch, KEY)[0].mean())(params)
        return value, grads, objectives.coarse_clips(NETWORK, params, batch["x0"], Camera(**batch["cond"]))

    return batch, params, both


def test_every_weight_learns_and_the_frames_between_are_not_looked_at(trained):
    batch, params, both = trained
    value, grads, coarse = both(params, batch)
    np.testing.assert_allclose(value, np.square(coarse - batch["x0"]).mean(), rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    hidden = batch["x0"].copy()
    hidden[:, 1] = 0.0
    np.testing.assert_array_equal(both(params, {**batch, "x0": hidden})[2], coarse)


def test_turning_and_moving_world_and_cameras_together_changes_nothing(trained):
    batch, params, both = trained
    angle = 0.7
    turn = np.float32([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    cond = batch["cond"]
    moved = {"rotation": cond["rotation"] @ turn.T, "position": cond["position"] @ turn.T + 1.0, "focal": cond["focal"]}
    np.testing.assert_allclose(both(params, {**batch, "cond": moved})[2], both(params, batch)[2], atol=1e-3)


def test_a_frame_is_compared_with_what_its_own_camera_sees(trained):
    """What the reconstruction shows of the frame between, before a background of its own, has no error there."""
    batch, params, _ = trained
    objective = objectives.splat_rendering(NETWORK, 1, 0.3)

    @jax.jit
    def losses(params, batch, keys):
        coarse = objectives.coarse_clips(NETWORK, params, batch["x0"], Camera(**batch["cond"]), 0.3)
        own = {**batch, "x0": batch["x0"].at[:, 1].set(coarse[:, 1])}
        return jax.lax.map(lambda key: objective.loss(params, (), own, key)[0], keys)

    found = np.asarray(losses(params, jax.tree.map(jnp.asarray, batch), jax.random.split(KEY, 24))).max(axis=1)
    # Each of the three frames has its turn, and no others have no error.
    assert 2 <= (found < 1e-8).sum() <= 16 and found.max() > 1e-3


def test_wrong_input_is_named(trained):
    batch, params, _ = trained
    with pytest.raises(InvalidInput, match="shown"):
        objectives.splat_rendering(NETWORK, 4).init(KEY, params, batch)
    with pytest.raises(InvalidInput, match=r"views\.shape"):
        NETWORK.apply(params, jnp.zeros((1, 3, 8, 8, 3)), Camera(**batch["cond"]))
    with pytest.raises(InvalidInput, match="near"):
        models.pixel_reconstructor(2.0, 1.0)
