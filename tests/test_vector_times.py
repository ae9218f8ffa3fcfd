"""What vector times promise, on clips with a known exact denoiser: paths agree, conditions are exact, causality costs.

Runs are affine in their noise, so their covariance follows from a basis: no sampling error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers import analytic, gaussian_clip, gaussian_mixture, posterior
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps import linspace

FLOW = processes.rectified_flow()
FRAMES = 6
CLIP = gaussian_clip(FRAMES)
COVARIANCE = np.asarray(CLIP.covariances[0])


def affine(plan, causal=False, known=0.0, process=FLOW):
    """The result for no noise `[F]`, and the linear part `[F, F]`: row i is what noise in frame i adds."""

    @jax.jit
    def program(plan, x):
        return sample(jax.random.key(0), analytic(process, causal), CLIP, solvers.ddim(), plan, x_init=x).x[..., 0]

    still = np.asarray(plan[0, 0] == 0)
    basis = np.concatenate([np.zeros((1, FRAMES)), np.eye(FRAMES)])
    basis[:, still] = known
    out = np.asarray(program(plan, jnp.asarray(basis[..., None], jnp.float32)))
    return out[0], out[1:] - out[0]


def covariance_error(plan, **options):
    _, linear = affine(plan, **options)
    return np.abs(linear.T @ linear - COVARIANCE).max()


def random_monotone(grid):
    """Frames move one at a time in a random order."""
    steps = grid.shape[0] - 1
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(FRAMES), steps))
    moved = np.cumsum(order[:, None] == np.arange(FRAMES), axis=0)
    return grid[np.concatenate([np.zeros((1, FRAMES), int), moved])][:, None]


PATHS = {
    "synchronous": lambda grid: timesteps.synchronous(grid, FRAMES),
    "staircase": lambda grid: timesteps.staircase(grid, FRAMES, (grid.shape[0] - 1) // 5),
    "reversed": lambda grid: timesteps.staircase(grid, FRAMES, (grid.shape[0] - 1) // 5)[..., ::-1],
    "random": random_monotone,
}


@pytest.mark.parametrize("process", [FLOW, processes.cosine()], ids=["flow", "vp"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_the_exact_score_leads_to_the_data(path, process):
    """Covariance errors of at most 0.065 at 50 levels and 0.0085 at 400: first order, whatever the path."""
    coarse, fine = (covariance_error(PATHS[path](linspace(steps)), process=process) for steps in (50, 400))
    assert coarse < 0.065 and fine < 0.0085
    assert fine < coarse / 6


@pytest.mark.parametrize(("width", "bias"), [(0, 0.46), (40, 0.32), (200, 0.07), (400, 0.0)])
def test_a_causal_denoiser_is_biased_unless_frames_come_one_by_one(width, bias):
    plan = timesteps.staircase(linspace(400), FRAMES, width)
    assert covariance_error(plan, causal=True) == pytest.approx(bias, abs=0.02)
    assert covariance_error(plan) < 0.0085


def test_the_causal_denoiser_sees_no_later_frames():
    frames = 4
    x, t = jax.random.normal(jax.random.key(1), (3, frames, 1)), jnp.linspace(0.1, 0.9, frames)[None]
    means = np.array([[[-1.0]] * frames, [[1.0]] * frames])
    covariances = np.stack([COVARIANCE[:frames, :frames], 0.5 * np.eye(frames)])
    mixture = gaussian_mixture(means, covariances=covariances)
    asked = jax.jit(lambda x: posterior(mixture, FLOW, x, t, causal=True))
    one, other = asked(x), asked(x.at[:, 2].add(3.0))
    np.testing.assert_array_equal(one.x0[:, :2], other.x0[:, :2])
    assert (one.x0[:, 2:] != other.x0[:, 2:]).all()
    # What a frame sees is the clip that ends with it.
    for last in (1, 3, frames):
        short = gaussian_mixture(means[:, :last], covariances=covariances[:, :last, :last])
        seen = jax.jit(lambda x, t, short=short: posterior(short, FLOW, x, t))(x[:, :last], t[:, :last])
        np.testing.assert_allclose(one.x0[:, last - 1], seen.x0[:, -1], atol=1e-5)
        np.testing.assert_allclose(one.eps[:, last - 1], seen.eps[:, -1], atol=1e-5)
    np.testing.assert_allclose(one.log_density, seen.log_density, rtol=1e-5)


@pytest.mark.parametrize("given", [(0,), (0, -1), (2,)])
def test_frames_at_zero_are_conditions(given):
    """Mean and covariance of the rest given those frames, within 0.02 at 400 steps."""
    mean, linear = affine(timesteps.frames(linspace(400), FRAMES, given), known=1.5)
    at = np.arange(FRAMES)[list(given)]
    rest = np.setdiff1d(np.arange(FRAMES), at)
    gain = COVARIANCE[np.ix_(rest, at)] @ np.linalg.inv(COVARIANCE[np.ix_(at, at)])
    np.testing.assert_allclose(mean[rest], gain @ np.full(len(at), 1.5), atol=0.02)
    expected = COVARIANCE[np.ix_(rest, rest)] - gain @ COVARIANCE[np.ix_(at, rest)]
    np.testing.assert_allclose((linear.T @ linear)[np.ix_(rest, rest)], expected, atol=0.02)
    np.testing.assert_array_equal(mean[at], np.float32(1.5))


def test_soft_conditions_stay_exact_in_the_limit():
    """A frame known up to the level m: the result has the data's covariance when what it begins with has."""
    plan = timesteps.multiplied(linspace(400), [0.4, 1.0, 1.0, 1.0, 1.0, 1.0])
    _, linear = affine(plan)
    # The frame begins as 0.6 x0 + 0.4 e, the others as noise.
    start = np.eye(FRAMES)
    start[0, 0] = 0.6**2 + 0.4**2
    np.testing.assert_allclose(linear.T @ start @ linear, COVARIANCE, atol=0.02)
