"""DiT against diffusers, in folders of random weights; and the state dict of the original code.

Needs the peers extra: `make test-peers`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from diffusion_jax import interop, models  # noqa: E402
from diffusion_jax.errors import InvalidInput  # noqa: E402
from diffusion_jax.interop.families import network_fields  # noqa: E402
from diffusion_jax.models.dit import SIZES  # noqa: E402
from tests.peers.comparison import TOLERANCE, Case, check_parity, check_true_size, ours, randomised  # noqa: E402

pytestmark = pytest.mark.peers

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "in_channels": 3,
    "out_channels": 6,
    "patch_size": 2,
    "sample_size": 12,
    "num_embeds_ada_norm": 5,
}
ODD = {
    **SMALL,
    "num_attention_heads": 1,
    "attention_head_dim": 20,
    "num_layers": 3,
    "in_channels": 2,
    "out_channels": None,
    "patch_size": 1,
    "sample_size": 4,
    "attention_bias": False,
    "norm_eps": 1e-2,
}


def equal_copies(peer):
    """The peer with the time and label embeddings of its first block in all of them, as published folders have it."""
    first = peer.transformer_blocks[0].norm1.emb.state_dict()
    for block in peer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return peer


def case(config, height, width, seed=1):
    """A call on an image of `height` by `width`, whose number of patches is a square.

    The peer puts the patches of any image together as a square one; here they are put where they belong.
    """
    rng = np.random.default_rng(seed)
    patch, labels = config["patch_size"], np.array([0, config["num_embeds_ada_norm"], 2])
    x = rng.normal(size=(3, height, width, config["in_channels"])).astype(np.float32)
    t = np.array([0.0, 999.0, 431.0], np.float32)

    def call(peer, x):
        y = peer(x.permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels)).sample
        side = y.shape[-1] // patch
        y = y.reshape(3, -1, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        y = y.reshape(3, height // patch, width // patch, patch, patch, -1).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(3, height, width, -1)

    return Case(diffusers.DiTTransformer2DModel, config, call, x, t, {"label": labels})


@pytest.mark.parametrize(
    ("config", "size", "shared"), [(SMALL, (12, 12), False), (SMALL, (8, 18), True), (ODD, (2, 8), True)]
)
def test_outputs_gradients_and_the_way_back(config, size, shared, tmp_path):
    peer = randomised(diffusers.DiTTransformer2DModel(**config))
    peer = equal_copies(peer) if shared else peer
    pretrained, _ = check_parity(case(config, *size), peer, tmp_path, low=config is SMALL)
    assert pretrained.network.module.embeddings == ("shared" if shared else "per_block")


def test_folders_from_before_it_had_a_class_of_its_own(tmp_path):
    example = case(SMALL, 12, 12)
    peer = equal_copies(randomised(diffusers.DiTTransformer2DModel(**SMALL)))
    peer.register_to_config(_class_name="Transformer2DModel")
    peer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("DiTTransformer2DModel", "Transformer2DModel"))
    pretrained = interop.load_pretrained(tmp_path)
    assert pretrained.family == "Transformer2DModel"
    with torch.no_grad():
        expected = example.peer_call(peer, torch.tensor(example.x))
    np.testing.assert_allclose(ours(pretrained, example)(example.x), expected, atol=TOLERANCE)


@pytest.mark.parametrize("embeddings", ["shared", "per_block"])
@pytest.mark.parametrize("sample_size", [32, 64])
def test_true_sizes(sample_size, embeddings):
    """DiT-XL/2 at 256 and 512 pixels."""
    config = {"sample_size": sample_size, "out_channels": 8, "num_embeds_ada_norm": 1000}
    network = check_true_size(diffusers.DiTTransformer2DModel, config, "DiTTransformer2DModel", embeddings=embeddings)
    assert network.module.base_size == sample_size // 2
    assert (network.module.width, network.module.depth, network.module.heads) == SIZES["XL"]


def original(tensors, depth, patch, positions):
    """A folder's tensors under the names of the original code."""
    first = "transformer_blocks.0.norm1.emb"
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{first}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{first}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        names[f"blocks.{i}.attn.proj"] = f"{block}.attn1.to_out.0"
        names[f"blocks.{i}.mlp.fc1"] = f"{block}.ff.net.0.proj"
        names[f"blocks.{i}.mlp.fc2"] = f"{block}.ff.net.2"
        names[f"blocks.{i}.adaLN_modulation.1"] = f"{block}.norm1.linear"
    result = {}
    for kind in ("weight", "bias"):
        result |= {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for ours, theirs in names.items()}
        for i in range(depth):
            parts = [tensors[f"transformer_blocks.{i}.attn1.to_{name}.{kind}"] for name in "qkv"]
            result[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    result["y_embedder.embedding_table.weight"] = tensors[f"{first}.class_embedder.embedding_table.weight"]
    return {**result, "pos_embed": positions}


def reference(tensors, x, t, label, heads, patch):
    """The network of Peebles & Xie 2023 on the tensors of the original code, `x [B, C, H, W]`, written plainly."""
    w = {name: torch.tensor(value) for name, value in tensors.items()}
    linear, norm = torch.nn.functional.linear, torch.nn.functional.layer_norm

    def layer(name, y):
        return linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(y, shift, scale):
        return norm(y, y.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    h = torch.nn.functional.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    angles = t[:, None] * torch.exp(-np.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
    c = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = layer("t_embedder.mlp.2", torch.nn.functional.silu(layer("t_embedder.mlp.0", c)))
    c = torch.nn.functional.silu(c + w["y_embedder.embedding_table.weight"][label])
    batch, count, width = h.shape
    for i in range(sum(name.endswith("qkv.weight") for name in w)):
        shift, scale, gate, shift2, scale2, gate2 = layer(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=-1)
        q, k, v = (
            layer(f"blocks.{i}.attn.qkv", modulated(h, shift, scale))
            .reshape(batch, count, 3, heads, width // heads)
            .permute(2, 0, 3, 1, 4)
        )
        y = ((q @ k.mT * (width // heads) ** -0.5).softmax(dim=-1) @ v).transpose(1, 2).reshape(h.shape)
        h = h + gate[:, None] * layer(f"blocks.{i}.attn.proj", y)
        y = torch.nn.functional.gelu(layer(f"blocks.{i}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * layer(f"blocks.{i}.mlp.fc2", y)
    shift, scale = layer("final_layer.adaLN_modulation.1", c).chunk(2, dim=-1)
    y = layer("final_layer.linear", modulated(h, shift, scale))
    side = x.shape[-1] // patch
    y = y.reshape(batch, side, side, patch, patch, -1).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, side * patch, side * patch, -1)


@pytest.mark.parametrize("learned", [False, True])
def test_the_original_layout(learned, tmp_path):
    peer = equal_copies(randomised(diffusers.DiTTransformer2DModel(**SMALL)))
    peer.save_pretrained(tmp_path)
    positions = peer.pos_embed.pos_embed.numpy()
    positions = positions + np.random.default_rng(0).normal(size=positions.shape).astype("f") if learned else positions
    tensors = original(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), 2, 2, positions)
    file = tmp_path / "DiT.safetensors"
    save_file(tensors, file)
    file.with_name("config.json").unlink()

    with pytest.raises(InvalidInput, match="give heads="):
        interop.load_pretrained(file, family="dit_original")
    pretrained = interop.load_pretrained(file, family="dit_original", heads=3)
    module = pretrained.network.module
    assert (module.conditions, module.learn_sigma, module.base_size) == ((models.label(5),), True, 6)
    assert module.positions == ("learned" if learned else "sincos")
    example = case(SMALL, 12, 12)
    label = torch.tensor(example.cond["label"])
    expected = reference(tensors, torch.tensor(example.x).permute(0, 3, 1, 2), torch.tensor(example.t), label, 3, 2)
    np.testing.assert_allclose(ours(pretrained, example)(example.x), expected, atol=TOLERANCE)

    saved = interop.save_pretrained(tmp_path / "saved", pretrained)
    stored = load_file(saved / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_allclose(stored[name], value, atol=1e-6, err_msg=name)
    again = interop.load_pretrained(saved)
    chex.assert_trees_all_equal(again.params, pretrained.params)
    assert again.network.module == module


def test_an_original_becomes_a_folder_of_diffusers(tmp_path):
    """What diffusers' own conversion does: the same weights, under sinusoids that are shifted by one."""
    network = models.dit(
        width=24,
        depth=1,
        heads=3,
        conditions=(models.label(4),),
        in_channels=3,
        base_size=4,
        frequency_shift=1.0,
        mlp_norm_eps=1e-5,
    )
    x, t, cond = jnp.ones((1, 8, 8, 3)), jnp.array([500.0]), {"label": jnp.array([1])}
    params = network.init(jax.random.key(0), x, t, cond)
    interop.save_pretrained(tmp_path, interop.Pretrained(network, params, "DiTTransformer2DModel", {}))
    peer = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(peer.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.bias, torch.zeros(24))
    with pytest.raises(InvalidInput, match="frequency_shift is 0"):
        plain = models.dit(width=24, depth=1, heads=3, conditions=(models.label(4),), in_channels=3, base_size=4)
        interop.save_pretrained(tmp_path, interop.Pretrained(plain, params, "DiTTransformer2DModel", {}))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"out_channels": 5}, "out_channels=5"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=null, but a whole number"),
    ],
)
def test_options_that_are_not_there_are_named(option, message):
    with pytest.raises(InvalidInput, match=message):
        network_fields("DiTTransformer2DModel", {**SMALL, **option})
