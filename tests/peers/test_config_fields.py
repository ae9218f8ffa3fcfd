"""Each field of each config class of the peers is read, or known to change nothing; single files are the peer's too."""

import inspect

import numpy as np
import pytest

from diffusion_jax.interop.families import FAMILIES, network_fields
from diffusion_jax.interop.fields import Fields
from tests.interop.originals import autoencoder_tensors, openclip_tensors, tensors, unet_tensors
from tests.interop.test_single_file import NETWORKS, folder_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

NEEDED = {"Transformer2DModel": [{"norm_type": "ada_norm_zero"}, {"norm_type": "ada_norm_single"}]}
"""Fields that decide which others are read."""


def their_fields(name):
    """What the peer's class takes from its config.json."""
    if FAMILIES[name].library == "diffusers":
        return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    config = getattr(transformers, name).config_class()
    return {field for field in config.to_dict() if not field.startswith("_")}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dit_original"])
def test_each_field_of_the_peer_is_read_or_changes_nothing(name):
    entry, read = FAMILIES[name], set()
    for config in NEEDED.get(name, [{}]):
        fields = Fields(config)
        entry.fields(fields, None)
        read |= fields.known
    assert their_fields(name) - read - set(entry.irrelevant) - {"quantization_config", "per_layer_config"} == set()
    assert not read & set(entry.irrelevant) - {
        "num_embeds_ada_norm",
        "interpolation_scale",
        "use_additional_conditions",
    }


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].library == "transformers"])
def test_the_peers_own_defaults_are_read(name):
    config = getattr(transformers, name).config_class().to_dict()
    assert network_fields(name, config) == network_fields(name, {})


@pytest.mark.parametrize("name", ["AutoencoderKL", "UNet2DConditionModel", "ControlNetModel", "DiTTransformer2DModel"])
def test_diffusers_own_defaults_are_read(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.name != "self"}
    if name == "AutoencoderKL":
        defaults["norm_num_groups"] = 32
    assert network_fields(name, defaults) == network_fields(name, {})


@pytest.mark.parametrize("kind", NETWORKS)
def test_single_files_are_converted_alike_by_the_peer(kind, tmp_path):
    """The files of the tests of single files are in the layout that diffusers converts from."""
    from diffusers.loaders import single_file_utils as peer

    folder = folder_of(kind, tmp_path)

    def torched(part, prefix):
        return {f"{prefix}{name}": torch.tensor(value) for name, value in part.items()}

    def check(found, expected):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)

    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    original = torched(unet_tensors(folder / "unet"), "model.diffusion_model.")
    check(peer.convert_ldm_unet_checkpoint(dict(original), config), tensors(folder / "unet"))
    config = diffusers.AutoencoderKL.load_config(folder / "vae")
    original = torched(autoencoder_tensors(folder / "vae"), "first_stage_model.")
    check(peer.convert_ldm_vae_checkpoint(dict(original), config), tensors(folder / "vae"))
    if kind == "sd1":
        return
    part = folder / ("text_encoder" if kind == "sd2" else "text_encoder_2")
    model = type("Model", (), {"config": type("Config", (), {"hidden_size": 64})()})()
    original = torched(openclip_tensors(part), "cond_stage_model.model.")
    expected = tensors(part)
    if "text_projection.weight" in expected:
        # Which the peer takes for the width of the encoder.
        original.pop("cond_stage_model.model.text_projection")
        expected.pop("text_projection.weight")
    check(peer.convert_open_clip_checkpoint(model, original), expected)
