"""LoRA files adapt every layer of every family as their arithmetic says, W + B A, however our kernel is laid out."""

import functools
import zlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop, models
from diffusion_jax.adapters import merged
from diffusion_jax.interop.lora_files import targets_of
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


def drawn(target, rank=2):
    """Two factors of a layer; layers that are copies of one of ours get equal ones."""
    rng = np.random.default_rng(zlib.crc32(f"{target.slots[0].path} {target.layer}".encode()))
    down = rng.standard_normal((rank, *target.shape[1:])).astype(np.float32)
    up = rng.standard_normal((target.shape[0], rank, *(1,) * (len(target.shape) - 2))).astype(np.float32)
    return down, up


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_adapted_as_the_file_says_and_written_as_it_was_read(name, tmp_path):
    pretrained = base(name)
    pairs = {target.module: drawn(target) for target in targets_of(pretrained).values()}
    tensors = {f"base_model.model.{module}.lora_A.weight": down for module, (down, _) in pairs.items()}
    tensors |= {f"base_model.model.{module}.lora_B.weight": up for module, (_, up) in pairs.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    factors = interop.load_lora(tmp_path / "lora.safetensors", pretrained)
    written = interop.save_lora(tmp_path / "again.safetensors", pretrained, factors)
    for read in (factors, interop.load_lora(written, pretrained)):
        after = pretrained._replace(params=merged(pretrained.params, read))
        folder = interop.save_pretrained(tmp_path / "after", after)
        weights = load_file(next(folder.glob("*.safetensors")))
        assert len(pairs) > 5
        for module, (down, up) in pairs.items():
            update = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(-1, *down.shape[1:])
            np.testing.assert_allclose(weights[f"{module}.weight"], update, atol=1e-4, err_msg=module)
