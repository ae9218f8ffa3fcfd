"""Adapters that are more than B A are what their papers' formulas say, layer by layer, in the layout of the file."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax import interop, models
from diffusion_jax.adapters import merged
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.lora_files import merged_files
from diffusion_jax.interop.lora_targets import modules_of
from diffusion_jax.models import by_path
from tests.interop.folders import drawn

FIELDS = {"multipliers": (1,), "attention": (1,), "num_residual": 1, "channels": 8, "heads": 2, "groups": 4}
RANK, ALPHA = 2, 3.0
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {
    # Two of ours are joined there, halves stand in another order, a window of 3 x 3.
    "linear": f"{BLOCK}.ff.net.0.proj",
    "swapped": "down_blocks.0.resnets.0.time_emb_proj",
    "conv": "down_blocks.0.resnets.0.conv1",
}


@pytest.fixture(scope="module")
def pretrained():
    conditions = (models.context("none", 6),)
    network = models.unet(
        "sd15", **FIELDS, time_features=8, in_channels=4, conditions=conditions, modulation="scale_shift"
    )
    return drawn("UNet2DConditionModel", network)


@pytest.fixture(scope="module")
def before(pretrained, tmp_path_factory):
    return load_file(interop.save_pretrained(tmp_path_factory.mktemp("b"), pretrained) / STORED)


STORED = "diffusion_pytorch_model.safetensors"


def weights_after(tmp_path, pretrained, factors, scale=1.0):
    params = merged(pretrained.params, factors, scale)
    return load_file(interop.save_pretrained(tmp_path / "after", pretrained._replace(params=params)) / STORED)


def kron(first, second):
    """Entry by entry: `K[a c + k, b d + n, ...] = first[a, b] second[k, n, ...]`."""
    outputs, inputs = len(second), second.shape[1]
    result = np.zeros((len(first) * outputs, first.shape[1] * inputs, *second.shape[2:]), second.dtype)
    for i in range(len(first)):
        for j in range(first.shape[1]):
            result[i * outputs : (i + 1) * outputs, j * inputs : (j + 1) * inputs] = first[i, j] * second
    return result


def core(t, left, right):
    """`sum_ij t[i, j, ...] left[i, o] right[j, n]`, `[O, I, ...]`."""
    return np.tensordot(left, np.tensordot(right, t, axes=([0], [1])), axes=([0], [1]))


def lora(draw, shape):
    outputs, *inputs = shape
    down, up = draw(RANK, *inputs), draw(outputs, RANK)
    change = np.tensordot(up, down, axes=1)
    return {"lora_down.weight": down, "lora_up.weight": up.reshape(outputs, RANK, *(1,) * (len(inputs) - 1))}, change


def lora_with_core(draw, shape):
    outputs, inputs, *window = shape
    down, mid, up = draw(RANK, inputs), draw(RANK, RANK, *window), draw(outputs, RANK)
    tensors = {"lora_down.weight": down[..., None, None], "lora_mid.weight": mid}
    return {**tensors, "lora_up.weight": up[..., None, None]}, core(mid, up.T, down)


def loha(draw, shape):
    outputs, flat = shape[0], int(np.prod(shape[1:]))
    a, b, c, d = draw(outputs, RANK), draw(RANK, flat), draw(outputs, RANK), draw(RANK, flat)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    return tensors, ((a @ b) * (c @ d)).reshape(shape)


def loha_with_cores(draw, shape):
    outputs, inputs, *window = shape
    a, b, c, d = draw(RANK, outputs), draw(RANK, inputs), draw(RANK, outputs), draw(RANK, inputs)
    t, u = draw(RANK, RANK, *window), draw(RANK, RANK, *window)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "hada_t1": t, "hada_t2": u}
    return tensors, core(t, a, b) * core(u, c, d)


def lokr(draw, shape, first=True, second=True, with_core=False):
    """first, second: whether either side is whole."""
    outputs, inputs, *window = shape
    tensors = {}
    one = draw(2, 2)
    if first:
        tensors["lokr_w1"] = one
    else:
        tensors["lokr_w1_a"], tensors["lokr_w1_b"] = draw(2, RANK), draw(RANK, 2)
        one = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    rest = (outputs // 2, inputs // 2, *window)
    two = draw(*rest)
    if second:
        tensors["lokr_w2"] = two
    elif with_core:
        left, right, t = draw(RANK, rest[0]), draw(RANK, rest[1]), draw(RANK, RANK, *window)
        tensors |= {"lokr_w2_a": left, "lokr_w2_b": right, "lokr_t2": t}
        two = core(t, left, right)
    else:
        tensors["lokr_w2_a"], tensors["lokr_w2_b"] = draw(rest[0], RANK), draw(RANK, int(np.prod(rest[1:])))
        two = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(rest)
    # Without a rank there is no scale: what is counted below is taken out here.
    return tensors, kron(one, two) * (RANK / ALPHA if first and second else 1.0)


KINDS = {
    "LoRA": (lora, LAYERS),
    "LoRA with a core": (lora_with_core, ["conv"]),
    "LoHa": (loha, LAYERS),
    "LoHa with cores": (loha_with_cores, ["conv"]),
    "LoKr": (lokr, LAYERS),
    "LoKr, w1 cut": (lambda *args: lokr(*args, first=False), LAYERS),
    "LoKr, w2 cut": (lambda *args: lokr(*args, second=False), LAYERS),
    "LoKr, both cut": (lambda *args: lokr(*args, first=False, second=False), LAYERS),
    "LoKr, with a core": (lambda *args: lokr(*args, second=False, with_core=True), ["conv"]),
}
CASES = [(kind, layer) for kind, (_, layers) in KINDS.items() for layer in layers]


def drawer(seed=0):
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_a_kind_is_its_formula(kind, layer, pretrained, before, tmp_path):
    """Alone, and as the direction of what is decomposed: by outputs as PEFT and by inputs as older files have it."""
    module = LAYERS[layer]
    weight = before[f"{module}.weight"]
    tensors, change = KINDS[kind][0](drawer(), weight.shape)
    change = change * ALPHA / RANK
    stem = f"lora_unet_{module.replace('.', '_')}"
    file = tmp_path / "x.safetensors"
    named = {f"{stem}.{role}": np.ascontiguousarray(tensor) for role, tensor in tensors.items()}
    named[f"{stem}.alpha"] = np.asarray(ALPHA, np.float32)
    save_file(named, file)
    factors = interop.load_lora(file, pretrained)
    for scale in (1.0, -0.5):
        found = weights_after(tmp_path, pretrained, factors, scale)
        np.testing.assert_allclose(found[f"{module}.weight"], weight + scale * change, atol=2e-5)
    assert all(np.array_equal(found[name], before[name]) for name in before if name != f"{module}.weight")

    new = weight + change
    ones = (1,) * (weight.ndim - 2)
    for shape, axes in (((-1, 1, *ones), (1, 2, 3)), ((1, -1, *ones), (0, 2, 3))):
        axes = tuple(axis for axis in axes if axis < weight.ndim)
        size = np.abs(drawer(1)(weight.shape[shape.index(-1)])).reshape(shape)
        save_file({**named, f"{stem}.dora_scale": size}, file)
        expected = size * new / np.sqrt((new**2).sum(axes, keepdims=True))
        factors = interop.load_lora(file, pretrained)
        found = weights_after(tmp_path, pretrained, factors)
        np.testing.assert_allclose(found[f"{module}.weight"], expected, atol=2e-5)
        # 0 is the network itself, and half is half of the way.
        half = weights_after(tmp_path, pretrained, factors, 0.5)[f"{module}.weight"]
        np.testing.assert_allclose(half, (weight + expected) / 2, atol=2e-5)


def test_decomposed_adapters_are_added_to_the_base_and_not_to_each_other(pretrained, before, tmp_path):
    module = LAYERS["linear"]
    weight, files, changes = before[f"{module}.weight"], [], []
    for seed in range(2):
        draw = drawer(seed)
        tensors, change = lora(draw, weight.shape)
        size = np.abs(draw(len(weight)))
        named = {f"unet.{module}.lora_A.weight": tensors["lora_down.weight"]}
        named |= {f"unet.{module}.lora_B.weight": tensors["lora_up.weight"]}
        save_file({**named, f"unet.{module}.lora_magnitude_vector.weight": size}, tmp_path / f"{seed}.safetensors")
        files.append((tmp_path / f"{seed}.safetensors", 0.5 + seed))
        new = weight + change
        changes.append(size[:, None] * new / np.linalg.norm(new, axis=1, keepdims=True) - weight)
    params = merged_files(pretrained, files, "unet").params
    after = load_file(interop.save_pretrained(tmp_path / "after", pretrained._replace(params=params)) / STORED)
    np.testing.assert_allclose(after[f"{module}.weight"], weight + 0.5 * changes[0] + 1.5 * changes[1], atol=2e-5)


def test_what_pefts_folder_says_beside_the_factors(pretrained, before, tmp_path):
    """Biases of B are scaled; trained biases and whole modules take the place of the base's."""
    draw, module = drawer(), LAYERS["conv"]
    weight = before[f"{module}.weight"]
    tensors, change = lora(draw, weight.shape)
    saved = {
        f"{module}.lora_A.weight": tensors["lora_down.weight"],
        f"{module}.lora_B.weight": tensors["lora_up.weight"],
        f"{module}.lora_B.bias": draw(len(weight)),
        "conv_out.weight": draw(*before["conv_out.weight"].shape),
        "conv_norm_out.bias": draw(*before["conv_norm_out.bias"].shape),
    }
    save_file({f"base_model.model.{name}": value for name, value in saved.items()}, tmp_path / "a.safetensors")
    config = {"peft_type": "LORA", "r": 7, "lora_alpha": 1, "rank_pattern": {"conv1": RANK}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"resnets.*conv1": 5}}))
    found = weights_after(tmp_path, pretrained, interop.load_lora(tmp_path / "a.safetensors", pretrained))
    scale = 5 / RANK**0.5
    expected = {
        f"{module}.weight": weight + scale * change,
        f"{module}.bias": before[f"{module}.bias"] + scale * saved[f"{module}.lora_B.bias"],
        "conv_out.weight": saved["conv_out.weight"],
        "conv_norm_out.bias": saved["conv_norm_out.bias"],
    }
    for name in before:
        np.testing.assert_allclose(found[name], expected.get(name, before[name]), atol=2e-5, err_msg=name)


