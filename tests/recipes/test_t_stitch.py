"""The ring, tables of models and their costs, and the published settings."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, sampling, solvers
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import by_share, time_table
from diffusion_jax.recipes import t_stitch
from diffusion_jax.recipes.study import Study
from diffusion_jax.timesteps import linspace


def test_tables_are_those_of_shares_and_the_wrong_way_round_has_the_small_model_last():
    for shares in ((0.3, 0.4), (0.25, 0.0), (0.0, 1.0)):
        table = jax.jit(lambda shares=shares: time_table(by_share(*shares), linspace(10)))()
        np.testing.assert_array_equal(t_stitch.shared(10, *shares), table)
    config = load("configs/recipes/t_stitch.py").ring
    world = t_stitch.World((), config.costs, lambda seed: (), (2,), lambda drawn: {})
    which, cost = t_stitch.tables(world, config)
    assert which["last 0.1"].tolist() == [2] * 90 + [0] * 10 and len(which["fewer 0.4"]) == 64
    np.testing.assert_allclose([cost[name] for name in ("first 0.4", "last 0.1", "three")], [64, 91, 23])


def test_what_is_claimed_of_the_ring_is_measured(tmp_path):
    config = load("configs/recipes/t_stitch.py")
    config.ring.update({"steps": 20, "count": 200})
    s = Study(config, (0,), tmp_path, True, {})
    world = t_stitch.ring(s)
    which, cost = t_stitch.tables(world, config.ring)
    found = t_stitch.compared(s, world, config.ring, which)
    rows = {row.title: row for row in t_stitch.world_rows("ring", found, cost, config.ring)}
    assert all(np.isfinite([*row.ours, *row.against]).all() for row in rows.values())
    last = rows["ring: the last 40 % are worse"]
    assert last.ours[0] > 3 * last.against[0] and last.factor == 10
    assert {name: row["evaluations"][0] for name, row in found.figures.items() if row["evaluations"][0] != 20} == {}
    np.testing.assert_allclose(found["first 0.4"]["compute"], cost["first 0.4"], rtol=1e-5)


def test_the_published_settings_are_three_transformers_of_one_latent_space():
    config = load("configs/recipes/t_stitch.py:paper")
    x, cond = jnp.zeros((2, 32, 32, 4)), {"label": jnp.zeros(2, jnp.int32)}
    sizes, process, grid = [], build(config.process), build(config.grid)
    for name in ("small", "middle", "large"):
        network = build(config.models[name])
        params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(2), cond)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6)
        d = denoisers.guided(denoisers.denoiser(network, process), config.guidance, config.null.to_dict())

        def made(params, d=d):
            return sampling.sample(jax.random.key(0), d, params, solvers.ddim(), grid, shape=x.shape, cond=cond).x

        assert jax.eval_shape(made, params).shape == x.shape
    np.testing.assert_allclose(sizes, [33, 131, 675], rtol=0.02)
    assert grid.shape == (101,)
