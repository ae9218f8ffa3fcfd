"""Rollouts, plans and streams of actions on a line: what is executed, what is observed, what it costs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import control, processes, timesteps
from diffusion_jax.control import Environment, Policy, Simulator, rollout, rollout_simulators
from diffusion_jax.errors import InvalidInput
from diffusion_jax.solvers import ddim
from diffusion_jax.typing import Cost, Denoiser
from tests.models.shared import compiled

FLOW = processes.rectified_flow()
KEY, GRID = jax.random.key(0), timesteps.linspace(8)


class Place(NamedTuple):
    at: jax.Array
    wind: jax.Array


def blown(state, action, key):
    """Moves by a tenth of the action, in a wind of the episode's own and with gusts."""
    gust = 0.01 * jax.random.normal(key)
    return state._replace(at=state.at + 0.1 * action + state.wind + gust)


LINE = Environment(
    lambda key: Place(0.2 * jax.random.normal(key, (2,)), 0.02 * jax.random.normal(jax.random.fold_in(key, 1))),
    blown,
    lambda state: {"observation": state.at},
    lambda state: jnp.abs(state.at).max() < 0.1,
)


def told(params, carry, x, step, cond):
    """The clean plan leads home: minus `params` times the place, at every entry."""
    x0 = jnp.broadcast_to(-params * cond["observation"][:, -1, None], x.shape)
    prediction = FLOW.from_x0(x0, x, jnp.broadcast_to(step.t, x.shape[: max(jnp.ndim(step.t), 1)]))
    return prediction._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry


PLANNER = Denoiser(lambda params, x, cond: (), told, FLOW)
PLAN = {"shape": (8, 2), "execute": 2}
STREAM = {"shape": (8, 2), "chunk": 2}


def play(policy, params=3.0, episodes=5, steps=12, world=LINE, key=KEY, **options):
    run = jax.jit(lambda params, key: rollout(world, policy, params, key, episodes=episodes, steps=steps, **options))
    return jax.device_get(run(params, key))


POLICIES = {
    "full": control.receding_horizon(PLANNER, ddim(), GRID, **PLAN),
    "short": control.receding_horizon(PLANNER, ddim(), GRID[::4], **PLAN),
    "stream": control.streamed_actions(PLANNER, ddim(), GRID, **STREAM),
    "primed": control.streamed_actions(PLANNER, ddim(), GRID, **STREAM, primer="denoise"),
    "posed": control.streamed_actions(PLANNER, ddim(), GRID, **STREAM, primer=lambda *seen: jnp.ones((5, 8, 2))),
}


@pytest.fixture(scope="module")
def runs():
    return {name: play(policy) for name, policy in POLICIES.items()}


@pytest.fixture(scope="module")
def replanned(runs):
    return runs["full"]


def test_a_rollout_records_what_the_policy_did_to_the_world(replanned):
    run = replanned
    assert run.states.at.shape == (5, 13, 2) and run.actions.shape == (5, 12, 2) and run.done.shape == (5, 12)
    # Each decision's actions lead home from where it was taken, and are executed twice.
    home = np.clip(-3.0 * run.states.at[:, ::2][:, :6], -1, 1)
    np.testing.assert_allclose(run.actions, np.repeat(home, 2, axis=1), atol=1e-5)
    moved = np.diff(run.states.at, axis=1) - 0.1 * run.actions - run.states.wind[:, 1:, None]
    assert 0.005 < moved.std() < 0.02
    np.testing.assert_array_equal(run.done, np.abs(run.states.at[:, 1:]).max(axis=-1) < 0.1)


def test_success_and_time_are_those_of_the_first_time_it_is_done():
    done = np.array([[False, True, False, True], [False] * 4, [True] * 4])
    run = control.Rollout(None, np.zeros((3, 4, 2)), done)
    assert run.success.tolist() == [True, False, True] and run.time.tolist() == [2, 4, 1]


def test_an_episode_does_not_depend_on_those_beside_it(replanned):
    few = play(POLICIES["full"], episodes=2)
    np.testing.assert_allclose(few.states.at, replanned.states.at[:2], atol=1e-6)
    assert not np.allclose(replanned.states.at[0], replanned.states.at[1])


