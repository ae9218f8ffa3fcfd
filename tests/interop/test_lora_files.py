"""LoRA files: every dialect says the same, what is read is what they add to their weights, errors say why."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop, models
from diffusion_jax.adapters import merged
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.lora_files import components_of, merged_files
from diffusion_jax.interop.lora_names import sgm_names
from diffusion_jax.models import by_path
from tests.interop.folders import UNET, drawn, sd_folder
from tests.interop.foreign import FIELDS

RANK = 3


@pytest.fixture
def theirs():
    """Factors of two layers' fused projection and one layer's feed-forward, in their layout: module to (down, up)."""
    rng = np.random.default_rng(1)
    width = FIELDS["width"]
    shapes = {"layer.0.qkv": (3 * width, width), "layer.2.qkv": (3 * width, width), "layer.1.up": (4 * width, width)}
    return {
        name: (rng.normal(size=(RANK, i)).astype(np.float32), rng.normal(size=(o, RANK)).astype(np.float32))
        for name, (o, i) in shapes.items()
    }


def written(path, theirs, down="{}.lora_A.weight", up="{}.lora_B.weight", alpha=None, prefix="unet."):
    tensors = {}
    for name, (a, b) in theirs.items():
        name = prefix + (name.replace(".", "_") if "lora_unet_" in prefix else name)
        tensors |= {down.format(name): a, up.format(name): b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.asarray(alpha, np.float32)
    save_file(tensors, path)
    return path


def weights_after(tmp_path, pretrained, factors):
    root = interop.save_pretrained(tmp_path / "after", pretrained._replace(params=merged(pretrained.params, factors)))
    return load_file(root / "diffusion_pytorch_model.safetensors")


SPELLINGS = {
    "diffusers": {},
    "diffusers, older": {"down": "{}.lora.down.weight", "up": "{}.lora.up.weight"},
    "linear layer": {"down": "{}.lora_linear_layer.down.weight", "up": "{}.lora_linear_layer.up.weight"},
    "peft": {"prefix": "base_model.model."},
    "peft, named": {
        "prefix": "base_model.model.",
        "down": "{}.lora_A.default.weight",
        "up": "{}.lora_B.default.weight",
    },
    "kohya": {"prefix": "lora_unet_", "down": "{}.lora_down.weight", "up": "{}.lora_up.weight", "alpha": 1.5},
    "bare": {"prefix": ""},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_read_is_what_they_add(tmp_path, pretrained, theirs, spelling):
    options = SPELLINGS[spelling]
    factors = interop.load_lora(written(tmp_path / "lora.safetensors", theirs, **options), pretrained)
    after = weights_after(tmp_path, pretrained, factors)
    before = load_file(interop.save_pretrained(tmp_path / "b", pretrained) / "diffusion_pytorch_model.safetensors")
    scale = options.get("alpha", RANK) / RANK
    for name, value in before.items():
        module = name.removesuffix(".weight")
        expected = value + scale * theirs[module][1] @ theirs[module][0] if module in theirs else value
        np.testing.assert_allclose(after[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "kohya"])
def test_what_is_saved_is_loaded(tmp_path, pretrained, theirs, dialect):
    factors = interop.load_lora(written(tmp_path / "lora.safetensors", theirs), pretrained)
    file = interop.save_lora(tmp_path / "saved" / "x.safetensors", pretrained, factors, dialect=dialect)
    again = by_path(interop.load_lora(file, pretrained))
    assert again.keys() == by_path(factors).keys()
    for path, leaf in by_path(factors).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_factors_of_our_own_that_share_no_input_stand_side_by_side(tmp_path, pretrained):
    """q and k are one tensor there; trained apart here, they become one factor of twice the rank."""
    rng = np.random.default_rng(2)
    layers, width = FIELDS["depth"], FIELDS["width"]
    factors = {
        name: {"a": rng.normal(size=(layers, width, 2)), "b": rng.normal(size=(layers, 2, width))} for name in "qk"
    }
    tree = {"blocks": {"block": {"attention": {"attention": factors}}}}
    file = interop.save_lora(tmp_path / "x.safetensors", pretrained, tree)
    assert load_file(file)["unet.layer.0.qkv.lora_A.weight"].shape == (4, width)
    again = interop.load_lora(file, pretrained)
    ours, theirs = (by_path(merged(pretrained.params, one)) for one in (tree, again))
    for path, leaf in ours.items():
        np.testing.assert_allclose(theirs[path], leaf, atol=1e-5, err_msg=path)


def test_ranks_of_modules_may_differ(tmp_path, pretrained, theirs):
    down, up = theirs["layer.1.up"]
    theirs["layer.1.up"] = (down[:1], up[:, :1])
    factors = interop.load_lora(written(tmp_path / "x.safetensors", theirs), pretrained)
    a = by_path(factors)["blocks/block/mlp/feed_forward/up/a"]
    assert a.shape == (FIELDS["depth"], FIELDS["width"], RANK)
    assert not a[1, :, 1:].any() and not a[0].any() and a[1, :, 0].any()


def test_alpha_of_pefts_config(tmp_path, pretrained, theirs):
    plain = interop.load_lora(written(tmp_path / "x.safetensors", theirs), pretrained)
    folder = tmp_path / "peft"
    folder.mkdir()
    written(folder / "adapter_model.safetensors", theirs, prefix="base_model.model.")
    (folder / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6, "alpha_pattern": {"layer.1.up": 9}}')
    factors = interop.load_lora(folder, pretrained)
    for path, factor in (("attention/attention/q", 2), ("mlp/feed_forward/up", 3)):
        b = by_path(factors)[f"blocks/block/{path}/b"]
        np.testing.assert_allclose(b, factor * by_path(plain)[f"blocks/block/{path}/b"], rtol=1e-6)


def test_components_of_one_file_are_kept_apart(tmp_path, pretrained, theirs):
    file = written(tmp_path / "x.safetensors", {"layer.1.up": theirs["layer.1.up"]}, prefix="text_encoder.")
    with pytest.raises(InvalidInput, match="no LoRA factors for the component 'unet'"):
        interop.load_lora(file, pretrained)
    assert by_path(interop.load_lora(file, pretrained, "text_encoder"))


def test_a_lora_of_another_base(tmp_path, pretrained, theirs):
    other = written(tmp_path / "x.safetensors", {"layer.0.qvk": theirs["layer.0.qkv"]})
    with pytest.raises(
        InvalidInput, match=r"1 modules that are not there, such as 'layer_0_qvk'.*'layer_0_qkv' is near"
    ):
        interop.load_lora(other, pretrained)
    _, up = theirs["layer.0.qkv"]
    wide = written(tmp_path / "y.safetensors", {"layer.0.qkv": (np.ones((RANK, 32), np.float32), up)})
    with pytest.raises(InvalidInput, match=r"layer.0.qkv has factors \[48, 3\] and \[3, 32\] there, but a weight"):
        interop.load_lora(wide, pretrained)


def test_mistaken_words(tmp_path, pretrained, theirs):
    file = written(tmp_path / "x.safetensors", theirs)
    with pytest.raises(InvalidInput, match="component"):
        interop.load_lora(file, pretrained, "encoder")
    with pytest.raises(InvalidInput, match="dialect"):
        interop.save_lora(file, pretrained, {}, dialect="kohia")


def test_block_names_of_the_original_code():
    """As the SDXL U-Net numbers them: 2 residual blocks a level, 3 levels, attention in the last two."""
    names = [
        "conv_in",
        *(f"down_blocks_{b}_resnets_{i}_conv1" for b in range(3) for i in range(2)),
        *(f"down_blocks_{b}_attentions_{i}_proj_in" for b in (1, 2) for i in range(2)),
        *(f"down_blocks_{b}_downsamplers_0_conv" for b in range(2)),
        "mid_block_resnets_1_time_emb_proj",
        "mid_block_attentions_0_proj_out",
        *(f"up_blocks_{b}_resnets_{i}_conv_shortcut" for b in range(3) for i in range(3)),
        *(f"up_blocks_{b}_attentions_{i}_proj_in" for b in (0, 1) for i in range(3)),
        *(f"up_blocks_{b}_upsamplers_0_conv" for b in range(2)),
    ]
    known = sgm_names(names)
    assert set(known.values()) == set(names)
    expected = {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
        "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
        "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
        "output_blocks_8_0_skip_connection": "up_blocks_2_resnets_2_conv_shortcut",
        "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
    }
    assert expected.items() <= known.items()


OLD = {
    "processors": [f"unet.{{}}.attn1.processor.to_{{}}_lora.{role}.weight" for role in ("down", "up")],
    "processors without a prefix": [f"{{}}.attn1.processor.to_{{}}_lora.{role}.weight" for role in ("down", "up")],
    "ComfyUI": [f"diffusion_model.{{}}.attn1.to_{{}}.lora_{role}.weight" for role in "AB"],
}


@pytest.mark.parametrize("spelling", OLD)
def test_old_spellings_of_attention(tmp_path, spelling):
    pretrained = drawn("UNet2DConditionModel", models.unet("sd15", **{**UNET, "attention": (1,)}))
    block, rng = "down_blocks.0.attentions.0.transformer_blocks.0", np.random.default_rng(0)
    draws = {(way, role): rng.normal(size=(2, 8)).astype("f") for way in ("q", "out") for role in range(2)}
    tensors = {}
    for (way, role), value in draws.items():
        name = OLD[spelling][role].format(block, way)
        name = name.replace("to_out.", "to_out.0.") if spelling == "ComfyUI" else name
        tensors[name] = np.ascontiguousarray(value.T) if role else value
    save_file(tensors, tmp_path / "x.safetensors")
    factors = by_path(interop.load_lora(tmp_path / "x.safetensors", pretrained))
    for way in ("q", "out"):
        path = f"down_0_0_attention/blocks/block/attention/attention/{way}"
        np.testing.assert_allclose(
            factors[f"{path}/a"][0] @ factors[f"{path}/b"][0], draws[way, 0].T @ draws[way, 1], atol=1e-5
        )


@pytest.mark.parametrize(
    "spelling",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.{}.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.0.self_attn.{}.lora.{}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.{}_lora.{}.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_{}.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_{}.lora_{}.weight",
    ],
)
def test_spellings_of_text_encoders(tmp_path, spelling):
    text = drawn("CLIPTextModel", models.clip_text("vit_l", vocab_size=9, width=8, depth=2, heads=2, mlp_width=8))
    rng, names = np.random.default_rng(0), ("to_q", "to_out") if "_lora." in spelling else ("q_proj", "out_proj")
    tensors = {}
    for name in names:
        for role in ("down", "up"):
            value = rng.normal(size=(2, 8)).astype("f")
            tensors[spelling.format(name, role)] = np.ascontiguousarray(value.T) if role == "up" else value
    save_file(tensors, tmp_path / "x.safetensors")
    assert components_of(tmp_path / "x.safetensors") == ("text_encoder",)
    factors = by_path(interop.load_lora(tmp_path / "x.safetensors", text, "text_encoder"))
    for name, ours in zip(names, ("q", "out"), strict=True):
        down, up = (tensors[spelling.format(name, role)] for role in ("down", "up"))
        a, b = (factors[f"blocks/block/attention/attention/{ours}/{part}"][0] for part in "ab")
        np.testing.assert_allclose(a @ b, (up @ down).T, atol=1e-5)


def test_names_of_a_transformer_without_a_prefix(tmp_path):
    """Its blocks are called like the prefix of a component."""
    network = models.dit("S/2", width=8, depth=1, heads=2, conditions=(models.label(3),), in_channels=4, base_size=2,
                         frequency_shift=1.0)  # fmt: skip
    rng, stem = np.random.default_rng(0), "transformer_blocks.0.attn1.to_q"
    down, up = rng.normal(size=(2, 8)).astype("f"), rng.normal(size=(8, 2)).astype("f")
    for head in ("", "transformer.", "lora_transformer_"):
        name = f"{head}{stem.replace('.', '_') if head.endswith('_') else stem}"
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "x.safetensors")
        pretrained = drawn("DiTTransformer2DModel", network)
        factors = by_path(interop.load_lora(tmp_path / "x.safetensors", pretrained))
        a, b = (factors[f"blocks/block/attention/attention/q/{part}"][0] for part in "ab")
        np.testing.assert_allclose(a @ b, (up @ down).T, atol=1e-5)


def test_files_beside_each_other_in_a_pipeline(tmp_path):
    """Text encoders are merged, networks attached, one file after the other; what no component takes is refused."""
    folder = sd_folder(tmp_path / "sd", attention=(1,))
    plain = interop.load_pipeline(folder)
    rng, files = np.random.default_rng(0), []
    for number in range(2):
        tensors = {}
        for stem, width in (("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 8),
                            ("text_encoder.text_model.encoder.layers.0.mlp.fc2", 12)):  # fmt: skip
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(2, width if width == 8 else 24)).astype("f")
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(width, 2)).astype("f")
        save_file(tensors, tmp_path / f"{number}.safetensors")
        files.append((tmp_path / f"{number}.safetensors", 0.5 + number))
    both = interop.load_pipeline(folder, loras=files)
    (before,), (after,) = plain.prompter.encoders, both.prompter.encoders
    expected = merged_files(before.pretrained, files, "text_encoder").params
    for path, leaf in by_path(after.pretrained.params).items():
        np.testing.assert_array_equal(leaf, by_path(expected)[path])
    # One after the other is both.
    first = interop.load_pipeline(folder, loras=files[:1])
    again = interop.with_lora(first, [(interop.load_lora(files[1][0], plain.network), files[1][1])])
    for path, leaf in by_path(both.params).items():
        np.testing.assert_allclose(by_path(again.params)[path], leaf, rtol=1e-6, err_msg=path)
    named = {name.replace("text_encoder", "text_encoder_2"): value for name, value in load_file(files[0][0]).items()}
    save_file(named, tmp_path / "xl.safetensors")
    with pytest.raises(InvalidInput, match="adapts text_encoder_2, but the pipeline has unet, text_encoder only"):
        interop.load_pipeline(folder, loras=[(tmp_path / "xl.safetensors", 1.0)])


def test_a_file_for_another_stable_diffusion_is_told_by_its_texts(tmp_path):
    pretrained = drawn("UNet2DConditionModel", models.unet("sd15", **{**UNET, "attention": (1,)}))
    stem = "lora_unet_down_blocks_4_attentions_1_transformer_blocks_9_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": np.ones((2, 2048), "f"), f"{stem}.lora_up.weight": np.ones((8, 2), "f")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InvalidInput, match=r"texts of 2048 channels \(SDXL\), but this one of 12\."):
        interop.load_lora(tmp_path / "x.safetensors", pretrained)
