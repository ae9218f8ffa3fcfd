"""Folders of encoders, without the peer: what is saved is loaded, in parts on a mesh and in bfloat16; preprocessing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import distributed, interop
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from tests.models.test_encoders import ENCODERS, drawn, inputs

FAMILY = {
    "clip text": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip vision": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2WithRegistersModel",
}


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_saved_is_loaded(name, tmp_path):
    encoder = ENCODERS[name]
    params = drawn(encoder, inputs(name))
    interop.save_pretrained(tmp_path, interop.Pretrained(encoder, params, FAMILY[name], {}))
    mesh = distributed.make_mesh(tensor=2, fsdp=4)
    loaded = interop.load_pretrained(tmp_path, mesh=mesh, rules=distributed.Rules(fsdp_min_size=0))
    assert (loaded.family, loaded.network.module) == (FAMILY[name], encoder.module)
    found, expected = by_path(loaded.params), by_path(params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), leaf, err_msg=path)
    kernel = found["blocks/block/mlp/feed_forward/up/kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size

    halves = interop.load_pretrained(tmp_path, dtype="bfloat16", param_dtype=jnp.bfloat16)
    encoded = jax.eval_shape(halves.network.apply, halves.params, inputs(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(encoded)} == {jnp.dtype("float32")}


CONFIG = {
    "size": {"shortest_edge": 12},
    "crop_size": {"height": 8, "width": 10},
    "do_center_crop": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
}


def write(folder, **options):
    (folder / "preprocessor_config.json").write_text(json.dumps({**CONFIG, **options}))
    return folder


def test_images_are_resized_cropped_and_normalised(tmp_path):
    preprocess = interop.load_preprocessor(write(tmp_path))
    assert preprocess.resized(30, 41) == (12, 16) and preprocess.resized(41, 30) == (16, 12)
    images = jnp.broadcast_to(jnp.asarray([0.2, -0.2, 1.0]), (2, 30, 41, 3))
    out = jax.jit(preprocess)(images)
    assert out.shape == (2, 8, 10, 3)
    np.testing.assert_allclose(out, np.broadcast_to([0.2, 0.0, 3.5], out.shape), atol=1e-5)
    stored = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    np.testing.assert_allclose(preprocess(stored), preprocess(stored / 127.5 - 1), atol=1e-5)
    preprocess(stored | 128)
    for wrong in (stored / 255, stored.astype(np.float32), stored.astype(int), stored * 1j):
        with pytest.raises(InvalidInput, match="images"):
            preprocess(wrong)
    gradient = jax.grad(lambda images: preprocess(images).sum())(0.5 * images)
    assert float(jnp.abs(gradient).max()) > 0 and bool(jnp.isfinite(gradient).all())


def test_older_configs_say_sizes_as_numbers(tmp_path):
    assert interop.load_preprocessor(write(tmp_path, size=9, crop_size=9)).crop == (9, 9)
    fixed = interop.load_preprocessor(write(tmp_path, size={"height": 6, "width": 7}, do_center_crop=False))
    assert fixed(jnp.zeros((1, 3, 4, 3))).shape == (1, 6, 7, 3)
    plain = interop.load_preprocessor(write(tmp_path, do_resize=False, do_center_crop=False, do_normalize=False))
    np.testing.assert_allclose(plain(jnp.full((1, 3, 4, 3), -1.0)), 0.0)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"resample": 0}, None, "resample=0"),
        ({"crop_size": {"shortest_edge": 4}}, None, "a height and a width"),
        ({"do_rescale": False}, None, "do_rescale=False"),
        ({"crop_size": 13}, (1, 20, 20, 3), "smaller than the crop"),
        ({}, (1, 20, 20, 4), "[B, H, W, 3] in [-1, 1]"),
    ],
)
def test_bad_input(options, shape, message, tmp_path):
    with pytest.raises(InvalidInput) as error:
        preprocess = interop.load_preprocessor(write(tmp_path, **options))
        preprocess(jnp.zeros(shape))
    assert message in str(error.value)


def test_a_folder_without_the_file(tmp_path):
    with pytest.raises(InvalidInput, match=r"preprocessor_config.json does not exist"):
        interop.load_preprocessor(tmp_path)
