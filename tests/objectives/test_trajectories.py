"""Learning on stored runs: the secant lands, a student without an error ends where the runs end, teachers are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, processes, solvers, timesteps
from diffusion_jax.clock import single_step
from diffusion_jax.denoisers import analytic, denoiser, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives import on_trajectories, secant
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network

KEY = jax.random.key(0)
PROCESSES = {
    "flow": processes.rectified_flow(),
    "flow, x0": processes.rectified_flow(prediction="x0"),
    "cosine, v": processes.vp_cosine(prediction="v"),
    "linear, epsilon": processes.vp_linear(prediction="epsilon"),
}
KEYS = timesteps.shift(timesteps.linspace(5), 7)
RNG = np.random.default_rng(0)
X, NEXT = (RNG.standard_normal((5, 3)).astype(np.float32) for _ in range(2))
WORLD = gaussian_mixture(np.array([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.5]], np.float32), 0.4)


def test_every_tenth_of_fifty_shifted_knots_is_five_shifted_knots():
    np.testing.assert_allclose(KEYS, timesteps.shift(timesteps.linspace(50), 7)[::10], atol=1e-6)
    np.testing.assert_allclose(KEYS, [1, 0.9655, 0.9130, 0.8235, 0.6364, 0], atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_one_step_with_the_secant_lands_and_the_pair_is_that_of_x(name):
    process = PROCESSES[name]
    t, t_next = np.asarray(KEYS[:-1]), np.asarray(KEYS[1:])

    @jax.jit
    def landed(x, x_next, t, t_next):
        said = secant(process, x, t, x_next, t_next)
        return process.marginal(said.x0, said.eps, t_next), process.marginal(said.x0, said.eps, t)

    there, here = landed(X, NEXT, t, t_next)
    np.testing.assert_allclose(there, NEXT, atol=2e-5)
    np.testing.assert_allclose(here, X, atol=2e-5)


def test_of_a_flow_it_is_the_average_velocity():
    said = secant(PROCESSES["flow"], X, 0.9, NEXT, 0.4)
    np.testing.assert_allclose(said.eps - said.x0, (NEXT - X) / -0.5, rtol=1e-4, atol=1e-5)


def remembering(process, states, grid):
    """A network of stored runs, which answers the secant of run i for example i, off by its parameter."""
    states = jnp.asarray(states)

    def apply(params, x, t, cond=None, train=False, key=None):
        step = jnp.argmin(jnp.abs(process.network_time(grid[:-1]) - t[:, None]), axis=1)
        rows = cond["run"]
        now, then = grid[step], grid[step + 1]
        said = secant(process, states[rows, step], now, states[rows, step + 1], then)
        return process.target(said.x0, said.eps, now) + params["off"], {}

    return Network(lambda *_: {"off": jnp.float32(0)}, apply)


@pytest.mark.parametrize("name", ["flow", "flow, x0", "cosine, v"])
def test_a_student_without_an_error_reproduces_the_stored_samples(name):
    process = PROCESSES[name]
    states = RNG.standard_normal((5, 6, 3)).astype(np.float32)
    network, zero, cond = remembering(process, states, KEYS), {"off": jnp.float32(0)}, {"run": np.arange(5)}
    batch = {"x0": states[:, -1], "states": states, "cond": cond}
    objective = on_trajectories(objectives.denoising(network, process), process, KEYS)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return objective.loss(params, objective.init(KEY, params, batch), batch, KEY)[0].mean()

    np.testing.assert_allclose(loss(zero)[0], 0.0, atol=1e-6)
    value, grads = loss({"off": jnp.float32(0.5)})
    np.testing.assert_allclose((value, grads["off"]), (0.25, 1.0), rtol=1e-2)
    student = denoiser(network, process)
    run = jax.jit(lambda x: sample(KEY, student, zero, solvers.ddim(), KEYS, x_init=x, cond=cond).x)
    np.testing.assert_allclose(run(states[:, 0]), states[:, -1], atol=1e-4)


def answering(process):
    """The exact network of a mixture, which is its parameters."""
    exact = analytic(process)

    def apply(params, x, t, cond=None, train=False, key=None):
        t = t / process.network_time(1.0)
        said, _ = exact.apply(params, (), x, single_step(t), None)
        return process.output(said, t), {}

    return Network(lambda *_: WORLD, apply)


def test_teachers_are_found_at_every_step_and_between_key_times_only_where_runs_are_straight():
    """With m = n the target is the teacher's output. With fewer keys it is so for a single point of data, whose runs
    are straight lines, and not for a mixture: there the secant is not the velocity at its beginning."""
    process = PROCESSES["flow"]
    network, exact = answering(process), analytic(process)
    point = gaussian_mixture(np.array([[1.0, 0.0, -1.0]] * 2, np.float32), 0.0)
    fifty, five = timesteps.shift(timesteps.linspace(50), 7), KEYS

    def at(grid, states, params):
        batch = {"x0": states[:, -1], "states": states}
        objective = on_trajectories(objectives.denoising(network, process), process, grid)
        return objective.loss(params, objective.init(KEY, params, batch), batch, KEY)[0].mean()

    @jax.jit
    def losses(params):
        run = sample(KEY, exact, params, solvers.ddim(), fifty, x_init=X, save_every=1)
        states = jnp.concatenate([X[None], run.trace]).swapaxes(0, 1)
        return at(fifty, states, params), at(five, states[:, ::10], params)

    every, secants = losses(WORLD)
    assert every < 1e-6 and secants > 1e-2
    assert losses(point)[1] < 1e-6


def test_times_that_a_batch_brings_along_become_those_of_the_student_and_preparing_twice_is_preparing_once():
    process = PROCESSES["flow"]
    states = RNG.standard_normal((4, 6, 3)).astype(np.float32)
    network = Network(lambda *_: {}, lambda params, x, t, cond=None, train=False, key=None: (x, {}))
    objective = on_trajectories(objectives.denoising(network, process), process, KEYS)
    batch = {"x0": states[:, -1], "states": states, "t": np.array([0.0, 0.7, 0.9, 1.0], np.float32)}
    once = objective.prepare((), batch, KEY)
    np.testing.assert_array_equal(once["step"], [4, 4, 2, 0])
    np.testing.assert_array_equal(once["t"], KEYS[once["step"]])
    twice = objective.prepare((), once, KEY)
    np.testing.assert_array_equal(once["x0"], twice["x0"])
    drawn = objective.prepare((), {"x0": np.repeat(states[:, -1], 32, 0), "states": np.repeat(states, 32, 0)}, KEY)
    assert set(np.asarray(drawn["step"]).tolist()) == set(range(5))
    others = objective.prepare((), {"x0": drawn["x0"], "states": np.repeat(states, 32, 0)}, jax.random.key(1))
    assert (np.asarray(others["step"]) != np.asarray(drawn["step"])).any()


def test_wrong_input_is_told():
    process = PROCESSES["flow"]
    network = Network(lambda *_: {}, lambda params, x, t, cond=None, train=False, key=None: (x, {}))
    own = objectives.denoising(network, process)
    objective = on_trajectories(own, process, KEYS)
    for batch, told in (({"x0": X}, "no 'states'"), ({"x0": X, "states": np.zeros((5, 3, 3))}, r"\(5, 6, 3\)")):
        with pytest.raises(InvalidInput, match=told):
            objective.init(KEY, {}, batch)
    with pytest.raises(InvalidInput, match="pauses"):
        on_trajectories(own, process, [1.0, 0.5, 0.5, 0.0])
