"""What a LoRA file may say of itself: numbers of any dtype are read, all else is refused in a sentence with its key."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax import interop
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path
from tests.interop.foreign import FIELDS

WIDTH = FIELDS["width"]
DOWN, UP = "unet.layer.0.qkv.lora_A.weight", "unet.layer.0.qkv.lora_B.weight"
ALPHA = "unet.layer.0.qkv.alpha"


def plain():
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype("f") for name, shape in ((DOWN, (3, WIDTH)), (UP, (3 * WIDTH, 3)))}


def loaded(folder, pretrained, tensors, metadata=None, **options):
    save_file(tensors, folder / "x.safetensors", metadata=metadata)
    return by_path(interop.load_lora(folder / "x.safetensors", pretrained, **options))


def described(**config):
    """The metadata in which diffusers keeps PEFT's config."""
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.float32])
@pytest.mark.parametrize("alpha", [np.asarray(6), np.asarray([6], np.int32), np.asarray(6, ml_dtypes.bfloat16)])
def test_numbers_of_any_kind(dtype, alpha, pretrained, tmp_path):
    tensors = {name: value.astype(dtype) for name, value in plain().items()}
    ((path, b),) = [
        (p, leaf) for p, leaf in loaded(tmp_path, pretrained, {**tensors, ALPHA: alpha}).items() if "q/b" in p
    ]
    assert b.dtype == np.float32
    np.testing.assert_array_equal(b[0], 2 * tensors[UP][:WIDTH].T.astype(np.float32), err_msg=path)


def test_metadata_of_diffusers(pretrained, tmp_path):
    names = [name for name in loaded(tmp_path, pretrained, plain()) if name.endswith("/b")]
    base = loaded(tmp_path, pretrained, plain())
    for config, scale in (
        ({"r": 3, "lora_alpha": 6}, 2.0),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"qkv": 3}, "alpha_pattern": {r"layer\.\d\.qkv": 1.5}}, 0.5),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True, "rank_pattern": None}, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": -3, "alpha_pattern": {"kv": 7}}, -1.0),
    ):
        found = loaded(tmp_path, pretrained, plain(), described(**config))
        for name in names:
            np.testing.assert_allclose(found[name], scale * base[name], rtol=1e-6)
    # What it says of another component is not of this one.
    other = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 9, "text_encoder.r": 3})}
    np.testing.assert_array_equal(loaded(tmp_path, pretrained, plain(), other)[names[0]], base[names[0]])


