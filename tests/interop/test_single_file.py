"""Pipelines in one file, in the layouts of the original code, are those of folders, bit for bit; nothing is guessed."""

import json
import shutil

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from tests.interop.folders import dit_folder, drawn, written
from tests.interop.originals import original_file, unet_tensors
from tests.interop.vocabularies import clip_folder

WIDTH = 64
PROMPTS = ["a red cube", ""]
NETWORKS = {
    "sd1": {"channels": 32, "multipliers": (1, 2), "attention": (1, 0), "heads": 8, "mid_attention": 1},
    "sd2": {
        "channels": 64,
        "multipliers": (1, 2),
        "attention": (0, 1),
        "mid_attention": 1,
        "heads": (1, 2),
        "linear_projection": True,
    },
    # Blocks left out, as distilled networks have it.
    "xl": {
        "channels": 64,
        "multipliers": (1, 2),
        "attention": (0, 2),
        "up_attention": (0, (2, 1)),
        "mid_attention": 0,
        "mid_residual": 1,
        "heads": (1, 2),
        "linear_projection": True,
    },
}
SCHEDULERS = {
    "sd1": {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    "sd2": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1,
            "prediction_type": "v_prediction"},
    "xl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1},
}  # fmt: skip
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def folder_of(kind, root):
    """A folder in the Hugging Face layout, with the sizes that an original file is recognised by."""
    made = clip_folder(root / "tokenizer", **({"pad": "!"} if kind == "sd2" else {}))
    vocabulary = len(json.loads((made / "vocab.json").read_text()))
    sizes = {"vocab_size": vocabulary, "width": WIDTH, "depth": 2, "eos": vocabulary - 1, "mlp_width": 96}
    text = models.clip_text("vit_l", **sizes, heads=1, activation="gelu" if kind == "sd2" else "quick_gelu")
    components = {"text_encoder": drawn("CLIPTextModel", text, 2)}
    conditions = (models.context("none", WIDTH),)
    info = {"_class_name": "StableDiffusionPipeline"}
    if kind == "xl":
        big = models.clip_text("big_g", **sizes, heads=1, projection=32)
        components["text_encoder_2"] = drawn("CLIPTextModelWithProjection", big, 3)
        clip_folder(root / "tokenizer_2", pad="!")
        conditions = (models.context("none", 2 * WIDTH), models.pooled(2, 32 + 6 * 256, 256))
        info = {"_class_name": "StableDiffusionXLPipeline", **{key: ["transformers", "CLIP"] for key in components}}
    unet = models.unet(
        "sd15", **NETWORKS[kind], num_residual=1, time_features=NETWORKS[kind]["channels"], conditions=conditions
    )
    factor = 0.13025 if kind == "xl" else 0.18215
    vae = models.kl_vae("kl_f8", channels=32, multipliers=(1, 2), num_residual=1, scaling_factor=factor)
    components |= {"unet": drawn("UNet2DConditionModel", unet), "vae": drawn("AutoencoderKL", vae, 1)}
    return written(root, info, {**SCHEDULERS[kind], **NOISE}, **components)


@pytest.fixture(scope="module", params=NETWORKS)
def both(request, tmp_path_factory):
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    folder = folder_of(kind, root / "folder")
    clip_folder(root / "tokenizer")
    file = original_file(root / "model.safetensors", folder, kind)
    told = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    return kind, folder, file, interop.load_pipeline(file, **told)


def test_a_single_file_is_its_folder(both):
    kind, folder, _, single = both
    whole = interop.load_pipeline(folder)
    chex.assert_trees_all_equal(single.params, whole.params)
    chex.assert_trees_all_equal(single.autoencoder.params, whole.autoencoder.params)
    assert single.network.network.module == whole.network.network.module
    assert single.autoencoder.network.module == whole.autoencoder.network.module
    assert single.size == {"sd1": (128, 128), "sd2": (192, 192), "xl": (256, 256)}[kind]
    for side in ("main", "null"):
        found, expected = (getattr(pipe.prompter, side)(PROMPTS, (64, 64)) for pipe in (single, whole))
        chex.assert_trees_all_equal(found, expected)
    np.testing.assert_array_equal(single.scheduler.grid(7), whole.scheduler.grid(7))
    assert single.scheduler.process == whole.scheduler.process


def test_what_was_one_file_is_stored_as_a_folder(both, tmp_path):
    network = both[3].network
    again = interop.load_pretrained(interop.save_pretrained(tmp_path, network))
    chex.assert_trees_all_equal(again.params, network.params)
    assert again.network.module == network.network.module


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    folder = folder_of("sd1", root / "folder")
    return folder, original_file(root / "model.safetensors", folder, "sd1")


def changed(file, path, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, path)
    return path


