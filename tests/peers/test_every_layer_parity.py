"""PEFT adapts every layer of every family and merges it: its weights, loaded here, are ours with the adapter merged.

Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from diffusion_jax import adapters, interop  # noqa: E402
from diffusion_jax.interop.lora_targets import modules_of  # noqa: E402
from diffusion_jax.models import by_path  # noqa: E402
from tests.peers.comparison import randomised  # noqa: E402
from tests.peers.tiny_pipelines import autoencoder, clip, unet  # noqa: E402

pytestmark = pytest.mark.peers

LEVELS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": (2, 4),
}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4, "sample_size": 8}
VISION = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}
PEERS = {
    "U-Net": lambda folder: unet(12, resnet_time_scale_shift="scale_shift", num_class_embeds=5),
    "U-Net of SDXL": lambda folder: unet(12, **XL),
    "ControlNet": lambda folder: diffusers.ControlNetModel(**LEVELS, conditioning_embedding_out_channels=(4, 8)),
    "DiT": lambda folder: diffusers.DiTTransformer2DModel(**TRANSFORMER, out_channels=8, num_embeds_ada_norm=5),
    "PixArt": lambda folder: diffusers.PixArtTransformer2DModel(
        **TRANSFORMER, out_channels=8, cross_attention_dim=16, caption_channels=12
    ),
    "autoencoder": lambda folder: autoencoder(),
    "CLIP text": lambda folder: clip(folder, projected=True)[0],
    "CLIP vision": lambda folder: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**VISION, intermediate_size=16, projection_dim=6)
    ),
    "DINOv2": lambda folder: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
    "T5": lambda folder: transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=20, d_model=12, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_what_peft_merges(name, tmp_path):
    peer = randomised(PEERS[name](tmp_path / "vocabulary"), 3)
    peer.save_pretrained(tmp_path / "base")
    base = interop.load_pretrained(tmp_path / "base")
    # T5 has one embedding under two names.
    kinds = (torch.nn.Linear, torch.nn.Conv2d, *(() if name == "T5" else (torch.nn.Embedding,)))
    targets = [path for path, module in peer.named_modules() if isinstance(module, kinds)]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(peer, config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    factors = interop.load_lora(tmp_path / "adapter", base)
    expected = by_path(interop.load_pretrained(tmp_path / "merged").params)
    found = by_path(adapters.merged(base.params, factors))
    changed = set()
    for path, leaf in by_path(base.params).items():
        np.testing.assert_allclose(found[path], expected[path], atol=1e-5, err_msg=path)
        changed |= {path} if np.abs(expected[path] - leaf).max() > 1e-3 else set()
    weights = [module.weight for module in modules_of(base).values() if module.weight]
    assert changed >= {slot.path for weight in weights if weight.low_rank for slot in weight.slots}
    if name == "DINOv2":
        # Files have the names of checkpoints, but transformers 5 calls its attention otherwise in memory.
        return
    # Written for PEFT, its merged weights are the same again.
    interop.save_lora(tmp_path / "again", base, jax.tree.map(np.asarray, kernels(factors)), dialect="peft")
    peer = peft.PeftModel.from_pretrained(type(peer).from_pretrained(tmp_path / "base"), tmp_path / "again")
    peer.merge_and_unload().save_pretrained(tmp_path / "twice")
    found = by_path(adapters.merged(base.params, kernels(factors)))
    for path, leaf in by_path(interop.load_pretrained(tmp_path / "twice").params).items():
        np.testing.assert_allclose(leaf, found[path], atol=1e-5, err_msg=path)


def kernels(factors):
    """Without the changes of embeddings, which PEFT has no place for."""
    inner = {name: kernels(entry) if isinstance(entry, dict) else entry for name, entry in factors.items()}
    return {name: entry for name, entry in inner.items() if name in ("a", "b") or (isinstance(entry, dict) and entry)}
