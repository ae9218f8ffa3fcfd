"""DINOv2, with and without registers, as transformers stores it."""

from functools import partial

from diffusion_jax.errors import invalid
from diffusion_jax.interop.clip import (
    BLOCK,
    IRRELEVANT,
    activation,
    image_shapes,
    patch_embedding,
    picture_fields,
    their_activation,
)
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import MOST
from diffusion_jax.interop.tables import dense, norm, vector
from diffusion_jax.models import dinov2


def _table(module):
    theirs = "encoder.layer.{}"
    table = vector("class_token", "embeddings.cls_token", layout="1 1 d -> d")
    table |= vector("positions", "embeddings.position_embeddings", layout="1 n d -> n d")
    if module.mask_token:
        table |= vector("mask_token", "embeddings.mask_token", layout="1 d -> d")
    if module.registers:
        table |= vector("registers", "embeddings.register_tokens", layout="1 n d -> n d")
    table |= patch_embedding(module, "embeddings.patch_embeddings.projection") | norm("norm", "layernorm")
    for branch, number in (("attention", 1), ("mlp", 2)):
        table |= norm(f"{BLOCK}/{branch}/norm", f"{theirs}.norm{number}")
        table |= vector(f"{BLOCK}/{branch}/layer_scale", f"{theirs}.layer_scale{number}.lambda1")
    for ours, name in (("q", "query"), ("k", "key"), ("v", "value")):
        attention = f"{theirs}.attention.attention.{name}"
        table |= dense(f"{BLOCK}/attention/attention/{ours}", attention, bias=module.qkv_bias)
    table |= dense(f"{BLOCK}/attention/attention/out", f"{theirs}.attention.output.dense")
    feed_forward = f"{BLOCK}/mlp/feed_forward"
    if not module.gated:
        return (
            table
            | dense(f"{feed_forward}/up", f"{theirs}.mlp.fc1")
            | dense(f"{feed_forward}/down", f"{theirs}.mlp.fc2")
        )
    for part, ours in enumerate(("gate", "up")):
        table |= dense(f"{feed_forward}/{ours}", f"{theirs}.mlp.weights_in", part=part, parts=2)
    return table | dense(f"{feed_forward}/down", f"{theirs}.mlp.weights_out")


OTHERS = (
    *IRRELEVANT,
    "apply_layernorm",
    "drop_path_rate",
    "layerscale_value",
    "out_features",
    "out_indices",
    "reshape_hidden_states",
    "stage_names",
)
"""What is for training or initialisation, and what is for the peer's backbones, which are other classes."""


def _hidden(width: int, ratio: int | float, gated: bool) -> int:
    """Two thirds of the hidden width, rounded up to a multiple of 8, where it is gated."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _fields(config, files, registers):
    width, gated = config.whole("hidden_size", 768), config.flag("use_swiglu_ffn", False)
    heads = config.whole("num_attention_heads", 12)
    if width % heads:
        raise config.wrong("num_attention_heads", f"it must divide hidden_size, {width}")
    activated = activation(config, "hidden_act", "gelu")
    hidden = _hidden(width, config.positive("mlp_ratio", 4), gated)
    if not 1 <= hidden <= MOST:
        raise config.wrong("mlp_ratio", f"times hidden_size, {width}, it must come to a width from 1 to {MOST}")
    return {
        **picture_fields(config, 16 if registers else 14),
        "width": width,
        "depth": config.layers("num_hidden_layers", 12),
        "heads": heads,
        "mlp_width": hidden,
        "activation": "silu" if gated else activated,
        "gated": gated,
        "eps": config.number("layer_norm_eps", 1e-6, least=0.0),
        "qkv_bias": config.flag("qkv_bias", True),
        "registers": config.whole("num_register_tokens", 4) if registers else 0,
        "mask_token": registers or config.flag("use_mask_token", True),
        "antialias": registers,
    }


def _config(module):
    registers = module.registers > 0
    expected = {"layer_scale": True, "patch_bias": True, "pre_norm": False, "norm_tokens": True, "projection": 0}
    for name, value in {**expected, "antialias": registers}.items():
        if getattr(module, name) != value:
            raise invalid(name, getattr(module, name), f"such a Dinov2Model has {name}={value!r}")
    ratio = next((r for r in range(1, 33) if _hidden(module.width, r, module.gated) == module.mlp_width), None)
    if ratio is None:
        raise invalid("mlp_width", module.mlp_width, f"a Dinov2Model has a multiple of its width, {module.width}")
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "image_size": module.image_size,
        "patch_size": module.patch,
        "num_channels": module.channels,
        "hidden_size": module.width,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu" if module.gated else their_activation(module.activation),
        "use_swiglu_ffn": module.gated,
        "layer_norm_eps": module.eps,
        "qkv_bias": module.qkv_bias,
    }
    if registers:
        return {**config, "num_register_tokens": module.registers}
    return {**config, "use_mask_token": module.mask_token}


ALIASES = tuple(
    (rf"(layer\.\d+\.attention)\.{new}\.", rf"\1.{stored}.")
    for new, stored in {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }.items()
)
"""What transformers 5 calls attention in memory, and so PEFT in its files; checkpoints keep the names of before."""


def _family(registers):
    fields = partial(_fields, registers=registers)
    return Family("transformers", dinov2, fields, _table, _config, image_shapes, aliases=ALIASES, irrelevant=OTHERS)


DINOV2 = {"Dinov2Model": _family(False), "Dinov2WithRegistersModel": _family(True)}
