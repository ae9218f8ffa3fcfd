"""What is claimed of the ring is measured, and the published settings."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, sampling, solvers
from diffusion_jax.config import build, load
from diffusion_jax.recipes.parts.stitched_ring import on_ring, ring_claims
from diffusion_jax.recipes.parts.stitching import backwards

KEY = jax.random.key(0)


def test_the_wrong_way_round_has_the_small_model_last():
    assert backwards(10, 0.3, large=2).tolist() == [2] * 7 + [0] * 3


def test_what_is_claimed_of_the_ring_is_measured():
    config = load("configs/recipes/t_stitch.py").ring
    config.update({"steps": 20, "size": 200})
    claims = {one.name: one for one in ring_claims(on_ring(config, [0]), config.noise)}
    assert all(np.isfinite([one.baseline, one.ours]).all() for one in claims.values())
    assert claims["Ring: both models agree from t = 400 on"].holds
    assert claims["Ring: they disagree at t = 200"].holds
    last = claims["Ring: the last 40 % by the small model are ten times worse"]
    assert last.ours > 3 * last.baseline


def test_the_published_settings_are_three_transformers_of_one_latent_space():
    config = load("configs/recipes/t_stitch.py:paper")
    x, cond = jnp.zeros((2, 32, 32, 4)), {"label": jnp.zeros(2, jnp.int32)}
    sizes, process = [], build(config.process)
    for name in ("small", "middle", "large"):
        network = build(config.models[name])
        params = jax.eval_shape(network.init, KEY, x, jnp.zeros(2), cond)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6)
        d = denoisers.guided(denoisers.denoiser(network, process), config.guidance, config.null.to_dict())
        grid = build(config.grid)

        def made(params, d=d, grid=grid):
            return sampling.sample(KEY, d, params, solvers.ddim(), grid, shape=x.shape, cond=cond).x

        assert jax.eval_shape(made, params).shape == x.shape
    np.testing.assert_allclose(sizes, [33, 131, 675], rtol=0.02)
    assert grid.shape == (101,)
