"""The released settings."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.config import build, load
from diffusion_jax.models import count_params
from diffusion_jax.recipes.parts.gating import GateSettings, last_block


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
