"""Ways of acting, and the released settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.config import build, load
from diffusion_jax.data import tabletop
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes.parts.acting import Planner, decisions, replanned, rollouts, streamed
from diffusion_jax.recipes.sdp import jump_claims, wavering
from diffusion_jax.typing import Cost, Denoiser

FLOW = processes.rectified_flow()
WORLD = tabletop.Tabletop("reach", horizon=12)


def told(params, carry, x, step, cond):
    """The clean plan is the disc's place, at every entry."""
    x0 = jnp.broadcast_to(params * cond["observation"][:, -1, None, :2], x.shape)
    prediction = FLOW.from_x0(x0, x, jnp.broadcast_to(step.t, x.shape[: max(jnp.ndim(step.t), 1)]))
    return prediction._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry


PLANNER = Planner(Denoiser(lambda params, x, cond: (), told, FLOW), jnp.linspace(1.0, 0.0, 9), 8, (1.0,))


@pytest.mark.parametrize("primer", ["zero", "denoise"])
def test_an_oracle_acts_alike_whether_it_replans_or_streams(primer):
    full = rollouts(replanned(PLANNER, 2), WORLD, [3, 4], 5)
    stream = rollouts(streamed(PLANNER, 2, primer), WORLD, [3, 4], 5)
    assert full.actions.shape == (2, 5, 12, 2)
    np.testing.assert_allclose(stream.actions, full.actions, atol=1e-5)
    np.testing.assert_allclose(full.actions[:, :, 2], np.clip(full.observations[:, :, 2, :2], -1, 1), atol=1e-5)
    few = rollouts(replanned(PLANNER, 2, steps=2), WORLD, [3, 4], 3)
    np.testing.assert_allclose(few.actions, full.actions[:, :3], atol=1e-5)


def test_a_decision_of_a_stream_costs_a_share_of_a_plan():
    arms = {"full": replanned(PLANNER, 2), "short": replanned(PLANNER, 2, 2), "stream": streamed(PLANNER, 2, "denoise")}
    cost = decisions(arms, repeats=3)
    assert {name: one.evaluations for name, one in cost.items()} == {"full": 8, "short": 2, "stream": 2}
    assert all(one.seconds > 0 for one in cost.values())


def test_impossible_arms_are_refused():
    with pytest.raises(InvalidInput, match="divisor"):
        replanned(PLANNER, 2, steps=3)
    with pytest.raises(InvalidInput, match="primer"):
        streamed(PLANNER, 2, "noise")


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


def test_wavering_is_to_steer_to_the_other_side_below_the_obstacle():
    observations = np.zeros((1, 4, 9, 8))
    observations[..., 7] = -0.15
    observations[:, :3, :, 1] = -0.8
    actions = np.zeros((1, 4, 8, 2))
    actions[..., 0] = np.repeat([[0.5, 0.5], [0.5, -0.5], [0.5, -0.1], [0.5, -0.5]], 4, axis=1)
    nothing = np.zeros((1, 4), int)
    outcome = tabletop.Outcome(nothing > 0, nothing, nothing, nothing, observations, actions)
    # The second episode wavers; the third hesitates, the fourth has passed.
    assert wavering(outcome, 4) == [0.25]


def test_what_a_jump_takes_is_a_share_of_the_successes_without_it():
    def outcome(*succeeded):
        success = np.array([succeeded], bool)
        return tabletop.Outcome(success, *[np.zeros(success.shape, int)] * 5)

    calm = {1: outcome(1, 1, 1, 1), 4: outcome(1, 1, 0, 0), 8: outcome(1, 1, 1, 1)}
    after = {1: outcome(1, 1, 0, 1), 4: outcome(1, 0, 0, 0), 8: outcome(1, 1, 1, 1)}
    four, eight = jump_claims(calm, after, load("configs/recipes/sdp.py").jump, own=4)
    assert (four.baseline, four.ours, four.holds) == (0.25, 0.5, True)
    assert (eight.ours, eight.holds) == (0.0, False)
    assert "one network for all seeds" in eight.metric and "one network for all seeds" not in four.metric