SAID = {
    "no JSON": ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not JSON"),
    "a list": ({"lora_adapter_metadata": "[]"}, "holds a JSON list"),
    "no alpha": (described(r=3, lora_alpha=None), "lora_alpha is None, but a finite number other than 0"),
    "alpha as text": (described(r=3, lora_alpha="6"), "lora_alpha is '6'"),
    "alpha as a list": (described(r=3, lora_alpha=[6]), r"lora_alpha is \[6\]"),
    "alpha true": (described(r=3, lora_alpha=True), "lora_alpha is True"),
    "alpha 0": (described(r=3, lora_alpha=0), "lora_alpha is 0"),
    "alpha infinite": (described(r=3, lora_alpha=float("inf")), "lora_alpha is inf"),
    "another rank": (described(r=4, lora_alpha=6), "says the rank 4 of layer.0.qkv, but it has factors of rank 3"),
    "rank as text": (described(r="3", lora_alpha=6), "says the rank '3'"),
    "patterns as a list": (described(r=3, lora_alpha=6, alpha_pattern=["qkv"]), r"alpha_pattern is \['qkv'\]"),
    "no pattern": (described(r=3, lora_alpha=6, alpha_pattern={"(": 3}), r"'\(' of alpha_pattern is no regular exp"),
    "an endless pattern": (described(r=3, lora_alpha=6, alpha_pattern={"(l+)+x": 3}), "repeats too much to be tried"),
    "a slow pattern": (described(r=3, lora_alpha=6, rank_pattern={".*.*.*.*": 3}), "repeats too much to be tried"),
    "null in a pattern": (described(r=3, lora_alpha=None, alpha_pattern={"x": 3}), "lora_alpha is None"),
    "a flag as text": (described(r=3, lora_alpha=6, use_rslora="no"), "use_rslora is 'no', but true or false"),
    "another kind": (described(peft_type="IA3"), "peft_type is 'IA3', but LORA, LOHA and LOKR are read"),
    "a changed base": (described(r=3, lora_alpha=6, init_lora_weights="pissa_niter_4"), "are of a changed base"),
    "DoRA without lengths": (
        described(r=3, lora_alpha=6, use_dora=True),
        "says use_dora, but .* has no lora_magnitude",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_metadata_may_not_say(case, pretrained, tmp_path):
    metadata, message = SAID[case]
    with pytest.raises(InvalidInput, match=r"x\.safetensors.*" + message):
        loaded(tmp_path, pretrained, plain(), metadata)


def test_pefts_config_beside_a_file(pretrained, tmp_path):
    """It is of PEFT's own files: a file of another program in the same folder has nothing to do with it."""
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": null}')
    loaded(tmp_path, pretrained, plain())
    with pytest.raises(InvalidInput, match=r"adapter_config\.json: lora_alpha is None"):
        loaded(tmp_path, pretrained, {name.replace("unet", "base_model.model"): a for name, a in plain().items()})


HADA = "unet.layer.0.out.hada_w1_a"
TENSORS = {
    "alpha NaN": ({ALPHA: np.asarray(np.nan, "f")}, f"{ALPHA} is nan, but a finite number"),
    "alpha 0": ({ALPHA: np.asarray(0, "f")}, f"{ALPHA} is 0.0, but a finite number other than 0"),
    "several alphas": ({ALPHA: np.ones(2, "f")}, rf"{ALPHA} is \[2\], but one number is needed"),
    "NaN": ({DOWN: np.full((3, WIDTH), np.nan, "f")}, f"{DOWN} holds numbers that are not finite"),
    "integers": ({UP: np.ones((3 * WIDTH, 3), np.int8)}, f"{UP} has dtype I8"),
    "no rank": ({DOWN: np.ones((0, WIDTH), "f")}, rf"{DOWN} is \[0, 16\]: factors need a rank"),
    "a scalar": ({DOWN: np.asarray(1, "f")}, rf"{DOWN} is \[\]: factors need a rank"),
    "two ranks": ({DOWN: np.ones((2, WIDTH), "f")}, rf"{DOWN} \[2, 16\] and {UP} \[48, 3\] differ in their rank"),
    "no up": ({UP: None}, f"the layer layer.0.qkv has {DOWN}, but lacks up"),
    "no down": ({DOWN: None, ALPHA: np.asarray(1, "f")}, "but lacks down"),
    "alpha alone": ({UP: None, DOWN: None, ALPHA: np.asarray(1, "f")}, f"the layer layer.0.qkv has {ALPHA}, but lacks"),
    "half a LoHa": ({HADA: np.ones((2, 2), "f")}, f"has {HADA}, but lacks hada_w1_b, hada_w2_a, hada_w2_b"),
    "two kinds": ({HADA.replace("out", "qkv"): np.ones((2, 2), "f")}, "has .*hada_w1_a besides"),
    "another kind": ({"unet.layer.0.out.oft_blocks": np.ones(2, "f")}, "a tensor of OFT, which is not read"),
    "no adapter": ({"unet.layer.0.out.weight": np.ones(2, "f")}, "is no tensor of an adapter that is known here"),
    "a norm here": ({"unet.layer.0.qkv.diff_b": np.ones(5, "f")}, r"diff_b makes \[5\] there, but a weight \[48, 16\]"),
    "lengths": ({"unet.layer.0.qkv.dora_scale": np.ones(5, "f")}, r"dora_scale \[5\] there, but a weight \[48, 16\]"),
    "beyond float32": ({ALPHA: np.asarray(1e308)}, "what layer.0.qkv is changed by is not finite"),
    "twice": ({DOWN.replace("lora_A", "lora_A.default"): np.ones((3, WIDTH), "f")}, "says the same twice"),
    "twice, spelled apart": (
        {f"lora_unet_layer_0_qkv.lora_{way}.weight": plain()[name] for way, name in (("down", DOWN), ("up", UP))},
        "says the same twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_what_tensors_may_not_be(case, pretrained, tmp_path):
    given, message = TENSORS[case]
    tensors = {name: value for name, value in {**plain(), **given}.items() if value is not None}
    with pytest.raises(InvalidInput, match=r"x\.safetensors.*" + message):
        loaded(tmp_path, pretrained, tensors)


def test_modules_that_are_not_there_are_counted_and_told(pretrained, tmp_path):
    more = {f"unet.layer.{i}.qkv.lora_{x}.weight": plain()[n] for i in (7, 8) for x, n in (("A", DOWN), ("B", UP))}
    with pytest.raises(InvalidInput, match=r"adapts 2 modules that are not there.*partial=True .* other 1"):
        loaded(tmp_path, pretrained, {**plain(), **more})
    with pytest.warns(
        UserWarning, match=r"2 of 3 modules are not in a Foreign and were left out, such as 'layer_7_qkv'"
    ):
        found = loaded(tmp_path, pretrained, {**plain(), **more}, partial=True)
    for name, leaf in loaded(tmp_path, pretrained, plain()).items():
        np.testing.assert_array_equal(found[name], leaf)
    with pytest.raises(InvalidInput, match="adapts 2 modules"):
        loaded(tmp_path, pretrained, more, partial=True)


def test_a_file_of_which_nothing_fits_is_told_by_its_layout(pretrained, tmp_path):
    for module, layout in (
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("transformer.transformer_blocks.0.attn1.to_q", "DiT of diffusers"),
        ("unet.down_blocks.0.attentions.0.proj_in", "a U-Net of diffusers"),
    ):
        tensors = {f"{module}.lora_A.weight": plain()[DOWN], f"{module}.lora_B.weight": plain()[UP]}
        with pytest.raises(InvalidInput, match=f"looks like one for {layout}"):
            loaded(tmp_path, pretrained, tensors)


def test_copies_of_a_layer_are_adapted_alike_or_not_at_all(pretrained, tmp_path):
    """Their file has one embedding a layer; here it is one, so it cannot be changed in one place."""
    rng = np.random.default_rng(0)
    shape = by_path(pretrained.params)["condition/time/up/kernel"].shape
    down, up = rng.normal(size=(2, shape[0])).astype("f"), rng.normal(size=(shape[1], 2)).astype("f")

    def named(layers, up=up):
        names = [f"unet.layer.{i}.time.0.lora" for i in layers]
        return {f"{n}_A.weight": down for n in names} | {f"{n}_B.weight": up for n in names}

    found = loaded(tmp_path, pretrained, named(range(3)))
    np.testing.assert_allclose(found["condition/time/up/a"] @ found["condition/time/up/b"], (up @ down).T, atol=1e-5)
    for tensors in (named([0]), named([0, 1]) | named([2], 2 * up)):
        with pytest.raises(InvalidInput, match="adapts the copies of layer"):
            loaded(tmp_path, pretrained, tensors)
