"""LoRA files of the peers are read, and ours are read by them: the adapted networks agree.

Needs the peers extra: `make test-peers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file  # noqa: E402

from diffusion_jax import adapters, interop  # noqa: E402
from diffusion_jax.models import by_path  # noqa: E402
from tests.peers.comparison import TOLERANCE, randomised  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.tiny_pipelines import clip, saved, unet  # noqa: E402

pytestmark = pytest.mark.peers

MODULES = ["to_q", "to_v", "to_out.0", "proj", "ff.net.2", "conv1", "proj_in", "time_emb_proj", "downsamplers.0.conv"]
X, T, CONTEXT = (
    np.random.default_rng(i).normal(size=s).astype("f") for i, s in enumerate([(2, 8, 8, 4), (2,), (2, 3, 12)])
)
T = np.abs(T) * 100


def theirs(peer, context=CONTEXT, **more):
    with torch.no_grad():
        y = peer(torch.tensor(X).movedim(-1, 1), torch.tensor(T), torch.tensor(context), **more).sample
    return y.movedim(1, -1).numpy()


def ours(pretrained, factors, cond):
    network = adapters.attached(pretrained.network, factors)
    params = {"params": pretrained.params, "lora": jax.tree.map(jnp.asarray, factors)}
    return np.asarray(jax.jit(network.apply)(params, X, T, jax.tree.map(jnp.asarray, cond))[0])


def adapted(modules=MODULES, **fields):
    """A peer with an adapter that is not trivial, and the plain network in a folder."""
    peer = unet(12, **fields)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, rank_pattern={"conv1": 2})
    peer.add_adapter(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return peer


@pytest.mark.parametrize("linear", [False, True])
def test_what_the_peer_saves(linear, tmp_path):
    plain = unet(12, use_linear_projection=linear)
    plain.save_pretrained(tmp_path / "unet")
    pretrained = interop.load_pretrained(tmp_path / "unet")
    peer = adapted(use_linear_projection=linear)
    assert np.abs(theirs(peer) - theirs(plain)).max() > 0.1
    peer.save_lora_adapter(tmp_path / "lora")
    layers = peft.utils.get_peft_model_state_dict(peer)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "weights", unet_lora_layers=layers,
        unet_lora_adapter_metadata=peer.peft_config["default"].to_dict(),
    )  # fmt: skip
    for folder in ("lora", "weights"):
        factors = interop.load_lora(tmp_path / folder, pretrained)
        error = float(np.abs(ours(pretrained, factors, {"context": CONTEXT}) - theirs(peer)).max())
        assert error <= TOLERANCE, (folder, error)
        record("adapter", f"LoRA of a U-Net, {folder}", error)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_what_we_save(dialect, tmp_path):
    plain = unet(12)
    plain.save_pretrained(tmp_path / "unet")
    pretrained = interop.load_pretrained(tmp_path / "unet")
    made = adapters.lora(pretrained.network, rank=4, select=("q", "k", "gate", "up", "conv_in", "out"))
    factors = made.init(jax.random.key(0), pretrained.params, X, T, {"context": CONTEXT})
    factors = jax.tree.map(lambda leaf: leaf + 0.2, factors)
    expected = ours(pretrained, factors, {"context": CONTEXT})
    file = interop.save_lora(tmp_path / "saved" / "lora.safetensors", pretrained, factors, dialect=dialect)
    if dialect == "peft":
        peer = peft.PeftModel.from_pretrained(plain, file.parent).base_model.model
    else:
        peer = plain
        state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(str(file), unet_config=plain.config)
        diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, peer)
    np.testing.assert_allclose(theirs(peer.eval()), expected, atol=TOLERANCE)


def test_an_sdxl_file_with_the_block_names_of_the_original_code(tmp_path):
    peer, folder = saved("SDXL", tmp_path)
    pretrained = interop.load_pretrained(folder / "unet")
    cond = {
        "context": np.random.default_rng(1).normal(size=(2, 3, 26)).astype("f"),
        "pooled": np.random.default_rng(2).normal(size=(2, 10)).astype("f"),
        "time_ids": np.tile(np.arange(6.0, dtype="f"), (2, 1)),
    }
    made = adapters.lora(pretrained.network, rank=2, select=("q", "v", "conv_in", "shortcut", "down_0/conv"))
    factors = made.init(jax.random.key(0), pretrained.params, X, T, jax.tree.map(jnp.asarray, cond))
    factors = jax.tree.map(lambda leaf: leaf + 0.2, factors)
    expected = ours(pretrained, factors, cond)
    file = interop.save_lora(tmp_path / "lora.safetensors", pretrained, factors, dialect="kohya_sdxl")
    assert not any("down_blocks" in name for name in load_file(file))
    again = interop.load_lora(file, pretrained)
    for path, leaf in by_path(factors).items():
        np.testing.assert_allclose(by_path(again)[path], leaf, atol=1e-6, err_msg=path)
    peer.load_lora_weights(str(file))
    added = {"text_embeds": torch.tensor(cond["pooled"]), "time_ids": torch.tensor(cond["time_ids"])}
    found = theirs(peer.unet, cond["context"], added_cond_kwargs=added)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_the_factors_of_a_text_encoder(tmp_path):
    plain, _ = clip(tmp_path / "vocabulary")
    plain.save_pretrained(tmp_path / "text")
    pretrained = interop.load_pretrained(tmp_path / "text")
    peer, _ = clip(tmp_path / "again")
    peer.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    layers = peft.utils.get_peft_model_state_dict(peer)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", text_encoder_lora_layers=layers,
        text_encoder_lora_adapter_metadata=peer.peft_config["default"].to_dict(),
    )  # fmt: skip
    factors = interop.load_lora(tmp_path / "lora", pretrained, "text_encoder")
    tokens = np.random.default_rng(0).integers(0, 500, (2, 9))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).last_hidden_state.numpy()
    merged = adapters.merged(pretrained.params, factors)
    found = np.asarray(pretrained.network.apply(merged, jnp.asarray(tokens)).hidden)
    error = float(np.abs(found - expected).max())
    assert error <= TOLERANCE
    assert (
        np.abs(found - np.asarray(pretrained.network.apply(pretrained.params, jnp.asarray(tokens)).hidden)).max() > 0.1
    )
    record("adapter", "LoRA of a text encoder", error)


def test_it_is_not_the_peer_that_forgets(tmp_path):
    """The peer alone, with a random adapter, is not the plain network."""
    assert np.abs(theirs(adapted()) - theirs(randomised(unet(12), 3))).max() > 0.1
