"""Text and vision encoders equal those of transformers, loaded from its files and saved back into them.

Needs the peers extra: `make test-peers`.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.families import network_fields
from diffusion_jax.interop.tables import slots, their_shapes
from tests.peers.figures import record

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers
torch.set_num_threads(1)

CLIP_TEXT = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 11, "projection_dim": 14, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 20, "d_kv": 6, "d_ff": 36, "num_layers": 3, "num_heads": 5}
CLIP_VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 20,
    "patch_size": 4, "projection_dim": 14,
}  # fmt: skip
DINOV2 = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 20, "patch_size": 4,
    "mlp_ratio": 3, "hidden_act": "gelu",
}  # fmt: skip

CASES = {
    "clip text": ("CLIPTextModel", {**CLIP_TEXT, "eos_token_id": 2}, None),
    "clip text, masked, gelu": ("CLIPTextModel", {**CLIP_TEXT, "eos_token_id": 60, "hidden_act": "gelu"}, "mask"),
    "clip text, projected": (
        "CLIPTextModelWithProjection", {**CLIP_TEXT, "eos_token_id": 60, "num_attention_heads": 1}, None,
    ),
    "t5": ("T5EncoderModel", T5, "mask"),
    "t5 1.1": (
        "T5EncoderModel",
        {**T5, "num_layers": 2, "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 9}, None,
    ),
    "umt5": ("UMT5EncoderModel", {**T5, "d_kv": 4}, "mask"),
    "clip vision": ("CLIPVisionModel", CLIP_VISION, (20, 20)),
    "clip vision, projected, other size": (
        "CLIPVisionModelWithProjection", {**CLIP_VISION, "hidden_act": "gelu", "num_attention_heads": 2}, (28, 12),
    ),
    "dinov2": ("Dinov2Model", DINOV2, (20, 20)),
    "dinov2, swiglu, other size": (
        "Dinov2Model", {**DINOV2, "use_swiglu_ffn": True, "qkv_bias": False, "mlp_ratio": 4}, (28, 12),
    ),
    "dinov2, hidden patches": ("Dinov2Model", DINOV2, "patches"),
    "dinov2, registers, other size": ("Dinov2WithRegistersModel", {**DINOV2, "num_register_tokens": 3}, (28, 12)),
}  # fmt: skip


def peer(name, options):
    """Their model, with every parameter drawn, those too that start as zeros and ones."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**options)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            embedding = any(word in key for word in ("embed", "token", "shared"))
            scale = 1.0 if embedding else 0.3 if value.ndim == 1 else value.shape[1:].numel() ** -0.5
            centre = 1.0 if value.ndim == 1 and ("norm" in key or "lambda" in key) and "bias" not in key else 0.0
            # T5 has no 1 / sqrt(D): its queries start that much smaller.
            scale *= options["d_kv"] ** -0.5 if "Attention.q" in key else 1.0
            value.copy_(centre + scale * torch.randn_like(value))
    return model


def inputs(kind):
    """The input of a case, and its mask or None."""
    rng = np.random.default_rng(1)
    if isinstance(kind, tuple):
        return rng.normal(size=(2, *kind, 3)).astype(np.float32), None
    if kind == "patches":
        return rng.normal(size=(2, 20, 20, 3)).astype(np.float32), rng.random((2, 25)) < 0.6
    tokens = rng.integers(3, 60, size=(3, 9))
    tokens[0, 4:], tokens[1, 7:], tokens[2, 8:] = 60, 60, 60
    mask = np.ones((3, 9), bool)
    mask[0, 5:], mask[1, 8:] = False, False
    return tokens, mask if kind == "mask" else None


def theirs(model, kind, given, mask, leaf=None):
    """hidden, pooled or None, hidden states; leaf: images that ask for a gradient."""
    if given.ndim == 2:
        options = {"input_ids": torch.tensor(given)}
        if mask is not None:
            options["attention_mask"] = torch.tensor(mask).long()
    else:
        images = torch.tensor(given) if leaf is None else leaf
        options = {"pixel_values": images.permute(0, 3, 1, 2)}
        if mask is not None:
            options["bool_masked_pos"] = torch.tensor(~mask)
        if "CLIP" in type(model).__name__ and given.shape[1:3] != (20, 20):
            options["interpolate_pos_encoding"] = True
    out = model(**options, output_hidden_states=True)
    pooled = next((out[name] for name in ("text_embeds", "image_embeds", "pooler_output") if name in out), None)
    return out.last_hidden_state, pooled, out.hidden_states


def images_or_table(params, given):
    """What gradients are taken with respect to: images, or the table of token embeddings."""
    return given if given.ndim == 4 else params["embed"]["embedding"]


def with_input(encoder, params, given, mask, value):
    if given.ndim == 4:
        return encoder.apply(params, value, mask)
    return encoder.apply({**params, "embed": {"embedding": value}}, given, mask)


