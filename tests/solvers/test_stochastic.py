"""Stochastic solvers keep the marginals: with the exact denoiser they reach the data's mean and covariance.

4096 samples of a correlated Gaussian from pure noise; sampling error of a mean is then 1/64 of a standard deviation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.sampling import sample

MEAN = np.array([0.5, -1.0])
COVARIANCE = np.array([[1.0, 0.5], [0.5, 0.6]])
MIXTURE = gaussian_mixture(MEAN[None], covariances=COVARIANCE[None])
NUM, STEPS = 4096, 192

VP, FLOW, EDM = processes.vp_cosine(), processes.rectified_flow(), processes.edm(sigma_max=20.0)

CASES = {
    "ddpm small": (solvers.ddpm(), VP),
    "ddpm large": (solvers.ddpm("large"), VP),
    "ddim 0.7": (solvers.ddim(0.7), FLOW),
    "euler_ancestral": (solvers.euler_ancestral(), EDM),
    "dpm_solver_pp sde": (solvers.dpm_solver_pp(2, equation="sde"), VP),
    "dpm_solver_pp sde singlestep": (solvers.dpm_solver_pp(2, "singlestep", "sde"), FLOW),
    "sa_solver": (solvers.sa_solver(2, 2), VP),
    "sa_solver 3": (solvers.sa_solver(3, 3, tau=0.7, interval=(0.0, 1.0)), FLOW),
    "edm": (solvers.edm(s_churn=20.0, s_noise=1.0), EDM),
    "flow_sde": (solvers.flow_sde(1.0), FLOW),
    "flow_sde odds": (solvers.flow_sde(0.5, "odds"), FLOW),
}


def moments(solver, process, steps):
    levels = jnp.linspace(1.0, 0.0, steps + 1)
    grid = levels**3 if process is EDM else levels
    run = jax.jit(lambda key: sample(key, analytic(process), MIXTURE, solver, grid, shape=(NUM, 2)).x)
    x = np.asarray(run(jax.random.key(5)))
    return x.mean(axis=0), np.cov(x.T)


@pytest.mark.parametrize("name", CASES)
def test_mean_and_covariance_are_those_of_the_data(name):
    mean, covariance = moments(*CASES[name], STEPS)
    # Four standard errors, and room for the discretisation of first-order methods.
    np.testing.assert_allclose(mean, MEAN, atol=0.07)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.1)


def test_second_order_noise_needs_few_steps():
    """With 8 steps the second-order SDE method is where the first-order one is not."""
    error = {
        order: np.abs(moments(solvers.dpm_solver_pp(order, equation="sde"), VP, 8)[1] - COVARIANCE).max()
        for order in (1, 2)
    }
    assert error[2] < 0.5 * error[1], error
