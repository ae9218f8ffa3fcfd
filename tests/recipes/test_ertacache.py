"""Arms of reuse at equal evaluations, the world of the mixture, overlaps of reuse sets, and the released settings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.acceleration import calibrate
from diffusion_jax.config import build, load
from diffusion_jax.recipes import ertacache
from diffusion_jax.recipes.parts.reuse_arms import ARMS, bench, errors, jaccard, samples, spread_schedule
from diffusion_jax.sampling import sample


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_every_arm_asks_as_often_and_fewer_steps_are_the_plain_solver(name):
    process, solver = {
        "flow": (processes.rectified_flow(), solvers.flow_euler()),
        "vp": (processes.vp_linear(100), solvers.ddim()),
    }[name]
    params = denoisers.gaussian_mixture(jax.random.normal(jax.random.key(0), (3, 4)), 0.2)
    world = bench(denoisers.analytic(process), solver, timesteps.linspace(8), (4,))
    runs = world.record(jax.random.key(1), params, None, 8)
    full = world.full(jax.random.key(2), params, None, 8)
    found = calibrate(runs, world.grid, process, 0.4)
    count = int(found.computed.sum())
    assert 2 < count < 8
    for arm in ARMS:
        x, evaluations = samples(world, arm, found, jax.random.key(2), params, None, 8)
        assert float(evaluations) == count, arm
        assert bool(jnp.isfinite(x).all())
    coarse = sample(
        jax.random.key(2), denoisers.analytic(process), params, solver, timesteps.linspace(count), shape=(8, 4)
    )
    fewer, _ = samples(world, "fewer", found, jax.random.key(2), params, None, 8)
    np.testing.assert_allclose(fewer, coarse.x, atol=1e-4)
    assert errors(world, calibrate(runs, world.grid, process, 0.0), jax.random.key(2), params, full)["all"] == 0


def test_the_mixture_is_measured_at_a_few_steps(tmp_path):
    """The smoke run has the digits alone."""
    config = load("configs/recipes/ertacache.py").mixture
    config.update({"dims": 4, "steps": 6, "calibration": 8, "samples": 8})
    claims, files = ertacache.mixture_claims(config, [0], tmp_path)
    assert len({one.name for one in claims}) == len(claims) == 22
    assert all(math.isfinite(one.baseline) and math.isfinite(one.ours) for one in claims)
    assert all(file.stat().st_size > 0 for file in files)


def test_schedules_are_spread_evenly_and_overlap_as_sets():
    np.testing.assert_array_equal(np.flatnonzero(spread_schedule(9, 5)), [0, 2, 4, 6, 8])
    process = processes.rectified_flow()
    runs = bench(denoisers.analytic(process), solvers.flow_euler(), timesteps.linspace(6), (2,)).record(
        jax.random.key(0), denoisers.gaussian_mixture(jnp.ones((1, 2)), 0.3), None, 4
    )
    one = calibrate(runs, timesteps.linspace(6), process, 0.0)
    sets = [one._replace(computed=jnp.array(kept, bool)) for kept in ([1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1])]
    assert jaccard(*sets) == 0.5 and jaccard(one, one) == 1.0 and jaccard(sets[0], one) == 0.0


def test_the_released_settings_are_of_the_published_size():
    config = load("configs/recipes/ertacache.py:paper")
    network, grid = build(config.model), build(config.sampling.grid)
    x = jax.ShapeDtypeStruct((1, 2, 4, 4, 16), jnp.float32)
    cond = {"context": jax.ShapeDtypeStruct((1, 5, 4096), jnp.float32)}
    params = jax.eval_shape(network.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32), cond)
    assert 1.1e9 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 2.1e9
    assert grid.shape == (51,) and float(grid[25]) == pytest.approx(8 / 9)
