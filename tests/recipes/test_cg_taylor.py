"""The mixture in stages, what forecasts were worth, curves at equal work, and the released settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.config import build, load
from diffusion_jax.models import count_params
from diffusion_jax.recipes.parts.gating import (
    GateSettings,
    error_at,
    last_block,
    matched,
    median_error,
    mixture_stages,
    run_of,
    true_errors,
)
from tests.denoisers.tiny import ask, step_at

PROCESS = processes.vp_linear(time="t")
GRID = timesteps.linspace(10, 1000)
MIXTURE = denoisers.gaussian_mixture(jax.random.normal(jax.random.key(1), (3, 4)), 0.2, weights=[1.0, 2.0, 3.0])


def test_the_mixture_in_stages_is_the_exact_denoiser():
    x, step = jax.random.normal(jax.random.key(0), (5, 4)), step_at(0.3)
    stages, t = mixture_stages(PROCESS), jnp.full(5, 0.3)
    found = stages.tail(MIXTURE, stages.body(MIXTURE, stages.head(MIXTURE, x, t), x, t), x, t)[0]
    exact = ask(denoisers.analytic(PROCESS), MIXTURE, x, step)
    np.testing.assert_allclose(found, exact.eps, atol=1e-5)
    np.testing.assert_allclose(
        jax.nn.softmax(stages.head(MIXTURE, x, t), axis=1), exact.extras["responsibilities"], atol=1e-5
    )


def test_the_gate_is_matched_from_below_and_its_errors_are_the_replayed_ones():
    stages, settings = mixture_stages(PROCESS), GateSettings(1, 1, 2)
    run = run_of(last_block(stages, PROCESS, settings), solvers.ddim(), GRID, (8, 4))
    key = jax.random.key(0)
    clock = run(key, MIXTURE, jnp.inf, 2)
    assert clock.steps[0].tolist() == [True, True, False, True, False, True, False, True, False, True]
    gate = matched(lambda at: run(key, MIXTURE, at, 11), float(clock.full))
    assert 3 <= float(gate.full) <= float(clock.full) == 6
    probe, last = true_errors(stages, PROCESS, MIXTURE, gate, GRID, settings)
    np.testing.assert_allclose(probe, gate.error, atol=1e-5)
    assert np.isinf(last[0]) and np.isfinite(last[1:]).all()


def test_the_median_is_not_moved_by_one_sample():
    x = np.zeros((5, 2))
    x[0] = 100.0
    x[1:] = 0.5
    assert median_error(x, np.zeros((5, 2))) == 0.5


def test_curves_are_read_at_equal_work_on_a_line_of_logarithms():
    curve = [{"compute": 4.0, "error": 0.01}, {"compute": 2.0, "error": 1.0}]
    assert error_at(curve, "compute", 3.0) == pytest.approx(0.1)


def test_the_released_settings_are_of_the_true_network():
    config = load("configs/recipes/cg_taylor.py:paper")
    network, grid = build(config.base.model), build(config.digits.grid)
    x, cond = jnp.zeros((1, 32, 32, 4)), {"label": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), cond)
    assert count_params(params) == pytest.approx(675e6, rel=0.01) and len(grid) == 51
    settings = GateSettings(**config.digits.settings)
    denoiser = last_block(network, build(config.base.process), settings)(*config.digits.thresholds, 51)
    carry = jax.eval_shape(denoiser.init, params, x, cond)
    assert carry.probe.values.shape == (4, 1, 256, 1152) and carry.last.values.shape == (2, 1, 256, 1152)
