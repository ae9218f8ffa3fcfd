"""Pipelines: batches, meshes and adapters change only what they should, nothing compiles twice, errors are clear."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, denoisers, distributed, interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop import generation
from diffusion_jax.models import by_path
from tests.interop.folders import SIZE, UNET, dit_folder, sd_folder
from tests.interop.folders import drawn as drawn_as
from tests.models.drawn import drawn

KEY = jax.random.key(0)
PROMPTS = ["a red cube", "two cats", "nothing at all", "a photo"]
SHORT = {"num_steps": 2, "size": (SIZE, SIZE)}
GUIDED = {"negative": "ugly", "scale": 3.0, **SHORT}


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return dit_folder(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def pipeline(sd):
    return interop.load_pipeline(sd)


@pytest.fixture(scope="module")
def images(pipeline):
    return np.asarray(interop.generate(pipeline, KEY, PROMPTS, **GUIDED))


def test_a_sample_does_not_depend_on_its_neighbours(pipeline, images):
    others = interop.generate(pipeline, KEY, [PROMPTS[2], "x", "y", "z"], index=np.array([2, 9, 8, 7]), **GUIDED)
    np.testing.assert_allclose(others[0], images[2], atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 0.1


def test_prompts_scale_and_key_are_arguments(pipeline, images):
    program = generation.sampling_program([pipeline])
    before = program._cache_size()
    other = interop.generate(
        pipeline, jax.random.key(5), PROMPTS[::-1], negative=["x", "", "y", "z"], scale=1.5, **SHORT
    )
    assert program._cache_size() == before
    assert np.abs(np.asarray(other) - images).max() > 0.1


def test_a_mesh_changes_nothing(sd, images):
    mesh = distributed.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    pipeline = interop.load_pipeline(sd, mesh=mesh, rules=distributed.Rules(fsdp_min_size=0))
    kernel = pipeline.params["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    spread = interop.generate(pipeline, KEY, PROMPTS, **GUIDED)
    np.testing.assert_allclose(spread, images, atol=2e-4)
    with pytest.raises(InvalidInput, match="must be a multiple of 4"):
        interop.generate(pipeline, KEY, PROMPTS[:3], **SHORT)


def test_parts_may_be_replaced(pipeline, images):
    bounded = pipeline._replace(denoiser=denoisers.clipped(pipeline.denoiser, -0.1, 0.1))
    assert np.abs(np.asarray(interop.generate(bounded, KEY, PROMPTS, **GUIDED)) - images).max() > 1e-3


def test_adapters_are_attached_and_swapped_without_compiling(sd, pipeline, images, tmp_path):
    network = pipeline.network
    made = adapters.lora(network.network, rank=2, select=("q", "v", "out"))
    x, t, cond = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), {"context": jnp.zeros((1, 77, 12))}
    shapes = jax.eval_shape(made.init, KEY, network.params, x, t, cond)
    factors = jax.tree.map(lambda leaf: 1.0 + np.asarray(leaf), drawn(shapes))
    file = interop.save_lora(tmp_path / "style.safetensors", network, factors, dialect="kohya")
    adapted = interop.load_pipeline(sd, loras=[(file, 0.7)])
    found = np.asarray(interop.generate(adapted, KEY, PROMPTS, **GUIDED))
    merged = adapters.merged(network.params, factors, 0.7)
    expected = interop.generate(pipeline._replace(params=merged), KEY, PROMPTS, **GUIDED)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - images).max() > 1e-2

    program = generation.sampling_program([adapted])
    before = program._cache_size()
    none = adapters.combined_adapters([], rank=2, like=adapted.params["lora"])
    swapped = adapted._replace(params={**adapted.params, "lora": none})
    np.testing.assert_allclose(interop.generate(swapped, KEY, PROMPTS, **GUIDED), images, atol=1e-4)
    assert program._cache_size() == before


def test_what_is_kept_of_an_image_comes_back(pipeline, images):
    image = np.random.default_rng(0).uniform(-1.0, 1.0, (SIZE, SIZE, 3)).astype(np.float32)
    encode, decode = generation._programs(pipeline.autoencoder.network)
    params = pipeline.autoencoder.params
    kept, redone = (
        interop.generate(pipeline, KEY, PROMPTS, image=image, mask=np.full((SIZE, SIZE), anew), **GUIDED)
        for anew in (False, True)
    )
    np.testing.assert_allclose(kept, decode(params, encode(params, np.stack([image] * 4))), atol=1e-5)
    np.testing.assert_allclose(redone, images, atol=1e-4)


def test_labels_and_names(dit):
    pipeline = interop.load_pipeline(dit)
    assert pipeline.size == (SIZE, SIZE)
    images = np.asarray(interop.generate(pipeline, KEY, [0, "ant", "emmet", "1"], num_steps=2))
    same = np.asarray(interop.generate(pipeline, KEY, [0, 0, 0, 1], num_steps=2))
    np.testing.assert_array_equal(images, same)
    unguided = np.asarray(interop.generate(pipeline, KEY, [0, 0, 0, 1], num_steps=2, scale=1.0))
    assert np.abs(unguided - images).max() > 1e-3
    with pytest.raises(InvalidInput, match=r"'antt'.*did you mean 'ant'"):
        interop.generate(pipeline, KEY, ["antt"])
    with pytest.raises(InvalidInput, match="label is 7"):
        interop.generate(pipeline, KEY, [7])
    with pytest.raises(InvalidInput, match="no negative prompts"):
        interop.generate(pipeline, KEY, [0], negative="bee")


def test_saved_parts_make_the_same_images(sd, pipeline, images, tmp_path):
    folder = sd_folder(tmp_path / "again")
    interop.save_pretrained(folder / "unet", pipeline.network)
    interop.write_scheduler_config(folder / "scheduler", pipeline.scheduler)
    again = interop.load_pipeline(folder)
    for path, leaf in by_path(again.params).items():
        np.testing.assert_array_equal(leaf, by_path(pipeline.params)[path])
    found = interop.generate(again, KEY, PROMPTS, **GUIDED)
    np.testing.assert_allclose(found, images, atol=1e-5)


def test_networks_of_several_levels_are_saved_and_loaded(tmp_path):
    fields = {**UNET, "multipliers": (1, 2), "attention": (1, 0)}
    saved = drawn_as("UNet2DConditionModel", models.unet("sd15", **fields))
    interop.save_pretrained(tmp_path, saved)
    loaded = interop.load_pretrained(tmp_path)
    assert loaded.network.module == saved.network.module
    for path, leaf in by_path(loaded.params).items():
        np.testing.assert_array_equal(leaf, by_path(saved.params)[path])


MISTAKES = {
    "no prompts": ({"prompts": []}, "at least one is needed"),
    "negatives": ({"negative": ["a", "b"]}, "one for all or one for each of the 1 prompts"),
    "strength": ({"strength": 1.5, "image": -np.ones((SIZE, SIZE, 3))}, r"strength is 1.5, but it must be in \(0, 1\]"),
    "strength alone": ({"strength": 0.5}, "image= was not given"),
    "mask alone": ({"mask": np.ones((SIZE, SIZE), bool)}, "image= was not given"),
    "mask's shape": ({"image": -np.ones((SIZE, SIZE, 3)), "mask": np.ones((4, 4), bool)}, r"mask.shape is \(4, 4\)"),
    "odd size": ({"size": (15, 16)}, "multiples of 2"),
    "size": ({"image": -np.ones((8, 8, 3)), "size": (16, 16)}, "the image is 8 x 8"),
    "noise": ({"noise": np.zeros((1, 2, 2, 4)), "size": (16, 16)}, "noise.shape"),
    "not a text": ({"prompts": [3]}, "a text is needed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, pipeline):
    options, message = MISTAKES[name]
    with pytest.raises(InvalidInput, match=message):
        interop.generate(pipeline, KEY, **{"prompts": ["a"], **options})


def test_an_inpainting_network_asks_for_a_mask(tmp_path):
    pipeline = interop.load_pipeline(sd_folder(tmp_path, conditions=(models.context("none", 12), models.concat(5))))
    with pytest.raises(InvalidInput, match="give image= and mask="):
        interop.generate(pipeline, KEY, ["a"], **SHORT)
    with pytest.raises(InvalidInput, match="give mask= with image="):
        interop.generate(pipeline, KEY, ["a"], image=-np.ones((SIZE, SIZE, 3)), num_steps=2)


def test_a_folder_that_is_no_pipeline(sd, tmp_path):
    with pytest.raises(InvalidInput, match=r"no model_index\.json; for a single network use load_pretrained"):
        interop.load_pipeline(sd / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipelin"}))
    with pytest.raises(InvalidInput, match="did you mean 'StableDiffusionPipeline'"):
        interop.load_pipeline(tmp_path)


def test_a_scheduler_that_is_replaced_decides_what_the_network_is_told_and_predicts(pipeline, images):
    config = {**pipeline.scheduler.config, "prediction_type": "v_prediction"}
    other = pipeline._replace(scheduler=interop.read_scheduler(config))
    found = np.asarray(interop.generate(other, KEY, PROMPTS, **GUIDED))
    denoiser = denoisers.denoiser(pipeline.network.network, other.scheduler.process)
    expected = interop.generate(other._replace(denoiser=denoiser), KEY, PROMPTS, **GUIDED)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - images).max() > 0.1
    own = other._replace(denoiser=denoisers.clipped(pipeline.denoiser, -1.0, 1.0))
    with pytest.raises(InvalidInput, match="made for another process"):
        interop.generate(own, KEY, PROMPTS, **GUIDED)