def assert_same(encoded, expected, atol=1e-4):
    hidden, pooled, states = expected
    np.testing.assert_allclose(encoded.hidden, hidden.detach(), atol=atol)
    assert (encoded.pooled is None) == (pooled is None)
    if pooled is not None:
        np.testing.assert_allclose(encoded.pooled, pooled.detach(), atol=atol)
    # The last entry of T5's is normed.
    for ours, state in list(zip(encoded.hidden_states, states, strict=True))[:-1]:
        np.testing.assert_allclose(ours, state.detach(), atol=atol)


def relative(ours, expected):
    return np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES)
def test_loaded_and_saved(case, tmp_path):
    name, options, kind = CASES[case]
    model = peer(name, options)
    model.save_pretrained(tmp_path / "theirs")
    loaded = interop.load_pretrained(tmp_path / "theirs")
    given, mask = inputs(kind)
    value = images_or_table(loaded.params, given)

    def projected(value, weight):
        encoded = with_input(loaded.network, loaded.params, given, mask, value)
        return jnp.sum(encoded.hidden * weight), encoded

    expected = theirs(model, kind, given, mask)
    weight = np.random.default_rng(2).normal(size=expected[0].shape).astype(np.float32)
    weight /= np.linalg.norm(weight)
    (_, encoded), gradient = jax.jit(jax.value_and_grad(projected, has_aux=True))(jnp.asarray(value), weight)
    record("network", loaded.family, float(np.abs(encoded.hidden - expected[0].detach().numpy()).max()))
    assert_same(encoded, expected)

    leaf = torch.tensor(given, requires_grad=True) if given.ndim == 4 else model.get_input_embeddings().weight
    (theirs(model, kind, given, mask, leaf)[0] * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-4)

    half = interop.load_pretrained(tmp_path / "theirs", dtype="bfloat16")
    low = jax.jit(half.network.apply)(half.params, given, mask)
    assert relative(low.hidden, expected[0].detach().numpy()) < 1e-2
    if low.pooled is not None:
        assert relative(low.pooled, expected[1].detach().numpy()) < 1e-2

    interop.save_pretrained(tmp_path / "ours", loaded)
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(encoded, theirs(again.eval(), kind, given, mask))


SIZES = {
    "clip vit-l text": ("CLIPTextModel", "clip_text", "vit_l", {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu", "eos_token_id": 2,
    }),
    "openclip-h text": ("CLIPTextModel", "clip_text", "vit_h", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
        "projection_dim": 512, "hidden_act": "gelu", "eos_token_id": 2,
    }),
    "openclip-bigg text": ("CLIPTextModelWithProjection", "clip_text", "big_g", {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "hidden_act": "gelu", "eos_token_id": 49407,
    }),
    "t5 1.1 xxl": ("T5EncoderModel", "t5_encoder", "xxl", {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }),
    "umt5 xxl": ("UMT5EncoderModel", "t5_encoder", "umt5_xxl", {
        "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    }),
    "clip vit-l vision": ("CLIPVisionModel", "clip_vision", "vit_l", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
    }),
    "openclip-h vision": ("CLIPVisionModelWithProjection", "clip_vision", "vit_h", {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
    }),
    "openclip-bigg vision": ("CLIPVisionModelWithProjection", "clip_vision", "big_g", {
        "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 1280, "hidden_act": "gelu",
    }),
    "dinov2 base": ("Dinov2Model", "dinov2", "base", {"image_size": 518}),
    "dinov2 giant": ("Dinov2Model", "dinov2", "giant", {
        "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "image_size": 518,
        "use_swiglu_ffn": True,
    }),
}  # fmt: skip
"""The published configurations: their class, our constructor and preset, their options."""


