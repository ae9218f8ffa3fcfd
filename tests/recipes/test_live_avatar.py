"""The published configuration can be built; blocks on several devices are counted."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import build, load
from diffusion_jax.recipes.live_avatar import flown, streams_of
from diffusion_jax.recipes.parts.latents import principal_space
from tests.models.shared import drawn_params

CONFIG = "configs/recipes/live_avatar.py"


def test_the_published_configuration_is_the_papers():
    config = load(f"{CONFIG}:paper")
    network = build(config.student.model)
    x = jnp.zeros((1, 1, 50, 90, 16))
    cond = {"audio": jnp.zeros((1, 1, 1024)), "reference": x[:, 0], "context": jnp.zeros((1, 8, 4096))}
    module = build({**config.student.model.to_dict(), "block": 1, "call": "models.video_dit"}).module
    params = jax.eval_shape(lambda key: module.init(key, x, jnp.zeros(1), cond, False), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 14e9
    assert (network.module.block, network.module.window) == (3, 3)
    np.testing.assert_allclose(build(config.grid), [1.0, 0.9, 0.75, 0.5, 0.0], atol=1e-6)
    assert config.student.optimizer.every.student == config.every == 5
    assert (config.lora.rank, config.lora.alpha) == (128, 64)


def test_blocks_in_flight_are_counted():
    config = load(f"{CONFIG}:smoke")
    network, draw = build(config.student.model), np.random.default_rng(1)
    picture = draw.normal(size=(1, 1, 1, config.components)).astype(np.float32)
    audio = draw.normal(size=(1, 8, 16)).astype(np.float32)
    cond = {"audio": audio[:, :2], "reference": picture}
    params = drawn_params(network, np.zeros((1, 2, *picture.shape[1:]), np.float32), np.zeros(1, np.float32), cond)
    space = principal_space(draw.normal(size=(64, 4, 4, 1)), config.components)
    found = flown(config, params, space, picture, audio)
    levels, blocks = len(streams_of(config).grid) - 1, 4
    assert found.pop("difference") <= 1e-5
    assert found == {"ticks": blocks + 2 * levels, "evaluations": 1, "blocks": blocks, "levels": levels}
