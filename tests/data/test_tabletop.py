"""The tabletop: physics that hold, an expert that succeeds on both sides, pictures read back, windows cut rightly."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import config, control, data
from diffusion_jax.control import Policy
from diffusion_jax.data import tabletop
from diffusion_jax.data.tabletop import BLOCK, DISC, OBSTACLE, State, Tabletop
from diffusion_jax.errors import InvalidInput

EPISODES, STEPS = 300, 80


def run(world, seed=0, episodes=EPISODES, policy=None, after=None, noise=0.0, image_size=None, steps=STEPS, **options):
    policy = control.with_action_noise(tabletop.expert_policy(world) if policy is None else policy, noise)
    environment = tabletop.environment(world, image_size)
    if after is not None:
        environment = control.with_event(environment, after, tabletop.jump_goal)
    return jax.device_get(
        jax.jit(lambda key: control.rollout(environment, policy, None, key, episodes=episodes, steps=steps, **options))(
            jax.random.key(seed)
        )
    )


@pytest.fixture(scope="module", params=tabletop.TASKS)
def expert(request):
    world = Tabletop(request.param)
    return world, run(world)


@pytest.fixture(scope="module")
def windows():
    return data.tabletop_demonstrations(episodes=40, labelled=10, future=2, image_size=24, chunk=6, noise=0.1)


def test_the_expert_succeeds_on_both_sides_without_wavering(expert):
    _, outcome = expert
    assert outcome.success.mean() >= 0.98
    side, switches = tabletop.sides(tabletop.observe(outcome.states))
    assert switches.max() == 0 and (side != 0).all()
    assert 0.4 < (side < 0).mean() < 0.6
    assert np.median(outcome.time) < STEPS / 2


@pytest.mark.parametrize("options", [{"after": 30}, {"noise": 0.3}])
@pytest.mark.parametrize("task", tabletop.TASKS)
def test_the_expert_follows_a_goal_that_jumps_and_recovers_from_noise(task, options):
    assert run(Tabletop(task), 1, **options).success.mean() >= 0.98


def test_nothing_overlaps_and_nothing_leaves_the_table(expert):
    world, outcome = expert
    state = outcome.states
    assert np.abs(tabletop.observe(state)).max() <= 1 and np.abs(outcome.actions).max() <= 1
    gaps = {"obstacle": (state.disc, state.obstacle, DISC + OBSTACLE)}
    if world.task == "push":
        gaps |= {"block": (state.disc, state.block, DISC + BLOCK), "both": (state.block, state.obstacle, BLOCK)}
    for a, b, least in gaps.values():
        assert np.linalg.norm(a - b, axis=-1).min() >= least - 1e-3
    steps = np.abs(np.diff(state.disc, axis=1)).max()
    assert steps <= 1.5 * world.max_step
    assert (np.diff(state.obstacle, axis=1) == 0).all() and (np.diff(state.goal, axis=1) == 0).all()


def test_a_block_moves_only_when_it_is_pushed():
    world = Tabletop()
    at = lambda x, y: jnp.array([x, y], jnp.float32)  # noqa: E731
    state = State(at(-0.5, 0.5), at(-0.25, 0.5), at(0.5, 0.8), at(0.0, -0.2))
    pushed = tabletop.step(world, state, at(1.0, 0.0))
    np.testing.assert_allclose(pushed.block, [-0.5 + 0.06 + DISC + BLOCK, 0.5], atol=1e-5)
    free = tabletop.step(world, state, at(-1.0, 0.3))
    np.testing.assert_array_equal(free.block, state.block)
    np.testing.assert_allclose(free.disc, [-0.56, 0.518], atol=1e-5)
    np.testing.assert_array_equal(tabletop.step(world, state, at(9.0, 0.0)).disc, pushed.disc)
    # Hit a little off its middle the block moves as the disc does; grazed, it gives way to the side.
    off = tabletop.step(world, state._replace(block=at(-0.27, 0.58)), at(1.0, 0.0))
    assert off.block[0] > -0.27 and abs(off.block[1] - 0.58) < 1e-5
    grazed = tabletop.step(world, state._replace(block=at(-0.45, 0.735)), at(1.0, 0.0))
    assert grazed.block[1] > 0.735
    # A block between wall and disc holds the disc.
    stuck = state._replace(block=at(0.86, 0.5), disc=at(0.62, 0.5))
    np.testing.assert_allclose(tabletop.step(world, stuck, at(1.0, 0.0)).disc, stuck.disc, atol=1e-5)
    assert not tabletop.done(world, state) and tabletop.done(world, state._replace(goal=state.block + 0.05))


@pytest.mark.parametrize("task", tabletop.TASKS)
def test_to_be_undecided_is_to_be_held_by_the_obstacle(task):
    world = Tabletop(task)
    state = tabletop.reset(world, jax.random.key(0))
    straight = jnp.broadcast_to(state.obstacle - state.disc, (40, 2)) * 2
    end = tabletop.simulate(world, state, straight).disc[-1]
    assert end[1] < state.obstacle[1] and jnp.linalg.norm(end - state.obstacle) < DISC + OBSTACLE + 0.1
    # It is not caught: backing out is possible.
    away = tabletop.step(world, state._replace(disc=end), state.disc - end)
    assert away.disc[1] < end[1]


def test_mirrored_worlds_behave_mirrored():
    world = Tabletop()
    mirror = jnp.array([-1.0, 1.0])
    state = tabletop.reset(world, jax.random.key(3))
    flipped = jax.tree.map(lambda x: x * mirror, state)
    for _ in range(30):
        action, other = tabletop.expert(world, state, -1), tabletop.expert(world, flipped, 1)
        np.testing.assert_allclose(other, action * mirror, atol=1e-4)
        state, flipped = tabletop.step(world, state, action), tabletop.step(world, flipped, other)
        np.testing.assert_allclose(flipped.disc, state.disc * mirror, atol=1e-4)


def test_simulating_the_recorded_actions_gives_the_recorded_states(expert):
    world, outcome = expert
    starts = jax.tree.map(lambda leaf: jnp.asarray(leaf[:20, 0]), outcome.states)
    states = jax.vmap(partial(tabletop.simulate, world))(starts, jnp.asarray(outcome.actions[:20]))
    np.testing.assert_allclose(tabletop.observe(states), tabletop.observe(outcome.states)[:20], atol=1e-5)


def test_an_episode_does_not_depend_on_those_beside_it(expert):
    world, outcome = expert
    few = run(world, episodes=3)
    seen = tabletop.observe(few.states)
    np.testing.assert_allclose(seen, tabletop.observe(outcome.states)[:3], atol=1e-6)
    assert not np.allclose(tabletop.observe(run(world, seed=1, episodes=3).states), seen)


def test_a_policy_sees_the_state_and_frames_of_it():
    world, seen = Tabletop("reach"), []

    def act(params, count, observation, key):
        seen.append({name: value.shape for name, value in observation.items()})
        return jnp.broadcast_to(jnp.array([0.0, 0.5]), (5, 4, 2)), count + 1

    policy = Policy(lambda params, o, key: 0, act)
    outcome = run(world, episodes=5, policy=policy, history=3, image_size=16, steps=10)
    assert seen[0] == {"observation": (5, 3, 8), "frames": (5, 3, 16, 16, 3)}
    assert not outcome.success.any() and (tabletop.sides(tabletop.observe(outcome.states))[0] == 0).all()


def test_wavering_is_to_steer_to_the_other_side_below_the_obstacle():
    observations = np.zeros((4, 9, 8))
    observations[..., 7] = -0.15
    observations[:3, :, 1] = -0.8
    actions = np.zeros((4, 8, 2))
    actions[..., 0] = np.repeat([[0.5, 0.5], [0.5, -0.5], [0.5, -0.1], [0.5, -0.5]], 4, axis=1)
    # The second episode wavers; the third hesitates, the fourth has passed.
    assert tabletop.wavering(observations, actions, 4).tolist() == [False, True, False, False]


def test_switches_of_side_are_counted_until_the_obstacle_is_passed():
    x = np.array([0.0, 0.1, 0.2, -0.1, -0.3, 0.05, -0.3, 0.4, 0.5], np.float32)
    y = np.array([-0.9, -0.8, -0.7, -0.6, -0.5, -0.4, -0.3, 0.1, 0.2], np.float32)
    observations = np.zeros((1, 9, 8), np.float32)
    observations[0, :, :2] = np.stack([x, y], axis=1)
    side, switches = tabletop.sides(jnp.asarray(observations))
    # Right, then left, within the margin nothing; what happens above the obstacle does not count.
    assert side.tolist() == [-1] and switches.tolist() == [1]


def test_pictures_are_in_range_and_read_back(expert):
    world, outcome = expert
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf[:30, :30:3]), outcome.states)
    push = world.task == "push"
    images = np.asarray(tabletop.render(state, 24, block=push))
    assert images.shape == (30, 10, 24, 24, 3) and images.min() >= -1 and images.max() <= 1
    places = tabletop.read(images)
    pixel = 2 / 24
    assert np.abs(places["disc"] - state.disc).max() < 0.25 * pixel
    assert np.isnan(places["block"]).all() if not push else np.abs(places["block"] - state.block).max() < 0.25 * pixel
    assert np.abs(places["goal"][:, 0] - state.goal[:, 0]).max() < 0.5 * pixel
    noisy = tabletop.read(images + 0.1 * np.random.default_rng(0).standard_normal(images.shape))
    assert np.abs(noisy["disc"] - state.disc).max() < pixel


def test_windows_are_cut_where_they_say(windows):
    source = windows
    assert source.shape == {"action": (6, 2), "future": (2, 24, 24, 3)}
    picture = lambda row: np.asarray(tabletop.render(tabletop.state_of(row), 24))  # noqa: E731
    for index in (0, 1, 30, len(source) - 1):
        e, t = source.episode[index], source.start[index]
        example = source[index]
        path, cond = source.observations[e], example["cond"]
        np.testing.assert_array_equal(cond["observation"], path[[max(t - 1, 0), t]])
        np.testing.assert_allclose(cond["frames"][1], picture(path[t]), atol=1e-5)
        np.testing.assert_allclose(example["x0"]["future"][0], picture(path[t + 6]), atol=1e-5)
        np.testing.assert_allclose(example["x0"]["future"][1], picture(path[t + 7]), atol=1e-5)
        expected = source.actions[e, t : t + 6] if e < 10 else np.zeros((6, 2))
        assert example["missing"]["action"] == (e >= 10)
        np.testing.assert_array_equal(example["x0"]["action"], expected)
    # The chunk leads from the last observation to the future: what forward and inverse dynamics rest on.
    e, t = source.episode[25], source.start[25]
    state = tabletop.state_of(jnp.asarray(source.observations[e, t]))
    end = tabletop.simulate(Tabletop(), state, jnp.asarray(source[25]["x0"]["action"]))
    np.testing.assert_allclose(tabletop.observe(end)[-1], source.observations[e, t + 6], atol=1e-5)


def test_windows_with_actions_are_repeated_to_their_share(windows):
    half = dataclasses.replace(windows, share=0.5)
    shown = half.episode < 10
    assert abs(shown.mean() - 0.5) < 0.05 and not shown[: len(windows)].all()
    pairs = lambda source, keep: set(zip(source.episode[keep], source.start[keep]))  # noqa: E731
    assert pairs(half, shown) == pairs(windows, windows.episode < 10)
    # Nothing of the others is repeated.
    assert (~shown).sum() == (windows.episode >= 10).sum()


def test_futures_may_be_latents_of_their_pictures(windows):
    """An encoder that halves the pictures: what it makes of each future is what comes out, and frames stay pictures."""
    made = windows.encoded(lambda pictures: pictures[:, ::2, ::2], batch=64)
    assert made.shape == {"action": (6, 2), "future": (2, 12, 12, 3)}
    indices = np.array([0, 7, 40, len(windows) - 1])
    batch, plain = made.take(indices), windows.take(indices)
    np.testing.assert_allclose(batch["x0"]["future"], plain["x0"]["future"][:, :, ::2, ::2], atol=1e-6)
    np.testing.assert_array_equal(batch["cond"]["frames"], plain["cond"]["frames"])
    pictures = data.Pictures(windows)
    assert len(pictures) == len(windows)
    np.testing.assert_allclose(pictures.take(indices)["x0"], plain["cond"]["frames"][:, -1], atol=1e-6)
    np.testing.assert_allclose(pictures[7]["x0"], plain["cond"]["frames"][1, -1], atol=1e-6)


def test_futures_may_be_principal_components_of_a_world_that_others_share(windows):
    few = dataclasses.replace(windows, labelled=3)
    made, other = (data.principal_futures(one, windows, 48, tokens=4, pictures=300) for one in (windows, few))
    assert made.shape == {"action": (6, 2), "future": (2, 4, 12)}
    indices = np.array([0, 7, 40, len(windows) - 1])
    plain, batch = windows.take(indices)["x0"]["future"], made.take(indices)["x0"]["future"]
    np.testing.assert_array_equal(other.take(indices)["x0"]["future"], batch)
    np.testing.assert_allclose(made.space.encode(plain), batch, atol=1e-4)
    assert np.square(made.space.decode(batch) - plain).mean() < 0.3 * np.square(plain - plain.mean(0)).mean()
    assert made.labelled == 10 and other.labelled == 3 and windows.space is None


def test_at_the_fork_both_sides_are_still_possible(windows):
    fork, side = windows.fork, windows.side
    assert windows.start[fork].max() < 5 and fork[windows.start == 0].all()
    assert 0.2 < (side[fork] < 0).mean() < 0.8 and set(side) == {-1, 1}


def test_splits_and_seeds_differ_and_repeat():
    make = partial(data.tabletop_demonstrations, episodes=5)
    train, again, test, other = make(), make(), make("test"), make(seed=1)
    np.testing.assert_array_equal(train.observations, again.observations)
    rows = [{x.tobytes() for x in s.observations[:, 0]} for s in (train, test, other)]
    assert not rows[0] & rows[1] and not rows[0] & rows[2]


def test_they_are_made_from_a_config_and_go_through_the_pipeline(windows):
    source = config.build(config.call("data.tabletop_demonstrations", episodes=8, task="reach"))
    batch = next(data.pipeline(source, 16))
    assert batch["x0"].shape == (16, 8, 2) and batch["cond"]["observation"].shape == (16, 2, 8)
    batch = next(data.pipeline(windows, 16))
    assert batch["x0"]["future"].shape == (16, 2, 24, 24, 3) and batch["missing"]["action"].dtype == bool


def test_impossible_tables_are_refused():
    for call, match in [
        (lambda: Tabletop("pull"), "push"),
        (lambda: Tabletop(max_step=0.5), "max_step"),
        (lambda: data.tabletop_demonstrations(episodes=2, labelled=3), "labelled is 3, but there are 2"),
        (lambda: data.tabletop_demonstrations(episodes=2, labelled=1), "without a future"),
        (lambda: data.tabletop_demonstrations(episodes=2, labelled=1, future=1, share=1.5), "share"),
        (lambda: data.tabletop_demonstrations(episodes=2, future=1).encoded(lambda x: x), "image_size"),
        (lambda: data.Pictures(data.tabletop_demonstrations(episodes=2)), "image_size"),
        (lambda: data.principal_futures(*[data.tabletop_demonstrations(episodes=2)] * 2, 4), "image_size"),
        (lambda: data.tabletop_demonstrations(episodes=2, chunk=90), "too short"),
        (lambda: tabletop.read(np.zeros((24, 24))), "images"),
    ]:
        with pytest.raises(InvalidInput, match=match):
            call()
