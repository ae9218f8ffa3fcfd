"""The U-Nets of Stable Diffusion equal diffusers' `UNet2DConditionModel`: outputs, gradients, bfloat16, files."""

import numpy as np
import pytest

from diffusion_jax import interop, models
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.families import network_fields

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.peers.comparison import LOW, Case, check_parity, check_true_size, ours, randomised  # noqa: E402

pytestmark = pytest.mark.peers

CROSS = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
LATER = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
SMALL = {
    "block_out_channels": (12, 18),
    "layers_per_block": 1,
    "norm_num_groups": 6,
    "cross_attention_dim": 10,
    "attention_head_dim": (3, 2),
    "down_block_types": CROSS[0],
    "up_block_types": CROSS[1],
}

CASES = {
    # Stable Diffusion 1, with a number of heads that is odd, and a level that is no multiple of the first.
    "sd1": SMALL,
    # XL: several blocks of attention, pooled text and time ids.
    "sdxl": {
        **SMALL,
        "down_block_types": LATER[0],
        "up_block_types": LATER[1],
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 7 + 6 * 4,
    },
    "inpainting": {**SMALL, "in_channels": 9, "resnet_time_scale_shift": "scale_shift", "block_out_channels": (12, 6)},
    "classes": {**SMALL, "num_class_embeds": 5, "mid_block_type": "UNetMidBlock2D", "time_embedding_dim": 20},
    # Stable Diffusion 2 with images for text: linear projections, two residual blocks a level, no middle.
    "unclip": {
        **SMALL,
        "use_linear_projection": True,
        "layers_per_block": 2,
        "attention_head_dim": 3,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 7,
        "mid_block_type": None,
        "out_channels": 8,
    },
    # Distilled: two residual blocks in one level and three in the other, attention of another depth behind each of them
    # and on the way up, where another level attends; half a middle.
    "distilled": {
        **SMALL,
        "layers_per_block": (2, 1),
        "transformer_layers_per_block": ((1, 2), 3),
        "reverse_transformer_layers_per_block": ((2, 1), (1, 3, 1)),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
    },
    # As SSD-1B: the middle has the first depth of the last level.
    "ssd": {
        **SMALL,
        "layers_per_block": 2,
        "use_linear_projection": True,
        "down_block_types": LATER[0],
        "up_block_types": LATER[1],
        "transformer_layers_per_block": (1, (2, 1)),
        "reverse_transformer_layers_per_block": ((1, 2, 1), 1),
    },
    # Latent consistency models are told the scale of guidance.
    "lcm": {**SMALL, "time_cond_proj_dim": 6},
}
T = np.array([7.0, 981.0], np.float32)


def case(name, size=(4, 6)):
    """Inputs for a config of `CASES`."""
    config = CASES[name]
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    cond = {"context": normal(2, 5, 10)}
    if config.get("in_channels", 4) > 4:
        cond["concat"] = normal(2, *size, config["in_channels"] - 4)
    if config.get("num_class_embeds"):
        cond["label"] = np.array([3, 0])
    if "projection_class_embeddings_input_dim" in config:
        cond["pooled"] = normal(2, 7)
    if config.get("addition_embed_type"):
        cond["time_ids"] = np.array([[64.0, 48, 0, 3, 64, 48], [32, 32, 8, 0, 64, 64]], np.float32)
    if config.get("time_cond_proj_dim"):
        cond["guidance_scale"] = np.array([7.5, 1.25], np.float32)
    return Case(
        diffusers.UNet2DConditionModel, config, lambda *args: peer_call(*args, cond), normal(2, *size, 4), T, cond
    )


