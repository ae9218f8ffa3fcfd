"""Sources in a latent space: example for example what the encoder makes of them, conditions and all."""

import numpy as np
import pytest

from diffusion_jax import config, data
from diffusion_jax.config import call
from diffusion_jax.errors import InvalidInput


def test_every_example_is_encoded_once_in_its_place():
    source, sizes = data.digits("test"), []

    def encode(x):
        sizes.append(len(x))
        return x[:, ::2, ::2] + 1

    latents = data.encoded(source, encode, batch=100)
    assert sizes == [100] * 4 and len(latents) == len(source) == 395
    np.testing.assert_array_equal(latents.x0, source.x0[:, ::2, ::2] + 1)
    np.testing.assert_array_equal(latents.cond["label"], source.cond["label"])
    assert latents.num_classes == 10 and latents.class_names == source.class_names
    with pytest.raises(InvalidInput, match="batch is 0"):
        data.encoded(source, encode, batch=0)
    pairs = data.ArraySource(source.x0, {"picture": -source.x0})
    both = data.encoded(pairs, encode, conditions=("picture",))
    np.testing.assert_array_equal(both.cond["picture"], 1 - source.x0[:, ::2, ::2])
    np.testing.assert_array_equal(both.x0, latents.x0)
    with pytest.raises(InvalidInput, match=r"conditions.*depth.*picture"):
        data.encoded(pairs, encode, conditions=("depth",))


def test_joint_data_and_sources_without_batches_are_encoded_too():
    class Pairs:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"x0": {"a": np.full(3, index, np.float32), "b": np.float32([index])}}

    latents = data.encoded(Pairs(), lambda x: {"a": 2 * x["a"], "b": x["b"]}, batch=2)
    np.testing.assert_array_equal(latents.x0["a"][:, 0], 2.0 * np.arange(5))
    np.testing.assert_array_equal(latents.x0["b"][:, 0], np.arange(5))
    assert latents.shape == {"a": (3,), "b": (1,)}


def test_principal_latents_are_an_entry_of_a_config():
    world = call("data.moving_shapes", length=24)
    entry = call("data.principal_latents", source=world, components=8, first=16)
    latents, clips = config.build(entry), config.build(world).take(range(24))
    assert latents.shape == (8, 1, 1, 8) and len(latents) == 24
    np.testing.assert_allclose(latents.x0, latents.space.encode(clips["x0"]), atol=1e-5)
    np.testing.assert_array_equal(latents.cond["label"], clips["cond"]["label"])
    assert config.build(entry) is latents
    entry.components = 4
    assert config.build(entry).shape == (8, 1, 1, 4)
