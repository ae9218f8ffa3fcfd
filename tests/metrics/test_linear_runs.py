"""The covariance that a linear run makes, exactly: of the exact denoiser that of the data, of a causal one less."""

import functools

import jax
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.denoisers.analytic import gaussian_mixture
from diffusion_jax.metrics import run_covariance
from diffusion_jax.sampling import sample

FRAMES = 3
CLIP = denoisers.gaussian_clip(FRAMES)
TRUE = np.asarray(CLIP.covariances[0])


@functools.cache
def program(causal):
    oracle = denoisers.analytic(processes.rectified_flow(), causal)
    return jax.jit(lambda plan: run_covariance(oracle, CLIP, solvers.ddim(), plan, (FRAMES, 1)))


def error(steps, width, causal=False):
    plan = timesteps.staircase(timesteps.linspace(steps), FRAMES, width)
    # One program for all widths: at the end nothing moves any more.
    padded = np.pad(plan, [(0, steps * FRAMES + 1 - len(plan)), (0, 0), (0, 0)], mode="edge")
    return float(np.abs(program(causal)(padded) - TRUE).max())


def test_along_any_path_the_exact_denoiser_makes_the_data_to_first_order():
    for width in (0, 10):
        assert 1.6 < error(20, width) / error(40, 2 * width) < 2.4


def test_the_wider_the_staircase_the_less_a_causal_denoiser_misses():
    causal = [error(20, width, causal=True) for width in (0, 5, 10, 20)]
    assert causal == sorted(causal, reverse=True)
    assert causal[-1] == pytest.approx(error(20, 20), abs=1e-5)
    assert causal[0] > 2 * error(20, 0)


def test_it_is_the_covariance_of_samples():
    """Of shifted data too, and of noise that is not of unit size."""
    process, world = processes.vp_cosine(), gaussian_mixture(np.full((1, 2), 3.0), 0.5)
    oracle, ddim, grid = denoisers.analytic(process), solvers.ddim(), timesteps.linspace(5)
    begin = float(process.sigma(1.0)) * np.random.default_rng(0).standard_normal((4000, 2), np.float32)
    x = jax.jit(lambda x: sample(jax.random.key(0), oracle, world, ddim, grid, x_init=x).x)(begin)
    exact = jax.jit(lambda grid: run_covariance(oracle, world, ddim, grid, (2,)))(grid)
    np.testing.assert_allclose(np.cov(x.T), exact, atol=0.04)
    assert float(exact[0, 0]) > 0.1
