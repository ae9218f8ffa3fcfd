"""LoRA files adapt every layer of every family as their arithmetic says, W + B A, however our kernel is laid out."""

import functools
import re
import zlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop, models
from diffusion_jax.adapters import merged
from diffusion_jax.interop.lora_names import sgm_names
from diffusion_jax.interop.lora_targets import modules_of
from diffusion_jax.models import by_path
from tests.interop.folders import UNET, VAE
from tests.interop.test_image_transformers import CASES
from tests.models.test_encoders import ENCODERS

LEVELS = {
    "multipliers": (1, 2),
    "attention": (1, 0),
    "num_residual": 1,
    "channels": 8,
    "heads": 2,
    "groups": 4,
    "time_features": 8,
}
TEXT = (models.context("none", 6),)
NETWORKS = {
    **CASES,
    "UNet2DConditionModel": models.unet("sd15", **UNET),
    "UNet2DConditionModel, scale_shift": models.unet(
        "sd15", **LEVELS, in_channels=4, conditions=TEXT, modulation="scale_shift"
    ),
    "UNet2DConditionModel, XL": models.unet(
        "sd15", **LEVELS, in_channels=4, conditions=(*TEXT, models.pooled(2, 20, 2)), linear_projection=True
    ),
    "ControlNetModel": models.controlnet("sd15", **LEVELS, control_features=(4, 8), in_channels=4, conditions=TEXT),
    "AutoencoderKL": models.kl_vae("kl_f8", **VAE),
    "CLIPTextModel": ENCODERS["clip text"],
    "CLIPVisionModelWithProjection": ENCODERS["clip vision"],
    "Dinov2WithRegistersModel": ENCODERS["dinov2"],
    "T5EncoderModel": ENCODERS["t5"],
    "UMT5EncoderModel": ENCODERS["umt5"],
}


@functools.cache
def base(name):
    network, family = NETWORKS[name], name.split(",")[0]
    shapes = interop.FAMILIES[family].shapes(network)
    return interop.Pretrained(network, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), family, {})


def layers(pretrained):
    """The weights of the network whose adapters stay factors."""
    modules = modules_of(pretrained)
    assert len({module.name for module in modules.values()}) == len(modules)
    return [module for module in modules.values() if module.weight and module.weight.low_rank]


def drawn(target, *shapes):
    """Arrays of a tensor of theirs; tensors that are copies of one of ours get equal ones."""
    rng = np.random.default_rng(zlib.crc32(f"{target.slots[0].path} {target.layer}".encode()))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def weights_after(folder, pretrained, factors):
    """Their tensors once the factors are merged: the base is 0."""
    params = merged(pretrained.params, factors)
    interop.save_pretrained(folder, pretrained._replace(params=params))
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_adapted_as_the_file_says_and_written_as_it_was_read(name, tmp_path):
    """W + B A of each layer, whatever its layout here; what is written is what was read, tensor by tensor."""
    pretrained = base(name)
    tensors, updates = {}, {}
    for module in layers(pretrained):
        outputs, *inputs = module.weight.shape
        ones = (1,) * (len(inputs) - 1)
        down, up = drawn(module.weight, (2, *inputs), (outputs, 2, *ones))
        tensors |= {f"base_model.model.{module.name}.lora_A.weight": down}
        tensors |= {f"base_model.model.{module.name}.lora_B.weight": up}
        updates[f"{module.name}.weight"] = (up.reshape(outputs, 2) @ down.reshape(2, -1)).reshape(module.weight.shape)
    assert len(updates) > 5
    save_file(tensors, tmp_path / "lora.safetensors")
    factors = interop.load_lora(tmp_path / "lora.safetensors", pretrained)
    weights = weights_after(tmp_path / "after", pretrained, factors)
    for there, update in updates.items():
        np.testing.assert_allclose(weights[there], update, atol=1e-5, err_msg=there)
    again = load_file(interop.save_lora(tmp_path / "again", pretrained, factors, dialect="peft"))
    assert again.keys() == tensors.keys()
    for there, tensor in tensors.items():
        np.testing.assert_array_equal(again[there], tensor, err_msg=there)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_takes_a_difference_and_gives_it_back(name, tmp_path):
    """Weights, biases, norms and embeddings: of a base of zeros their tensors are the differences themselves."""
    pretrained = base(name)
    tensors, updates = {}, {}
    for module in modules_of(pretrained).values():
        norm = module.weight is not None and len(module.weight.shape) == 1
        roles = ("w_norm", "b_norm") if norm else ("diff", "diff_b")
        for target, role in zip((module.weight, module.bias), roles, strict=True):
            if target is not None:
                (change,) = drawn(target, target.shape)
                tensors[f"lora_unet_{module.name.replace('.', '_')}.{role}"] = updates[target.name] = change
    save_file(tensors, tmp_path / "lora.safetensors")
    factors = interop.load_lora(tmp_path / "lora.safetensors", pretrained)
    weights = weights_after(tmp_path / "after", pretrained, factors)
    for there, update in updates.items():
        np.testing.assert_array_equal(weights[there], update, err_msg=there)
    again = load_file(interop.save_lora(tmp_path / "again.safetensors", pretrained, factors, dialect="kohya"))
    assert again.keys() == tensors.keys()
    for there, tensor in tensors.items():
        np.testing.assert_array_equal(again[there], tensor, err_msg=there)


@pytest.mark.parametrize("name", ["UNet2DConditionModel, XL", "UNet2DConditionModel, scale_shift"])
def test_every_module_of_a_unet_has_a_name_in_the_original_code(name, tmp_path):
    """Under these names, with the text encoder in the same file, all is written and read again."""
    pretrained, text = base(name), base("CLIPTextModel")
    modules = modules_of(pretrained)
    assert sorted(sgm_names(modules).values()) == sorted(modules)
    trees = {}
    for component, network in (("unet", pretrained), ("text_encoder", text)):
        tensors = {}
        for module in layers(network):
            outputs, *inputs = module.weight.shape
            down, up = drawn(module.weight, (2, *inputs), (outputs, 2, *(1,) * (len(inputs) - 1)))
            stem = f"{component}.{module.name}.lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        save_file(tensors, tmp_path / "lora.safetensors")
        trees[component] = interop.load_lora(tmp_path / "lora.safetensors", network, component)
    beside = {"text_encoder": (text, trees["text_encoder"])}
    file = interop.save_lora(
        tmp_path / "all.safetensors", pretrained, trees["unet"], dialect="kohya_sdxl", beside=beside
    )
    stems = {there.partition(".")[0] for there in load_file(file)}
    assert all(
        re.match("lora_te1_text_model_|lora_unet_((in|out)put_blocks|middle_block|time|label|out)", s) for s in stems
    )
    for component, network in (("unet", pretrained), ("text_encoder", text)):
        again = by_path(interop.load_lora(file, network, component))
        for path, leaf in by_path(trees[component]).items():
            np.testing.assert_array_equal(again[path], leaf, err_msg=path)
