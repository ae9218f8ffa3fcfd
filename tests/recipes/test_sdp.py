"""The released settings, and what a jump takes."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import build, load
from diffusion_jax.control import Rollout
from diffusion_jax.recipes.sdp import jump_claims


def test_the_released_settings_train_the_levels_of_their_stream():
    config = load("configs/recipes/sdp.py:paper")
    draw = build(config.objective.draw)
    t, weight = draw.draw(draw.init(), jax.random.key(0), (4000, 20))
    levels = np.round(np.asarray(t) * 100).astype(int) - 1
    assert (np.asarray(weight) == 1).all()
    constant = (levels == levels[:, :1]).all(axis=1)
    assert 0.17 < constant.mean() < 0.23
    assert set(levels[constant, 0]) == set(range(100))
    # The entry of the past joins the first chunk, an incomplete tail the last one.
    visited = {(*[49 - j] * 9, *[99 - j] * 11) for j in range(50)}
    assert set(map(tuple, levels[~constant])) == visited
    network = build(config.model)
    x, cond = jnp.zeros((2, 20, 2)), {"observation": jnp.zeros((2, 2, 20))}
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros((2,)), cond)
    output, _ = jax.eval_shape(network.apply, params, x, jnp.zeros((2, 20)), cond)
    assert output.shape == x.shape and build(config.process).schedule.num_steps == 100


def test_what_a_jump_takes_is_a_share_of_the_successes_without_it():
    def outcome(*succeeded):
        return Rollout(None, np.zeros((1, len(succeeded), 1, 2)), np.array([succeeded], bool)[..., None])

    calm = {1: outcome(1, 1, 1, 1), 4: outcome(1, 1, 0, 0), 8: outcome(1, 1, 1, 1)}
    after = {1: outcome(1, 1, 0, 1), 4: outcome(1, 0, 0, 0), 8: outcome(1, 1, 1, 1)}
    four, eight = jump_claims(calm, after, load("configs/recipes/sdp.py").jump, own=4)
    assert (four.baseline, four.ours, four.holds) == (0.25, 0.5, True)
    assert (eight.ours, eight.holds) == (0.0, False)
    assert "one network for all seeds" in eight.metric and "one network for all seeds" not in four.metric
