"""A vector time whose entries are equal is the scalar time, bit for bit, in solvers and in plans."""

import jax
import numpy as np
import pytest

from diffusion_jax import processes, timesteps
from diffusion_jax.denoisers import denoiser
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import linspace
from tests import shipped
from tests.denoisers.tiny import network
from tests.models.shared import now
from tests.solvers.test_solver_laws import ALL, MOVING, ended, smooth
from tests.timesteps.test_plans import ONE_AND_MULTI_STEP

FLOW = processes.rectified_flow()
KEY = jax.random.key(3)


@pytest.mark.parametrize("name", ["ddim", "ddpm small", "unipc", "dpm_solver", "sa_solver", "heun", "flow_heun"])
def test_equal_entries_of_a_vector_time_are_the_scalar_run_bit_for_bit(name):
    """Operation by operation; the XLA of jax 0.12 rounds products and sums once at other places (1e-7 seen)."""

    def made(grid):
        return sample(jax.random.key(3), smooth(), None, ALL[name], grid, shape=(2, 3)).x

    scalar = ended(MOVING)
    vector = np.stack([scalar, scalar], axis=1)
    with jax.disable_jit():
        np.testing.assert_array_equal(made(scalar), made(vector))
    one, other = shipped.jit(lambda *grids: [made(grid) for grid in grids])(scalar, vector)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_heun", "dpm_solver_pp", "unipc"])
def test_a_synchronous_plan_is_the_scalar_model_bit_for_bit(name):
    """Operation by operation, as compiled programs of different shapes may be fused differently (1e-6 seen)."""
    net, grid = network(), linspace(3)
    plan = timesteps.synchronous(grid, 4)
    x = np.random.default_rng(3).standard_normal((3, 4, 2)).astype(np.float32)
    params = now(lambda: net.init(KEY, x, None, None))
    with jax.disable_jit():
        scalar, vector = (
            sample(KEY, denoiser(net, FLOW), params, ONE_AND_MULTI_STEP[name], grid, x_init=x).x
            for grid in (grid, plan)
        )
    np.testing.assert_array_equal(scalar, vector)
