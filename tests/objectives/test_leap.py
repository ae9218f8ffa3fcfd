"""Leap distillation and its parts: both ends of the leap, the exact solution, where gradients go, the best time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, distributed, models, objectives, processes, solvers, timesteps
from diffusion_jax.clock import single_step
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Aux, Network, Objective
from tests.models.drawn import drawn

KEY = jax.random.key(0)
PROCESS = processes.vp_scaled_linear(zero_terminal_snr=True)
S = 0.8
PRIOR = denoisers.gaussian_mixture(np.zeros((1, 4), np.float32), S)
EXACT = denoisers.analytic(PROCESS)
RNG = np.random.default_rng(0)
X0, BASE = (RNG.standard_normal((16, 4)).astype(np.float32) for _ in range(2))
BATCH = {"x0": X0, "base": BASE, "index": jnp.arange(16)}


def solution(process, shift=0.0):
    """The network of v that answers with the end of the exact flow of N(0, s^2), which is linear:

    x_0 = s x_t / sqrt(alpha^2 s^2 + sigma^2), and of a parameter "off" that is added to it."""

    def apply(params, x, t, cond=None, train=False, key=None):
        t = (t + 1.0) / 1000.0
        alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
        x0 = S * x / jnp.sqrt(jnp.square(alpha * S) + jnp.square(sigma)) + params["off"]
        # v of this x0: eps by division where that is possible, and at sigma = 0 x0 itself is asked for.
        return (alpha * x - x0) / jnp.where(sigma == 0, 1.0, sigma) * (sigma != 0), {}

    return Network(lambda *_: {"off": jnp.float32(shift)}, apply)


NETWORK = solution(PROCESS)


@pytest.fixture(scope="module")
def leap():
    """The loss and its gradient at a student that is off by so much, for a grid so fine."""
    objective = objectives.leap_distillation(NETWORK, PROCESS, EXACT, PRIOR, latest=0.6, levels=500)

    @jax.jit
    def loss(student, target, base):
        batch = {**BATCH, "base": base}
        state = objective.init(KEY, target, batch)

        def mean(student, x0, teacher):
            own = state._replace(teacher=state.teacher._replace(value=teacher))
            losses, aux = objective.loss(student, own, {**batch, "x0": x0}, KEY)
            return losses.mean(), (losses, aux.state.target)

        grads, (losses, after) = jax.grad(mean, (0, 1, 2), has_aux=True)(student, X0, PRIOR)
        return losses, grads, after

    return lambda student, target=0.0, base=BASE: loss(
        {"off": jnp.float32(student)}, {"off": jnp.float32(target)}, base
    )


def test_the_solution_of_the_teachers_flow_has_no_loss_and_others_do(leap):
    """One DDIM step of 500 is not exact: what is left is of its second order."""
    losses, _, after = leap(0.0)
    assert losses.max() < 3e-3 and float(after["off"]) == 0.0
    losses, grads, after = leap(0.5, 0.0)
    # |d| = 0.5 * 2 of four entries, without the width of the pseudo-Huber distance.
    np.testing.assert_allclose(losses, 1.0, atol=5e-3)
    np.testing.assert_allclose(grads[0]["off"], 2.0, atol=2e-2)
    np.testing.assert_allclose(after["off"], 0.05 * 0.5, rtol=1e-5)


def test_only_the_student_learns_and_it_sees_states_of_the_coarse_sample(leap):
    _, (student, x0, teacher), _ = leap(0.5)
    assert float(student["off"]) != 0.0
    assert not np.asarray(x0).any()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(teacher))
    # The loss is exactly 0 for neither base, and differs by it.
    first, second = (leap(0.0, 0.1, base)[0] for base in (BASE, 3.0 * BASE))
    assert not np.allclose(first, second, atol=1e-6)
    with pytest.raises(InvalidInput, match="'base'"):
        objective = objectives.leap_distillation(NETWORK, PROCESS, EXACT, PRIOR)
        objective.loss({"off": 0.0}, None, {"x0": X0}, KEY)
    with pytest.raises(InvalidInput, match="'base'"):
        objectives.leap_reward(NETWORK, PROCESS)({"off": 0.0}, {"x0": X0}, jnp.zeros(len(X0)), KEY)


def test_times_of_training_end_at_the_latest():
    objective = objectives.leap_distillation(NETWORK, PROCESS, EXACT, PRIOR, latest=0.4, levels=8)
    batch = {"x0": np.zeros((256, 4), np.float32), "index": jnp.arange(256)}
    state = objective.init(KEY, {"off": jnp.float32(0)}, {**batch, "base": batch["x0"]})
    t = np.unique(np.round(np.asarray(objective.prepare(state, batch, KEY)["t"]), 6))
    np.testing.assert_allclose(t, 0.05 * np.arange(1, 9), atol=1e-6)


@pytest.mark.parametrize("name", ["dpm_solver_pp"])
def test_every_sampler_begins_anywhere_and_each_sample_at_its_own_time(name):
    """From t = 0 the coarse sample comes back bit for bit; from pure noise nothing of it is left; in between each
    sample is what it is alone."""
    solver = getattr(solvers, name)()
    begun = jnp.asarray([0.0, 0.3, 0.6, 1.0])

    @jax.jit
    def run(t, base, index):
        grid = objectives.leap_grid(t, 3)
        x = timesteps.noised_start(KEY, PROCESS, grid, base, index)
        return sample(KEY, EXACT, PRIOR, solver, grid, x_init=x, index=index).x

    index = np.arange(4)
    together, other = run(begun, BASE[:4], index), run(begun, 2 * BASE[:4], index)
    np.testing.assert_array_equal(together[0], BASE[0])
    np.testing.assert_allclose(together[3], other[3], atol=1e-6)
    assert np.abs(together[1:3] - other[1:3]).min(axis=1).max() > 1e-3
    mixed = run(begun[::-1], BASE[:4][::-1], index[::-1])
    np.testing.assert_allclose(mixed[::-1], together, atol=1e-6)


def test_one_step_of_the_solution_is_the_end_of_the_flow_and_at_no_noise_nothing_happens():
    """f(x, 0) = x, and f(x, t) is the closed form of the flow."""
    inner = denoisers.denoiser(NETWORK, PROCESS)

    @jax.jit
    def answer(t):
        x = jnp.asarray(BASE)
        return inner.apply({"off": jnp.float32(0)}, (), x, single_step(t), None)[0].x0

    np.testing.assert_array_equal(answer(jnp.zeros(16)), BASE)
    t = jnp.full(16, 0.45)
    expected = S * BASE / np.sqrt((PROCESS.alpha(0.45) * S) ** 2 + PROCESS.sigma(0.45) ** 2)
    np.testing.assert_allclose(answer(t), expected, rtol=1e-4, atol=1e-5)


def test_the_best_time_of_a_leap_is_that_of_the_closed_form():
    """Of x0 ~ N(0, s^2) and a coarse x0 with an independent error of variance d^2 s^2, the one-step MMSE answer has
    the mean square error s^2 (u^2 + u + d^2) / (1 + u)^2 at u = sigma^2 / (alpha^2 s^2), least at max(0, 2 d^2 - 1)."""
    u = np.asarray([0.0, 0.5, 1.0, 3.0, 8.0], np.float32)
    times = timesteps.times_at_noise_ratios(PROCESS, S * np.sqrt(u[1:]))
    times = np.concatenate([[0.0], times]).astype(np.float32)
    # The table of noise levels is one of a thousand.
    u = np.asarray(jnp.square(PROCESS.sigma(times) / PROCESS.alpha(times))) / S**2
    count = 200_000

    @jax.jit
    def errors(d):
        x0, more = S * jax.random.normal(KEY, (2, count, 1))
        base = x0 + jnp.sqrt(d) * more
        keys = jax.random.split(jax.random.key(1), count)
        noise = jax.vmap(lambda key: jax.random.normal(key, (1,)))(keys)
        one = denoisers.gaussian_mixture(np.zeros((1, 1), np.float32), S)

        def at(t):
            x_t = PROCESS.marginal(base, noise, jnp.broadcast_to(t, (count,)))
            said, _ = EXACT.apply(one, (), x_t, single_step(jnp.broadcast_to(t, (count,))), None)
            return jnp.mean(jnp.square(said.x0 - x0))

        return jax.lax.map(at, jnp.asarray(times))

    for d in (0.3, 2.0):
        curve = S**2 * objectives.expected_leap_error(u, d)
        found = np.asarray(errors(d))
        np.testing.assert_allclose(found, curve, rtol=0.01)
        assert found.argmin() == np.abs(u - max(0.0, 2 * d - 1)).argmin()


def test_the_reward_is_the_error_against_the_true_data():
    reward = objectives.leap_reward(NETWORK, PROCESS)
    off = {"off": jnp.float32(0)}
    t = np.zeros(16, np.float32)
    # At no noise the answer is the coarse sample.
    found = jax.jit(reward)(off, BATCH, t, KEY)
    np.testing.assert_allclose(found, -np.square(BASE - X0).mean(1), rtol=1e-5)
    assert float(jax.jit(reward)(off, {**BATCH, "base": X0}, t, KEY).max()) == 0.0


def test_both_ends_of_a_clip_are_told_and_nothing_between():
    clips = RNG.standard_normal((2, 5, 2, 2, 3)).astype(np.float32)
    told = np.asarray(objectives.end_frames(clips))
    assert told.shape == (2, 5, 2, 2, 4)
    np.testing.assert_array_equal(told[:, [0, 4], ..., :3], clips[:, [0, 4]])
    np.testing.assert_array_equal(told[:, [0, 4], ..., 3], 1.0)
    assert not told[:, 1:4].any()
    many = np.broadcast_to(clips[:1], (400, *clips.shape[1:]))
    noised = np.asarray(jax.jit(objectives.end_frames)(many, jax.random.split(KEY, 400)))
    assert not noised[:, 1:4].any()
    # One log-normal sigma a clip, exp(N(-3, 0.5^2)).
    sigma = np.log((noised[:, [0, 4], ..., :3] - many[:, [0, 4]]).reshape(400, -1).std(1))
    assert abs(sigma.mean() + 3) < 0.1 and 0.4 < sigma.std() < 0.65
    with pytest.raises(InvalidInput, match=r"clips\.shape"):
        objectives.end_frames(clips[:, :1])


def test_ends_are_noised_anew_by_example_and_stand_before_what_the_batch_has_there():
    clips = RNG.standard_normal((6, 3, 2, 2, 1)).astype(np.float32)
    numbers, order = np.full((6, 3, 2, 2, 2), 7.0, np.float32), np.array([3, 1, 0, 5, 4, 2])
    batch = {"x0": clips, "cond": {"concat": numbers, "label": np.arange(6)}, "index": jnp.arange(10, 16)}

    def loss(params, state, batch, key):
        return jnp.zeros(6), Aux(state, {}, {}, batch["cond"])

    objective = objectives.conditioned_on_ends(Objective(lambda *_: (), loss))

    @jax.jit
    def seen(batch, key):
        return objective.loss((), (), batch, key)[1].extras

    told, other = seen(batch, KEY), seen(batch, jax.random.key(1))["concat"]
    np.testing.assert_array_equal(told["label"], np.arange(6))
    np.testing.assert_array_equal(told["concat"][..., 2:], numbers)
    np.testing.assert_array_equal(told["concat"][:, :, 0, 0, 1], np.tile([1.0, 0.0, 1.0], (6, 1)))
    noise = np.asarray(told["concat"])[:, ::2, ..., :1] - clips[:, ::2]
    assert (
        np.abs(noise).min() > 0
        and np.abs(noise).max() < 0.6
        and (other[:, ::2, ..., 0] != told["concat"][:, ::2, ..., 0]).all()
    )
    mixed = seen(jax.tree.map(lambda leaf: leaf[order], batch), KEY)["concat"]
    np.testing.assert_allclose(mixed, np.asarray(told["concat"])[order], atol=1e-6)
    np.testing.assert_allclose(objectives.leap_grid(np.float32([0.4, 0.8]), 2), [[0.4, 0.8], [0.2, 0.4], [0.0, 0.0]])


def clip_student():
    network = models.video_dit(
        "S/1", width=16, depth=1, heads=2, scan=False, attention="joint", conditions=(models.concat(),)
    )
    clips = RNG.standard_normal((8, 3, 1, 1, 4)).astype(np.float32)
    batch = {"x0": clips, "base": clips + 0.1, "cond": {"concat": np.ones((8, 3, 1, 1, 2), np.float32)}}
    told = {"concat": np.zeros((8, 3, 1, 1, 7), np.float32)}
    params = drawn(jax.eval_shape(network.init, KEY, clips, np.zeros(8, np.float32), told))
    policy = models.chooser(3, width=4, depth=1)
    both = {"student": params, "policy": drawn(jax.eval_shape(policy.init, KEY, clips))}
    leap = objectives.leap_distillation(
        network, PROCESS, denoisers.denoiser(network, PROCESS), drawn(params, 1), latest=0.6, levels=6
    )
    chosen = objectives.time_policy(policy, (0.1, 0.3, 0.5), objectives.leap_reward(network, PROCESS))
    joint = objectives.with_time_policy(leap, chosen, until=1)
    return objectives.conditioned_on_ends(joint), both, {**batch, "index": jnp.arange(8)}


def test_of_a_video_student_and_its_policy_every_term_is_alive_and_eight_devices_agree_with_one():
    objective, params, batch = clip_student()

    def mean(params, batch):
        return objective.loss(params, objective.init(KEY, params, batch), batch, KEY)[0].mean()

    value, grads = jax.jit(jax.value_and_grad(mean))(params, batch)
    for part in ("student", "policy"):
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[part])), part
    mesh = distributed.make_mesh()
    assert mesh.size == 8
    np.testing.assert_allclose(jax.jit(mean)(params, distributed.shard_batch(batch, mesh)), value, rtol=1e-5)