def test_a_policy_sees_history_and_keys_of_its_own_at_each_decision():
    seen = []

    def act(params, carry, observation, key):
        seen.append(observation["observation"].shape)
        drawn = jax.random.uniform(key, (5, 3, 2))
        return drawn.at[:, 1:].set(observation["observation"][:, :2]), carry + 1

    run = play(Policy(lambda params, observation, key: 0, act), steps=7, history=3)
    # Three calls of three actions, of which seven are steps of the episode; the second and third are what was seen.
    assert set(seen) == {(5, 3, 2)} and run.actions.shape == (5, 7, 2)
    first, at = run.actions[:, ::3], run.states.at
    assert len(np.unique(first)) == first.size
    np.testing.assert_allclose(run.actions[:, 1:3], np.stack([at[:, 0], at[:, 0]], axis=1), atol=1e-6)
    np.testing.assert_allclose(run.actions[:, 4:6], at[:, 1:3], atol=1e-6)


def test_what_happens_in_between_changes_the_state_once_and_only_what_follows_counts(replanned):
    def away(state):
        return state._replace(at=state.at + 5.0)

    run = play(POLICIES["full"], steps=6, world=control.with_event(LINE, 3, away))
    np.testing.assert_allclose(run.states.state.at[:, :4], replanned.states.at[:, :4], atol=1e-6)
    np.testing.assert_allclose(run.states.state.at[:, 4], replanned.states.at[:, 4] + 5.0, atol=1e-5)
    assert (run.actions[:, 4:] == -1).all() and not run.done.any()
    still = play(POLICIES["full"], world=control.with_event(LINE, 3, lambda state: state))
    np.testing.assert_array_equal(still.done, replanned.done & (np.arange(12) >= 3))
    assert replanned.done[:, :3].any() and still.done.any()


def test_an_oracle_acts_alike_whether_it_replans_or_streams_and_whatever_it_begins_with(runs):
    for name, run in runs.items():
        np.testing.assert_allclose(run.actions, runs["full"].actions, atol=1e-5, err_msg=name)


def test_a_decision_of_a_stream_costs_a_share_of_a_plan(runs):
    # Six decisions in a whole run, and what the primer cost.
    spent = {name: float(run.cost.evaluations) for name, run in runs.items()}
    assert spent == {"full": 48, "short": 12, "stream": 12, "primed": 20, "posed": 12}
    observation = {"observation": jnp.zeros((3, 1, 2))}
    for name, evaluations in (("full", 8), ("primed", 2)):
        cost = control.decision_cost(POLICIES[name], 1.0, observation)
        assert cost.evaluations == cost.compute == evaluations


def test_joint_data_acts_by_the_modality_that_is_named(replanned):
    process = processes.JointProcess({"action": FLOW, "future": FLOW})

    def apply(params, carry, x, step, cond):
        assert set(x) == {"action", "future"}
        rows = x["action"].shape[:1]
        aside = told(params, carry, x["action"], step._replace(t=jnp.broadcast_to(step.t["action"], rows)), cond)[0]
        # What is ignored stays the noise it was, at t = 1.
        future = FLOW.from_x0(jnp.full_like(x["future"], step.t["future"]), x["future"], jnp.ones(rows))
        return aside._replace(
            **{n: {"action": getattr(aside, n), "future": getattr(future, n)} for n in ("x0", "eps")}
        ), carry

    plan = timesteps.roles(GRID, {"action": "generate", "future": "ignored"})
    shape = {"action": (8, 2), "future": (3,)}
    made = Denoiser(lambda params, x, cond: (), apply, process)
    run = play(control.receding_horizon(made, ddim(), plan, shape=shape, execute=2, modality="action"))
    np.testing.assert_allclose(run.actions, replanned.actions, atol=1e-5)


def test_noise_is_on_actions_that_stay_in_range():
    still = Policy(lambda params, o, key: (), lambda params, carry, o, key: (jnp.zeros((5, 4, 2)), carry))
    run = play(control.with_action_noise(still, 0.3), steps=40)
    assert 0.25 < run.actions.std() < 0.35 and len(np.unique(run.actions)) == run.actions.size
    assert np.abs(play(control.with_action_noise(still, 3.0)).actions).max() == 1
    few = Policy(still.init, lambda params, carry, o, key: (jnp.zeros((2, 4, 2)), carry))
    np.testing.assert_array_equal(
        play(control.with_action_noise(few, 0.3), episodes=2, steps=40).actions, run.actions[:2]
    )


