"""PixArt-alpha and PixArt-Sigma against diffusers, in folders of random weights.

Needs the peers extra: `make test-peers`.
"""

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

ALPHA = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 2,
    "in_channels": 3,
    "out_channels": 6,
    "patch_size": 2,
    "sample_size": 8,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "use_additional_conditions": True,
}
SIGMA = {
    **ALPHA,
    "num_layers": 3,
    "sample_size": 128,
    "in_channels": 2,
    "out_channels": 2,
    "use_additional_conditions": False,
    "attention_bias": False,
    "norm_eps": 1e-2,
}
BARE = {**ALPHA, "cross_attention_dim": 7, "caption_channels": None, "patch_size": 1, "interpolation_scale": 3}


def case(config, height, width, masked=True):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, height, width, config["in_channels"])).astype(np.float32)
    t = np.array([0.0, 999.0, 431.0], np.float32)
    captions = rng.normal(size=(3, 5, config["caption_channels"] or config["cross_attention_dim"])).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    size, aspect = np.array([[1024.0, 512.0]] * 3, np.float32), np.array([2.0, 0.5, 1.0], np.float32)

    def call(peer, x):
        added = {"resolution": torch.tensor(size), "aspect_ratio": torch.tensor(aspect)}
        y = peer(
            x.permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(captions),
            encoder_attention_mask=torch.tensor(mask) if masked else None,
            timestep=torch.tensor(t),
            added_cond_kwargs=added if config["use_additional_conditions"] else None,
        ).sample
        return y.permute(0, 2, 3, 1)

    cond = {"context": captions}
    if masked:
        cond["context_mask"] = mask
    if config["use_additional_conditions"]:
        cond |= {"size": size, "aspect": aspect}
    return Case(diffusers.PixArtTransformer2DModel, config, call, x, t, cond)


@pytest.mark.parametrize(
    ("config", "size", "masked", "scale"),
    [(ALPHA, (8, 8), True, 1.0), (SIGMA, (4, 10), False, 2.0), (BARE, (3, 5), True, 3.0)],
)
def test_outputs_gradients_and_the_way_back(config, size, masked, scale, tmp_path):
    peer = randomised(diffusers.PixArtTransformer2DModel(**config))
    pretrained, _ = check_parity(case(config, *size, masked), peer, tmp_path, low=config is BARE)
    assert pretrained.network.module.interpolation_scale == scale


def test_folders_of_the_first_release(tmp_path):
    """They name the class that came before, and hold a caption that the network does not read."""
    example = case(ALPHA, 8, 6)
    peer = randomised(diffusers.PixArtTransformer2DModel(**ALPHA))
    peer.save_pretrained(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    config.write_text(config.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    save_file({**load_file(file), "caption_projection.y_embedding": np.zeros((5, 10), np.float32)}, file)
    pretrained = interop.load_pretrained(tmp_path)
    with torch.no_grad():
        expected = example.peer_call(peer, torch.tensor(example.x))
    np.testing.assert_allclose(ours(pretrained, example)(example.x), expected, atol=TOLERANCE)


ALPHA_XL = {"sample_size": 64, "caption_channels": 4096}
SIGMA_XL = {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False}


@pytest.mark.parametrize(
    ("config", "sizes", "scale"),
    [(ALPHA_XL, False, 1.0), ({**ALPHA_XL, "sample_size": 128}, True, 2.0), (SIGMA_XL, False, 2.0)],
    ids=["alpha-512", "alpha-1024", "sigma-1024"],
)
def test_true_sizes(config, sizes, scale):
    network = check_true_size(diffusers.PixArtTransformer2DModel, config, "PixArtTransformer2DModel")
    module = network.module
    conditions = (models.context("mlp", 4096), *(models.sizes(),) * sizes)
    assert (module.conditions, module.interpolation_scale, module.learn_sigma) == (conditions, scale, True)
    assert (module.width, module.depth, module.heads) == SIZES["XL"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention_type": "gated"}, "attention_type='gated'"),
        ({"cross_attention_dim": 9}, "cross_attention_dim=9"),
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm'"),
    ],
)
def test_options_that_are_not_there_are_named(option, message):
    with pytest.raises(InvalidInput, match=message):
        network_fields("PixArtTransformer2DModel", {**ALPHA, **option})
