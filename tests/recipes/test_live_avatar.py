"""The published configuration can be built; what a stream shows comes from its voice, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.config import build, load
from diffusion_jax.recipes.parts.avatar import avatar_of, in_flight, self_rollout, streaming
from diffusion_jax.recipes.parts.latents import principal_space

CONFIG = "configs/recipes/live_avatar.py"


@pytest.fixture(scope="module")
def made():
    """The small system, weights of which no part is zero, who is shown, and what is heard."""
    config = load(f"{CONFIG}:smoke")
    avatar = avatar_of(config)
    picture = np.random.default_rng(1).normal(size=(1, 1, 1, config.components)).astype(np.float32)
    audio = np.random.default_rng(2).normal(size=(1, 8, 16)).astype(np.float32)
    x = np.zeros((1, 2, 1, 1, config.components), np.float32)
    params = avatar.network.init(jax.random.key(0), x, np.zeros(1), {"audio": audio[:, :2], "reference": picture})
    noise = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: np.float32(leaf + 0.2 * noise.normal(size=leaf.shape)), params)
    return config, avatar, params, picture, audio


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


def test_a_stream_hears_the_past_and_is_as_long_as_its_voice(made):
    _, avatar, params, picture, audio = made
    stream = streaming(avatar)
    there = np.asarray(stream(params, jax.random.key(4), picture, audio))
    assert there.shape == (1, 8, *picture.shape[1:])
    later = audio + (np.arange(8) >= 4)[:, None].astype(np.float32)
    other = np.asarray(stream(params, jax.random.key(4), picture, later))
    np.testing.assert_array_equal(other[:, :4], there[:, :4])
    assert np.abs(other[:, 4:] - there[:, 4:]).max() > 1e-3


def test_blocks_in_flight_are_those_made_one_after_the_other(made):
    config, avatar, params, picture, audio = made
    space = principal_space(np.random.default_rng(4).normal(size=(64, 4, 4, 1)), config.components)
    found = in_flight(config, params, space, picture, audio)
    levels, blocks = avatar.levels, audio.shape[1] // avatar.block
    assert found["difference"] <= 1e-5
    assert found["ticks"] == blocks - 1 + levels
    assert found["adaptive ticks"] == blocks + 2 * levels
    assert (found["evaluations"], found["every"], found["first"]) == (1.0, 1.0, levels + 1)


def test_a_students_own_clips_are_as_long_as_the_data_and_have_a_gradient(made):
    _, avatar, params, picture, audio = made
    x0 = np.zeros((1, 8, *picture.shape[1:]), np.float32)
    batch = {"x0": x0, "cond": {"audio": audio, "reference": picture}, "index": np.arange(1)}

    def size(params, key):
        x = self_rollout(avatar)(params, batch, key)
        return jnp.mean(jnp.square(x)), x

    grads, x = jax.eval_shape(jax.grad(size, has_aux=True), params, jax.random.key(0))
    assert x.shape == batch["x0"].shape
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