def peer_arguments(cond, dtype=torch.float32):
    told = {name: torch.tensor(value) for name, value in cond.items()}
    told = {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
    added = {"text_embeds": told.get("pooled"), "time_ids": told.get("time_ids")}
    scale = None
    if "guidance_scale" in told:
        embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
        scale = embed(None, told["guidance_scale"] - 1, 6).to(dtype)
    return {
        "timestep_cond": scale,
        "encoder_hidden_states": told["context"],
        "class_labels": told.get("label", told.get("pooled")),
        "added_cond_kwargs": added,
    }


def peer_call(peer, x, cond, dtype=torch.float32):
    if "concat" in cond:
        x = torch.cat([x, torch.tensor(cond["concat"])], dim=-1)
    y = peer(x.permute(0, 3, 1, 2), torch.tensor(T), **peer_arguments(cond, dtype)).sample
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_the_peers(name, tmp_path):
    one = case(name)
    peer = randomised(one.peer_class(**one.config))
    check_parity(one, peer, tmp_path)


def check_low(found, peers, expected):
    """Arrays computed in bfloat16 are within `LOW` of those in float32, or as near as the peer's own.

    Some thirty layers of random weights, each rounded to eight bits, add up to 0.01 to 0.02 in either library.
    """
    for ours_, theirs, exact in zip(found, peers, expected, strict=True):
        error, other = (float(np.linalg.norm(value - exact) / np.linalg.norm(exact)) for value in (ours_, theirs))
        assert error <= max(LOW, 1.25 * other), (error, other)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_bfloat16_is_as_near_to_float32_as_the_peers(name, tmp_path):
    one = case(name)
    peer = randomised(one.peer_class(**one.config))
    expected = one.peer_call(peer, torch.tensor(one.x)).detach().numpy()
    peer.save_pretrained(tmp_path)
    half = ours(interop.load_pretrained(tmp_path, dtype="bfloat16"), one)(one.x)
    low = torch.tensor(one.x).bfloat16()
    theirs = peer_call(peer.bfloat16(), low, one.cond, torch.bfloat16).float().detach().numpy()
    check_low([half], [theirs], [expected])


def test_the_context_mask_is_the_peers(tmp_path):
    one = case("sd1")
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)

    def call(peer, x):
        arguments = {**peer_arguments(one.cond), "encoder_attention_mask": torch.tensor(mask)}
        return peer(x.permute(0, 3, 1, 2), torch.tensor(T), **arguments).sample.permute(0, 2, 3, 1)

    masked = one._replace(peer_call=call, cond={**one.cond, "context_mask": mask})
    check_parity(masked, randomised(one.peer_class(**one.config)), tmp_path)


# The config.json files of the published folders, without the entries that are the peer's defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **SDXL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
PUBLISHED = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "sdxl_refiner": REFINER}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(name):
    network = check_true_size(diffusers.UNet2DConditionModel, PUBLISHED[name], "UNet2DConditionModel")
    entry = interop.FAMILIES["UNet2DConditionModel"]
    assert network.module == entry.make(name).module
    assert network_fields("UNet2DConditionModel", entry.config(network.module)) == network_fields(
        "UNet2DConditionModel", PUBLISHED[name]
    )


SSD = {
    **SDXL,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
SMALL_SD = {**SD15, "layers_per_block": 1}
TINY_SD = {
    **SMALL_SD,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": None,
}


@pytest.mark.parametrize("config", [SSD, SMALL_SD, TINY_SD, {**SD15, "time_cond_proj_dim": 256}])
def test_names_and_shapes_of_distilled_networks(config):
    network = check_true_size(diffusers.UNet2DConditionModel, config, "UNet2DConditionModel")
    stored = interop.FAMILIES["UNet2DConditionModel"].config(network.module)
    assert network_fields("UNet2DConditionModel", stored) == network_fields("UNet2DConditionModel", config)


def test_inpainting_of_stable_diffusion_has_nine_channels():
    fields = network_fields("UNet2DConditionModel", {**SD15, "in_channels": 9})
    assert (fields["in_channels"], fields["conditions"]) == (4, (models.context("none", 768), models.concat(5)))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"transformer_layers_per_block": [[1], 2]}, "reverse_transformer_layers_per_block is needed"),
        ({"transformer_layers_per_block": [0, 2]}, "transformer_layers_per_block"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"encoder_hid_dim": 16}, "encoder_hid_dim=16"),
        ({"conv_in_kernel": 5}, "conv_in_kernel=5"),
        ({"layers_per_block": [1, 2, 3]}, "layers_per_block"),
        ({"norm_num_groups": 5}, "norm_num_groups=5, but it must divide"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"reverse_transformer_layers_per_block": [[1], [2]]}, "reverse_transformer_layers_per_block"),
    ],
)
def test_options_that_there_are_not_are_told(option, message):
    with pytest.raises(InvalidInput, match=message):
        network_fields("UNet2DConditionModel", {**SMALL, **option})