def test_factors_of_an_embedding(tmp_path):
    text = drawn("CLIPTextModel", models.clip_text("vit_l", vocab_size=9, width=8, depth=1, heads=2, mlp_width=8))
    draw, stem = drawer(), "text_encoder.text_model.embeddings.token_embedding"
    down, up = draw(RANK, 9), draw(8, RANK)
    save_file({f"{stem}.lora_embedding_A": down, f"{stem}.lora_embedding_B": up}, tmp_path / "x.safetensors")
    factors = by_path(interop.load_lora(tmp_path / "x.safetensors", text, "text_encoder"))
    np.testing.assert_allclose(factors["embed/embedding"], (up @ down).T, atol=1e-6)


def test_a_tree_of_all_kinds_is_written_as_it_was_read(pretrained, tmp_path):
    """kohya's files have a place for all; others refuse what they cannot say."""
    draw, tensors = drawer(), {}
    for module, kind in zip(LAYERS.values(), ("LoRA", "LoHa", "LoKr"), strict=True):
        made, _ = KINDS[kind][0](draw, pretrained_shape(pretrained, module))
        tensors |= {f"lora_unet_{module.replace('.', '_')}.{role}": value for role, value in made.items()}
    tensors["lora_unet_conv_out.diff_b"] = draw(4)
    save_file(tensors, tmp_path / "x.safetensors")
    factors = interop.load_lora(tmp_path / "x.safetensors", pretrained)
    file = interop.save_lora(tmp_path / "again.safetensors", pretrained, factors, dialect="kohya")
    again = by_path(interop.load_lora(file, pretrained))
    assert again.keys() == by_path(factors).keys()
    for path, leaf in by_path(factors).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    with pytest.raises(InvalidInput, match=r"dialect is .diffusers., but .* has changes that are not factors"):
        interop.save_lora(tmp_path / "no.safetensors", pretrained, factors)
    assert not (tmp_path / "no.safetensors").exists()


def pretrained_shape(pretrained, module):
    return modules_of(pretrained)[module.replace(".", "_")].weight.shape