@pytest.mark.parametrize("case", SIZES)
def test_true_sizes(case):
    name, constructor, preset, options = SIZES[case]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, name).config_class(**options))
    # Their files keep older names than their modules have.
    stored = transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())
    stored.pop("encoder.embed_tokens.weight", None)
    half = "text_model." if "Text" in name else "vision_model."
    prefix = half if name in ("CLIPTextModel", "CLIPVisionModel") else ""
    expected = {prefix + key: tuple(value.shape) for key, value in stored.items()}

    family = interop.FAMILIES[name]
    network = family.make(**network_fields(name, {**model.config.to_dict(), "architectures": [name]}))
    shapes = {path: leaf.shape for path, leaf in models.by_path(family.shapes(network)).items()}
    places = slots(family.table(network.module), shapes)
    assert their_shapes(places) == expected
    eos = {"eos": options["eos_token_id"]} if "eos_token_id" in options else {}
    assert network.module == getattr(models, constructor)(preset, **eos).module


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}, (33, 57)),
        ("BitImageProcessor", {"size": {"shortest_edge": 25}, "crop_size": 20, "resample": 3}, (19, 14)),
        ("CLIPImageProcessor", {"size": {"height": 9, "width": 12}, "do_center_crop": False}, (30, 17)),
    ],
)
def test_preprocessing(name, options, size, tmp_path):
    """The peer rounds to 8 bits between its steps: steps of 1 / 255, over the standard deviation."""
    peer = getattr(transformers, name)(**options)
    peer.save_pretrained(tmp_path)
    # Waves, not noise: what overshoots is cut off between rows and columns, which Pillow takes in either order.
    phase = np.random.default_rng(0).uniform(0, 6, size=(2, 1, 1, 3))
    waves = np.sin(phase + np.arange(size[0])[:, None, None] / 2 + np.arange(size[1])[:, None] / 3)
    pixels = np.round(128 + 100 * waves).astype(np.uint8)
    expected = peer(list(pixels), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    found = interop.load_preprocessor(tmp_path)(pixels / np.float32(127.5) - 1)
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1.01 / 255 / 0.26)


def test_one_half_of_a_file_that_holds_both(tmp_path):
    text, vision = ({**options, "eos_token_id": 2} for options in (CLIP_TEXT, CLIP_VISION))
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=14)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tokens, images = inputs(None)[0], inputs((20, 20))[0]
    halves = {
        "CLIPTextModelWithProjection": (tokens, model.get_text_features(torch.tensor(tokens))),
        "CLIPVisionModelWithProjection": (images, model.get_image_features(torch.tensor(images).permute(0, 3, 1, 2))),
    }
    for name, (given, features) in halves.items():
        loaded = interop.load_pretrained(tmp_path, family=name)
        expected = getattr(features, "pooler_output", features)
        np.testing.assert_allclose(loaded.network.apply(loaded.params, given).pooled, expected.detach(), atol=1e-4)
        whole = interop.load_pretrained(tmp_path, family=name.removesuffix("WithProjection"))
        assert "projection" not in whole.params


def test_the_encoder_of_a_file_with_a_decoder(tmp_path):
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    model.save_pretrained(tmp_path)
    loaded = interop.load_pretrained(tmp_path, family="T5EncoderModel")
    tokens = inputs(None)[0]
    expected = model.encoder(torch.tensor(tokens)).last_hidden_state
    np.testing.assert_allclose(loaded.network.apply(loaded.params, tokens).hidden, expected.detach(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("CLIPTextModel", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("CLIPTextModel", {"eos_token_id": [2, 3]}, "one token is needed"),
        ("CLIPVisionModel", {"patch_size": [4, 8]}, "two equal ones"),
        ("T5EncoderModel", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj='gated-mish'"),
        ("T5EncoderModel", {"is_decoder": True}, "is_decoder=True"),
    ],
)
def test_options_that_are_not_there_are_named(name, option, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        network_fields(name, option)


def test_what_a_family_cannot_say_is_not_stored(tmp_path):
    def store(network, family):
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), interop.FAMILIES[family].shapes(network))
        interop.save_pretrained(tmp_path, interop.Pretrained(network, params, family, {}))

    with pytest.raises(InvalidInput, match="a multiple of its width, 24"):
        sizes = {"width": 24, "depth": 1, "heads": 3, "image_size": 8, "patch": 4}
        store(models.dinov2("base", **sizes, mlp_width=50), "Dinov2Model")


@pytest.mark.parametrize(
    "said",
    [
        {"dense_act_fn": "gelu", "feed_forward_proj": "gated-gelu"},
        {"dense_act_fn": "silu", "is_gated_act": True},
        {"feed_forward_proj": "gated-quick_gelu"},
        {"num_hidden_layers": 1},
    ],
)
def test_the_activation_and_the_sizes_of_t5_by_each_of_their_names(said, tmp_path):
    """Fields that later versions of the peer derive and files still say."""
    options = {name: value for name, value in T5.items() if name != "num_layers" or "num_hidden_layers" not in said}
    model = transformers.T5EncoderModel(transformers.T5Config(**{**options, **said})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * weight[0].numel() ** -0.5
            )
    model.save_pretrained(tmp_path / "peer")
    config = json.loads((tmp_path / "peer" / "config.json").read_text())
    (tmp_path / "peer" / "config.json").write_text(json.dumps({**config, **said}))
    tokens = inputs(None)[0]
    expected = model(torch.tensor(tokens)).last_hidden_state.detach()
    loaded = interop.load_pretrained(tmp_path / "peer")
    np.testing.assert_allclose(loaded.network.apply(loaded.params, tokens).hidden, expected, atol=1e-4)
    interop.save_pretrained(tmp_path / "ours", loaded)
    back = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(back(torch.tensor(tokens)).last_hidden_state.detach(), expected, atol=1e-4)