def on_a_host(start):
    """A line as a Python object: its place, the actions it was given, done beyond 0.35."""
    place, given = [start], []

    def step(action):
        given.append(action)
        place[0] = place[0] + 0.1 * np.asarray(action)
        return {"observation": place[0]}, bool(place[0][0] > 0.35), float(place[0][0])

    return Simulator(lambda: {"observation": place[0]}, step), given


def test_simulators_act_as_the_scan_does_and_stand_still_once_they_are_done():
    def act(params, carry, observation, key):
        return np.broadcast_to(np.array([params, 0.0]), (2, 3, 2)), carry

    made = [on_a_host(np.array([x, 0.0], np.float32)) for x in (0.0, 0.2)]
    policy = Policy(lambda params, observation, key: (), act)
    run = rollout_simulators([one for one, _ in made], policy, 1.0, KEY, steps=5, history=2)
    np.testing.assert_allclose(run.states["observation"][0, :, 0], [0, 0.1, 0.2, 0.3, 0.4, 0.4], atol=1e-6)
    np.testing.assert_allclose(run.states["observation"][1, :, 0], [0.2, 0.3, 0.4, 0.4, 0.4, 0.4], atol=1e-6)
    assert run.success.tolist() == [True, True] and run.time.tolist() == [4, 2]
    assert [len(given) for _, given in made] == [4, 2]
    np.testing.assert_allclose(run.score[1], [0.3, 0.4, 0.4, 0.4, 0.4], atol=1e-6)

    calm = LINE._replace(
        reset=lambda key: Place(jnp.zeros(2), jnp.zeros(())), step=lambda s, a, key: s._replace(at=s.at + 0.1 * a)
    )
    policy = POLICIES["full"]._replace(act=compiled(POLICIES["full"].act))
    host = rollout_simulators([on_a_host(np.full(2, -0.9, np.float32))[0]], policy, 0.5, KEY, steps=5)
    away = calm._replace(reset=lambda key: Place(jnp.full(2, -0.9), jnp.zeros(())))
    scanned = play(POLICIES["full"], 0.5, episodes=1, steps=5, world=away)
    np.testing.assert_allclose(host.states["observation"], scanned.states.at, atol=1e-5)
    assert host.cost.evaluations == scanned.cost.evaluations == 24


def test_impossible_policies_and_rollouts_are_refused():
    plan = {"shape": (8, 2), "execute": 2}
    joint = {"action": (8, 2), "future": (3,)}
    make = control.receding_horizon
    still = Policy(lambda params, o, key: (), lambda params, carry, o, key: (jnp.zeros((1, 1, 2)), carry))
    for call, match in [
        (lambda: make(PLANNER, ddim(), GRID, **{**plan, "execute": 0}), "execute is 0"),
        (lambda: make(PLANNER, ddim(), GRID, **{**plan, "execute": 9}), "1 .. 8"),
        (lambda: make(PLANNER, ddim(), GRID, shape=joint, execute=2), "modality is None"),
        (lambda: make(PLANNER, ddim(), GRID, **plan, modality="action"), "modality is 'action'"),
        (lambda: make(PLANNER, ddim(), GRID, shape=joint, execute=2, modality="actions"), "did you mean 'action'"),
        (lambda: control.streamed_actions(PLANNER, ddim(), GRID, **STREAM, primer="noise"), "primer is 'noise'"),
        (lambda: control.with_action_noise(still, -1.0), "deviation"),
        (lambda: control.with_event(LINE, -1, lambda state: state), "after is -1"),
        (lambda: rollout(LINE, still, None, KEY, episodes=0, steps=1), "episodes is 0"),
        (lambda: rollout(LINE, still, None, KEY, episodes=1, steps=1, history=0), "history is 0"),
        (lambda: rollout_simulators([], still, None, KEY, steps=1), "simulators is empty"),
    ]:
        with pytest.raises(InvalidInput, match=match):
            call()
