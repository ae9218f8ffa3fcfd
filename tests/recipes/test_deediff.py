"""Runs at equal numbers of blocks, thresholds, and the published settings."""

import jax
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.acceleration import exit_depths
from diffusion_jax.config import load
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.parts.early_exits import equal_depths

UNCERTAINTY = np.sort(np.random.default_rng(0).uniform(size=(6, 8, 16)), axis=1)[:, ::-1]


def test_all_ways_run_as_many_blocks_and_the_reversed_table_turns_time_around():
    depth = exit_depths(UNCERTAINTY, 0.4)
    ways = equal_depths(depth, 0)
    for way, other in ways.items():
        assert other.shape == depth.shape, way
        assert other.mean() == pytest.approx(depth.mean(), abs=0.1), way
    assert np.ptp(ways["fixed"]) <= 1 and (ways["fixed"] == ways["fixed"][0]).all()
    np.testing.assert_array_equal(ways["reversed"], ways["table"][::-1])
    np.testing.assert_array_equal(np.sort(ways["random"].ravel()), np.sort(depth.ravel()))


def test_the_published_sizes_can_be_built():
    config = load("configs/recipes/deediff.py:paper")
    experiment = prepare(config.tuned)
    exits = models.early_exit(experiment.network)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    t, cond = jax.ShapeDtypeStruct((1,), "float32"), {"label": jax.ShapeDtypeStruct((1,), "int32")}
    params = jax.eval_shape(exits.network.init, jax.random.key(0), x, t, cond)
    told = params["exits"]["uncertainty"]["blocks"]["block"]
    assert told["tokens"].shape == (13, 512, 12) and told["condition"].shape == (13, 512, 12)
    answers, _ = jax.eval_shape(exits.network.apply, params, x, t, cond)
    assert answers.output.shape == answers.uncertainty.shape == (13, 1, 32, 32, 3)
