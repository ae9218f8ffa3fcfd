"""Gate and clock on the mixture at equal evaluations, and the released settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.acceleration import cg_taylor
from diffusion_jax.config import build, load
from diffusion_jax.models import count_params
from diffusion_jax.recipes import cg_taylor as study
from diffusion_jax.recipes.study import Study


def test_on_the_mixture_the_gate_asks_as_often_as_the_clock(tmp_path):
    config = load("configs/recipes/cg_taylor.py")
    config.mixture.update({"samples": 8, "dims": 4})
    config.mixture.grid.steps, config.mixture.intervals = 12, {3: ""}
    rows, seen = study.on_mixture(Study(config, (0, 1), tmp_path, True, {}), config.mixture)
    # Three of the warm-up, then 5, 8, 11, which is the last; the gate is calibrated on other noise.
    assert rows[0].title == "mixture, 6 evaluations: gate against clock, typical"
    assert 4 <= float(rows[0].figure.split()[-1]) <= 7
    assert len({row.title for row in rows}) == len(rows) == 3 and all(np.isfinite(row.ours).all() for row in rows)
    assert {len(times) == len(errors) == 9 for times, errors in seen.values()} == {True}


def test_the_released_settings_are_of_the_true_network():
    config = load("configs/recipes/cg_taylor.py:paper")
    network, grid, x = build(config.model), build(config.grid), jnp.zeros((1, 32, 32, 4))
    cond = {"label": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), cond)
    assert count_params(params) == pytest.approx(675e6, rel=0.01) and len(grid) == 51
    orders = {"probe_order": config.probe_order, "order": config.order, "warmup": config.warmup}
    denoiser = cg_taylor(network, build(config.process), config.threshold, **orders)
    carry = jax.eval_shape(denoiser.init, params, x, cond)
    assert carry.probe.values.shape == (4, 1, 256, 1152) and carry.last.values.shape == (2, 1, 256, 1152)
