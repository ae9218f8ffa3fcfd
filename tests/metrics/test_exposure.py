"""What a run's own states cost: nothing where answers are true, and as much as they are off otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import metrics, processes
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import InvalidInput
from diffusion_jax.timesteps import linspace
from diffusion_jax.typing import Network

X0 = np.random.default_rng(0).standard_normal((6, 2), np.float32)
FLOW = processes.rectified_flow("x0", time="t")


def errors(answer):
    told = denoiser(Network(lambda *_: (), lambda params, x, t, cond: (answer(x, t[:, None]), {})), FLOW)
    return jax.jit(lambda key: metrics.exposure_errors(key, told, (), X0, linspace(5)))(jax.random.key(1))


def test_only_answers_that_depend_on_the_state_make_its_errors_cost():
    found = errors(lambda x, t: X0 + 0.5)
    np.testing.assert_allclose(found.free, 0.25, rtol=1e-5)
    np.testing.assert_allclose(found.forced, 0.25, rtol=1e-5)
    # An answer that is off in proportion to the state: both agree in the first step, where the state is the noise.
    found = errors(lambda x, t: X0 + 0.5 * x)
    assert found.free.shape == found.forced.shape == (5, 6)
    np.testing.assert_allclose(found.free[0], found.forced[0], rtol=1e-5)
    assert np.abs(found.free[-1] - found.forced[-1]).min() > 1e-4
    state = 0.8 * X0  # alpha x0 of the last forced state, t = 0.2, has 0.2 noise beside it
    assert np.abs(np.mean(found.forced[-1]) - 0.25 * np.square(state).mean()) < 0.1


def test_figures_are_the_largest_fall_and_what_own_states_add_at_the_end():
    free = np.array([[0.1, 0.1], [0.01, 0.01], [0.1, 0.01]], np.float32)
    found = metrics.exposure_figures(metrics.ExposureErrors(free, 0.5 * free))
    assert [round(found[f"step {i}"], 4) for i in range(3)] == [10, 20, 15]
    np.testing.assert_allclose((found["fall"], found["gap"]), (5.0, 0.0275), rtol=1e-5)
    assert metrics.exposure_figures(metrics.ExposureErrors(free[:2], free[:2]))["fall"] == 0


def test_discrete_processes_are_refused():
    told = denoiser(Network(lambda *_: (), lambda *_: ((), {})), processes.absorbing(3))
    with pytest.raises(InvalidInput, match="exposure_errors"):
        metrics.exposure_errors(jax.random.key(0), told, (), jnp.zeros((2, 3)), linspace(2))
