"""Push-T: without the extra a clear sentence; with it, an expert that succeeds and windows of its demonstrations."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.control import Policy, rollout_simulators
from diffusion_jax.data import push_t
from diffusion_jax.errors import InvalidInput

with_extra = pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None, reason="needs the extra 'control'")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(InvalidInput, match=r"diffusion_jax\[control\]"):
        data.push_t_demonstrations(episodes=1)


def test_observations_are_scaled_and_lose_nothing():
    rng = np.random.default_rng(0)
    states = np.concatenate([rng.uniform(130, 380, (50, 4)), rng.uniform(-np.pi, np.pi, (50, 1))], axis=1)
    observation = push_t.observe(states)
    assert observation.shape == (50, push_t.OBSERVATION) and np.abs(observation).max() <= 1
    np.testing.assert_allclose(push_t._states(observation), states, atol=1e-3)
    assert push_t._error(np.array(push_t.GOAL)) == 0.0


def test_contacts_lie_on_the_outline_and_point_outwards():
    pose = np.array([200.0, 220.0, 0.7])
    for point, normal in push_t._contacts(12.0, 0.5):
        steps = np.array([point - 2 * normal, point, point + 2 * normal])
        np.testing.assert_allclose(push_t._distance(push_t._to_world(steps, pose), pose), [-2, 0, 2], atol=1e-6)


def run(policy, seed, episodes, steps=push_t.STEPS, **options):
    simulators = push_t.simulators(seed, episodes)
    return rollout_simulators(simulators, policy, None, jax.random.key(seed), steps=steps, **options)


@with_extra
def test_the_expert_succeeds():
    outcome = run(push_t.expert_policy(), 0, 8)
    assert outcome.success.mean() >= 0.75
    assert outcome.states["observation"].shape == (8, 301, 20) and outcome.actions.shape == (8, 300, 2)
    assert np.abs(outcome.actions).max() <= 1 and (outcome.score.max(axis=1)[outcome.success] > 0.95).all()
    assert (outcome.time[~outcome.success] == 300).all()


@with_extra
def test_the_simulator_is_observed_as_it_is():
    simulator = push_t.simulator()
    state, _ = simulator.reset(seed=3)
    corners = (push_t.observe(state)[2:18].reshape(8, 2) + 1) * 256
    theirs = simulator.get_keypoints(simulator._block_shapes)
    apart = np.linalg.norm(corners[:, None] - theirs[None], axis=-1)
    assert apart.min(axis=0).max() < 1e-2 and apart.min(axis=1).max() < 1e-2


@with_extra
def test_rollouts_repeat_and_take_chunks():
    policy = Policy(lambda params, o, key: 0, lambda params, carry, o, key: (np.zeros((2, 3, 2)), carry + 1))
    one, two = (run(policy, 1, 2, history=2, steps=10) for _ in range(2))
    np.testing.assert_array_equal(one.states["observation"], two.states["observation"])
    assert one.actions.shape == (2, 10, 2) and not one.success.any()


@with_extra
def test_demonstrations_go_through_the_pipeline():
    source = data.push_t_demonstrations(episodes=2, future=1)
    batch = next(data.pipeline(source, 8))
    assert batch["x0"]["action"].shape == (8, 8, 2) and batch["x0"]["future"].shape == (8, 1, 20)
    assert batch["cond"]["observation"].shape == (8, 2, 20)
