"""The gap between two models' predictions: zero for the same one, closed where the difference is known."""

import jax
import numpy as np
import pytest

from diffusion_jax import denoisers, metrics, processes
from diffusion_jax.errors import InvalidInput

KEY, VP, TIMES = jax.random.key(0), processes.vp_linear(), (0.031, 0.201, 0.401, 1.0)
ANGLES = np.arange(8) * np.pi / 4
RING = denoisers.gaussian_mixture(1.5 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1), 0.15)


def gap(first, second, process=VP, other=None, x0=None):
    x0 = denoisers.sample_mixture(KEY, RING, 1000)[0] if x0 is None else x0
    exact = denoisers.analytic(process)
    return metrics.epsilon_gap(KEY, (exact, exact if other is None else other), (first, second), x0, TIMES)


def test_a_coarser_model_is_wrong_where_noise_is_low_and_right_where_it_is_high():
    coarse, finer = (gap(denoisers.merged_components(RING, np.arange(8) * n // 8), RING) for n in (1, 4))
    assert coarse.shape == (4,) and coarse[-1] < 1e-6 < 0.1 < coarse[0]
    # The ring of the card: 0.12 at index 200, below 1e-3 from 400 on.
    assert coarse[1] == pytest.approx(0.12, abs=0.02) and (coarse[2:] < 1e-3).all()
    assert (coarse[:3] > finer[:3]).all() and not gap(RING, RING).any()


def test_the_gap_of_two_gaussians_is_that_of_their_means():
    """eps = sigma (x - alpha m) / (alpha^2 s^2 + sigma^2): it differs by a constant."""
    one, other = (denoisers.gaussian_mixture([[mean, 0.0]], 0.5) for mean in (1.0, -1.0))
    alpha, sigma = (np.asarray(level(np.float32(TIMES))) for level in (VP.alpha, VP.sigma))
    expected = (2 * alpha * sigma / (alpha**2 * 0.25 + sigma**2)) ** 2 / 2
    np.testing.assert_allclose(gap(one, other, x0=np.zeros((5, 2), np.float32)), expected, rtol=1e-4)


def test_other_schedules_join_and_other_data_are_refused():
    flow = denoisers.on_process(denoisers.analytic(processes.rectified_flow()), VP)
    np.testing.assert_allclose(gap(RING, RING, other=flow), 0.0, atol=1e-8)
    with pytest.raises(InvalidInput, match="epsilon_gap"):
        discrete = denoisers.analytic(VP)._replace(process=processes.absorbing(5))
        metrics.epsilon_gap(KEY, (discrete, discrete), (RING, RING), np.zeros((2, 2)), TIMES)
