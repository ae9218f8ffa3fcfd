"""Fields of somebody else's configs: every value of every type is right, or one sentence says what is wrong."""

import json
import math

import pytest

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.families import family_of, network_fields, sample_size
from diffusion_jax.interop.fields import Fields
from tests.interop.folders import UNET, VAE
from tests.interop.test_image_transformers import CASES as TRANSFORMERS
from tests.models.test_encoders import ENCODERS

CONTROL = {**UNET, "control_features": (4, 8)}
NETWORKS = {
    "AutoencoderKL": lambda: models.kl_vae("kl_f8", **VAE, latents_mean=(0.1,) * 4, latents_std=(0.5,) * 4),
    "ControlNetModel": lambda: models.controlnet("sd15", **CONTROL),
    "UNet2DConditionModel": lambda: models.unet(
        "sd15",
        **{
            **UNET,
            "multipliers": (1, 2),
            "attention": (0, (2, 1)),
            "up_attention": (0, 1),
            "num_residual": (1, 2),
            "mid_attention": 2,
            "conditions": (models.context("none", 12), models.pooled(2, 20, 4), models.guidance_scale(8)),
        },
    ),
    "DiTTransformer2DModel": lambda: TRANSFORMERS["DiTTransformer2DModel"],
    "PixArtTransformer2DModel": lambda: TRANSFORMERS["PixArtTransformer2DModel"],
    "CLIPTextModelWithProjection": lambda: ENCODERS["clip text"],
    "CLIPVisionModelWithProjection": lambda: ENCODERS["clip vision"],
    "Dinov2Model": lambda: models.dinov2("base", width=24, depth=1, heads=3, mlp_width=48, image_size=8, patch=4),
    "T5EncoderModel": lambda: ENCODERS["t5"],
    "UMT5EncoderModel": lambda: ENCODERS["umt5"],
}

ODD = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8.0, 0.5, -0.5, math.nan, math.inf, 1e13, 10**13, 10**300,
    "", "8", "x" * 10**4,
    [], [1], [8, 8], [8, "8"], [[1], [2]], [None], [1.5, 2], [-1, 1], list(range(1, 40)), {}, {"a": 1}, [{}],
)  # fmt: skip


def configs(family):
    """Its config with each field replaced by each odd value, and with each left out."""
    config = interop.FAMILIES[family].config(NETWORKS[family]().module)
    for name in config:
        yield name, {key: value for key, value in config.items() if key != name}
        for odd in ODD:
            yield name, {**config, name: odd}


@pytest.mark.parametrize("family", NETWORKS)
def test_every_value_of_every_field_is_read_or_refused_in_one_sentence(family):
    read = refused = 0
    for name, config in configs(family):
        if name in ("_class_name", "architectures"):
            continue
        try:
            interop.FAMILIES[family].make(**network_fields(family, config))
            read += 1
        except InvalidInput as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600, name
    assert read > 10 and refused > read


@pytest.mark.parametrize("odd", ODD)
def test_the_class_of_any_type(odd):
    for name in ("_class_name", "architectures"):
        with pytest.raises(InvalidInput):
            family_of({name: odd})


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), (8, (8, 8)), ([8, 16], (8, 16)), (..., None), ("8", 0), (8.0, 0), ([8], 0)]
)
def test_the_size_that_a_network_was_trained_on(value, expected):
    config = {} if value is ... else {"sample_size": value}
    if expected == 0:
        with pytest.raises(InvalidInput, match="says sample_size="):
            sample_size("UNet2DConditionModel", config)
    else:
        assert sample_size("UNet2DConditionModel", config) == expected


def test_null_counts_where_it_is_the_peers_default_and_nowhere_else():
    fields = Fields({"a": None, "b": 3, "c": True}, "folder/config.json")
    assert fields.whole("a", None) is None and fields.whole("b", None) == 3 and fields.whole("absent", 5) == 5
    with pytest.raises(InvalidInput, match=r"^folder/config.json says a=null, but a whole number from 1 to 1048576 is"):
        fields.whole("a", 5)
    with pytest.raises(InvalidInput, match="says c=True"):
        fields.whole("c", 1)


def test_there_are_not_more_layers_than_tensors():
    fields = Fields({"num_layers": 50}, most_layers=40)
    with pytest.raises(InvalidInput, match="there can be at most 40 layers"):
        fields.layers("num_layers", 2)


def test_a_misspelt_field_is_told():
    with pytest.warns(UserWarning, match=r"attention_haed_dim=4, which is no field .*was attention_head_dim meant"):
        network_fields("UNet2DConditionModel", {"attention_haed_dim": 4})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"feed_forward_proj": "gated-gelu"}, ("gelu_tanh", True)),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, ("gelu", True)),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": False}, ("gelu_tanh", False)),
        ({"feed_forward_proj": "gated-silu"}, ("silu", True)),
        ({"dense_act_fn": "gelu_new"}, ("gelu_tanh", False)),
        ({}, ("relu", False)),
    ],
)
def test_the_activation_of_t5_is_what_the_peer_computes_with(said, expected):
    fields = network_fields("T5EncoderModel", said)
    assert (fields["activation"], fields["gated"]) == expected


def test_t5_has_sizes_by_other_names():
    fields = network_fields("T5EncoderModel", {"num_hidden_layers": 3, "hidden_size": 24, "num_heads": 2})
    assert (fields["depth"], fields["width"], fields["heads"]) == (3, 24, 2)
    with pytest.raises(InvalidInput, match="num_hidden_layers=3 says the same of this class"):
        network_fields("T5EncoderModel", {"num_hidden_layers": 3, "num_layers": 2})


@pytest.mark.parametrize("name", ["quantization_config", "per_layer_config", "pruned_heads"])
def test_what_would_change_any_network_is_refused(name):
    with pytest.raises(InvalidInput, match=f"says {name}="):
        network_fields("CLIPTextModel", {name: {"0": [1]}})


def test_a_config_names_its_file(tmp_path):
    config = {**interop.FAMILIES["AutoencoderKL"].config(NETWORKS["AutoencoderKL"]().module), "block_out_channels": "8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidInput, match=r"config.json says block_out_channels='8', but a list of 1 to 12 entries"):
        interop.load_pretrained(tmp_path)


def test_lists_have_as_many_entries_as_there_are_channels():
    with pytest.raises(InvalidInput, match=r"latents_std=\[1\], but a list of 4 entries is needed"):
        network_fields("AutoencoderKL", {"latents_mean": [0, 0, 0, 0], "latents_std": [1]})
