"""A recording changes nothing, holds what was said at each step, and shows when a sample is decided."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers import analytic, denoiser, gaussian_mixture, guided, recorded
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network
from tests.denoisers import tiny

VP = processes.vp_linear()
GRID = timesteps.from_array([1.0, 0.7, 0.4, 0.2, 0.0])
STEPS = len(GRID) - 1
KEY = jax.random.key(3)
SHAPE = (3, 2, 2, 2)
COND = {"label": jnp.array([0, 2, 1])}
NETWORK = tiny.network()
PLAIN = denoiser(NETWORK, VP)
PARAMS = NETWORK.init(jax.random.key(0), jnp.zeros(SHAPE), jnp.zeros(3), COND)


def run(one, params, solver, cond=None, shape=SHAPE, save_every=None, grid=GRID):
    """The whole run, compiled."""
    return jax.jit(
        lambda params: sample(KEY, one, params, solver, grid, shape=shape, cond=cond, save_every=save_every)
    )(params)


def told(prediction, x, step):
    return {"x": x, "x0": prediction.x0, "t": jnp.broadcast_to(step.t, x.shape[:1])}


@pytest.mark.parametrize("guidance", [None, 2.5])
def test_nothing_else_is_changed_and_each_step_has_its_values(guidance):
    one = PLAIN if guidance is None else guided(PLAIN, guidance, null={"label": 4})
    plain = run(one, PARAMS, solvers.ddim(), COND, save_every=1)
    seen = run(recorded(one, STEPS, told), PARAMS, solvers.ddim(), COND, save_every=1)
    np.testing.assert_array_equal(seen.x, plain.x)
    np.testing.assert_array_equal(seen.trace, plain.trace)
    assert seen.cost == plain.cost
    values = seen.run.carry.values
    np.testing.assert_array_equal(values["t"], jnp.broadcast_to(GRID[:-1, None], (STEPS, 3)))
    np.testing.assert_array_equal(values["x"][1:], plain.trace[:-1])
    for index in range(STEPS):
        step = tiny.step_at(GRID[index], index, GRID[index + 1], STEPS)
        said = tiny.ask(one, PARAMS, values["x"][index], step, COND)
        np.testing.assert_allclose(values["x0"][index], said.x0, rtol=1e-4, atol=1e-4)


def test_the_last_prediction_is_the_sample_that_is_returned():
    # The last step goes to sigma = 0, where x = x0.
    for solver in (solvers.ddim(), solvers.lcm(), solvers.ddpm()):
        result = run(recorded(PLAIN, STEPS), PARAMS, solver, COND)
        np.testing.assert_allclose(result.run.carry.values[-1], result.x, rtol=1e-5, atol=1e-5)


def test_of_a_point_mass_nothing_is_ever_undecided():
    point = gaussian_mixture(jax.random.normal(jax.random.key(7), (1, 2, 2, 2)), 0.0)
    values = run(recorded(analytic(VP), STEPS), point, solvers.ddim()).run.carry.values
    np.testing.assert_allclose(values, jnp.broadcast_to(point.means, (STEPS, *SHAPE)), atol=1e-5)


def test_predictions_are_the_same_whatever_the_network_predicts():
    mixture = gaussian_mixture(jax.random.normal(jax.random.key(7), (3, 2, 2, 2)), 0.3)

    def trace(prediction):
        process = processes.vp_linear(prediction=prediction, time="t")

        def exact(params, x, t, cond, train=False, key=None):
            said, _ = analytic(process).apply(params, (), x, tiny.step_at(t), cond)
            return process.target(said.x0, said.eps, t), {}

        return run(recorded(denoiser(Network(None, exact), process), STEPS), mixture, solvers.ddim()).run.carry.values

    reference = trace("x0")
    for prediction in ("v", "velocity"):
        np.testing.assert_allclose(trace(prediction), reference, atol=1e-5)
    # From epsilon, x0 is known to float32 times sigma / alpha, which is 158 at the end of DDPM's schedule.
    np.testing.assert_allclose(trace("epsilon")[1:], reference[1:], atol=1e-4)


def test_a_segment_is_recorded_into_its_own_places():
    one = recorded(PLAIN, STEPS)

    @jax.jit
    def halves(params):
        first = sample(KEY, one, params, solvers.ddim(), GRID, shape=SHAPE, cond=COND, stop=2)
        return first.run.carry.values, sample(
            KEY, one, params, solvers.ddim(), GRID, resume=first.run, cond=COND, start=2
        ).run.carry.values

    half, whole = halves(PARAMS)
    np.testing.assert_array_equal(half[2:], 0.0)
    np.testing.assert_allclose(whole, run(one, PARAMS, solvers.ddim(), COND).run.carry.values, rtol=1e-5, atol=1e-5)


def test_memories_are_kept_as_they_were():
    inner = tiny.remembering(PLAIN)
    plain = run(inner, PARAMS, solvers.ddim(), COND).run.carry
    kept = run(recorded(inner, STEPS), PARAMS, solvers.ddim(), COND).run.carry.inner
    chex.assert_trees_all_equal(kept, plain)


def test_wrong_input_is_told():
    with pytest.raises(InvalidInput, match="num_steps is 0"):
        recorded(PLAIN, 0)
