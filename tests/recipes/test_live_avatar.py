"""The published configuration can be built; what a stream shows comes from its voice."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import build, load
from diffusion_jax.recipes.parts.avatar import avatar_of, streaming

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


def test_a_stream_hears_the_past_and_is_as_long_as_its_voice():
    config = load(f"{CONFIG}:smoke")
    avatar = avatar_of(config)
    picture = jax.random.normal(jax.random.key(1), (1, 1, 1, config.components))
    audio = jax.random.normal(jax.random.key(2), (1, 8, 16))
    x = jnp.zeros((1, 2, 1, 1, config.components))
    begin = {"audio": audio[:, :2], "reference": picture}
    params = jax.jit(avatar.network.init)(jax.random.key(0), x, jnp.zeros(1), begin)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(3), leaf.shape), params)
    stream = streaming(avatar)
    there = stream(params, jax.random.key(4), picture, audio)
    assert there.shape == (1, 8, *x.shape[2:])
    other = stream(params, jax.random.key(4), picture, audio.at[:, 4:].add(1.0))
    np.testing.assert_array_equal(other[:, :4], there[:, :4])
    assert float(jnp.abs(other[:, 4:] - there[:, 4:]).max()) > 1e-3