def test_lone_networks_in_the_original_layout(sd1, tmp_path):
    folder, file = sd1
    unet, vae = (interop.load_pretrained(folder / name) for name in ("unet", "vae"))
    save_file(unet_tensors(folder / "unet"), tmp_path / "unet.safetensors")
    alone = interop.load_pretrained(tmp_path / "unet.safetensors")
    chex.assert_trees_all_equal(alone.params, unet.params)
    assert alone.network.module == unet.network.module

    def keep(tensors):
        for name in list(tensors):
            if not name.startswith("first_stage_model."):
                del tensors[name]

    lone = changed(file, tmp_path / "vae.safetensors", keep)
    with pytest.raises(InvalidInput, match="do not tell scaling_factor"):
        interop.load_pretrained(lone)
    read = interop.load_pretrained(lone, scaling_factor=0.18215)
    chex.assert_trees_all_equal(read.params, vae.params)


def test_a_dit_in_one_file_takes_an_autoencoder_from_elsewhere(tmp_path):
    folder = dit_folder(tmp_path / "dit")
    whole = interop.load_pretrained(folder / "transformer")
    network = models.dit("S/2", width=384, depth=1, conditions=(models.label(5),), in_channels=4, base_size=4)
    saved = interop.save_pretrained(tmp_path / "one", drawn("dit_original", network))
    (saved / "config.json").unlink()
    (file,) = saved.glob("*.safetensors")
    with pytest.raises(InvalidInput, match="holds no vae: give vae="):
        interop.load_pipeline(file)
    pipe = interop.load_pipeline(file, vae=folder / "vae")
    assert by_path(pipe.params).keys() == by_path(whole.params).keys()
    assert (pipe.size, pipe.network.network.module.heads) == ((16, 16), 6)
    lone = interop.load_pretrained(file)
    chex.assert_trees_all_equal(lone.params, pipe.params)


def without(prefix):
    def change(tensors):
        for name in list(tensors):
            if name.startswith(prefix):
                del tensors[name]

    return change


MISTAKES = {
    "no text encoder": (without("cond_stage_model."), {}, "it holds no text encoder"),
    "no autoencoder": (without("first_stage_model."), {}, "holds no vae: give vae="),
    "another network": (without("model.diffusion_model."), {}, "holds a single network and no pipeline"),
    "a tensor is missing": (without("model.diffusion_model.out.0."), {}, "2 missing: out.0"),
    "an unknown prediction": (lambda tensors: None, {"prediction_type": "v"}, "Valid: epsilon, v_prediction"),
    "a wrong head": (lambda tensors: None, {"heads": 5}, "heads is 5"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_read_is_told(name, sd1, tmp_path):
    change, options, message = MISTAKES[name]
    folder, file = sd1
    with pytest.raises(InvalidInput, match=message) as error:
        interop.load_pipeline(
            changed(file, tmp_path / "m.safetensors", change), tokenizer=folder / "tokenizer", **options
        )
    assert "\n" not in str(error.value)


def test_the_prediction_of_stable_diffusion_2_is_not_guessed(both):
    kind, _, file, single = both
    predicted = single.scheduler.process.prediction
    assert predicted == {"sd1": "epsilon", "sd2": "v", "xl": "epsilon"}[kind]
    if kind == "sd2":
        with pytest.raises(InvalidInput, match="two kinds that its tensors do not tell apart"):
            interop.load_pipeline(file)


def test_what_has_to_be_given(sd1, tmp_path):
    folder, file = sd1
    with pytest.raises(InvalidInput, match="holds no tokenizer, as no single file does"):
        interop.load_pipeline(file)
    with pytest.raises(InvalidInput, match="is for a pipeline in a single file"):
        interop.load_pipeline(folder, prediction_type="epsilon")
    with pytest.raises(InvalidInput, match="holds a whole pipeline: use load_pipeline"):
        interop.load_pretrained(file)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InvalidInput, match="it is a pickle, which can run code"):
        interop.load_pipeline(pickled)


def test_what_belongs_to_no_part_is_told(sd1, tmp_path):
    folder, file = sd1
    more = changed(file, tmp_path / "m.safetensors", lambda t: t.update({"control_model.out": np.ones(3, np.float32)}))
    with pytest.warns(UserWarning, match=r"control_model.out belong to no part"):
        interop.load_pipeline(more, tokenizer=folder / "tokenizer")


@pytest.mark.parametrize(("there", "name"), [("vae", "unet"), ("unet", "vae"), ("unet", "text_encoder")])
def test_a_network_of_another_kind_in_the_place_of_a_part_is_told(there, name, sd1, tmp_path):
    folder = shutil.copytree(sd1[0], tmp_path / "folder")
    shutil.rmtree(folder / name)
    shutil.copytree(folder / there, folder / name)
    with pytest.raises(InvalidInput, match=r" is needed\.$"):
        interop.load_pipeline(folder)


def test_another_scheduler_and_another_autoencoder(sd1, tmp_path):
    folder, file = sd1
    config = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    lone = changed(file, tmp_path / "vae.safetensors", without("model.diffusion_model."))
    other = interop.load_pipeline(folder, scheduler=tmp_path, vae=lone)
    assert other.scheduler.process == interop.read_scheduler(config).process
    assert other.denoiser.process == other.scheduler.process
    chex.assert_trees_all_equal(other.autoencoder.params, interop.load_pretrained(folder / "vae").params)
