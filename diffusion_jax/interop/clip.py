"""CLIP's text and image encoders as transformers stores them, with and without their projections.

What the tables of T5 and DINOv2 share with these is here too: the names of activations, the shapes of encoders.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.interop.dit import PATCHES
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.tables import StoredTensor, TensorTable, dense, norm, vector
from diffusion_jax.models import Encoder, clip_text, clip_vision

BLOCK = "blocks/block"

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their names of activations, and ours."""


IRRELEVANT = (
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "dropout",
    "dtype",
    "hidden_dropout_prob",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "logit_scale_init_value",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "tie_word_embeddings",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
    "use_return_dict",
)
"""Fields of transformers that change nothing of what an encoder computes: training alone, initialisation, heads and
decoders beside it, and how the peer hands results over."""


def activation(config: Fields, name: str, default: str) -> str:
    """Our name of the activation that `config[name]` says."""
    return ACTIVATIONS[config.choice(name, tuple(ACTIVATIONS), default)]


def their_activation(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def patch_embedding(module: Any, theirs: str) -> TensorTable:
    """`patch_embed` of a `VisionTransformer` from a convolution whose stride is its size."""
    sizes = (("p", module.patch), ("q", module.patch))
    table = {"patch_embed/kernel": StoredTensor(f"{theirs}.weight", PATCHES, sizes=sizes)}
    return table | (vector("patch_embed/bias", f"{theirs}.bias") if module.patch_bias else {})


def text_shapes(network: Encoder) -> Any:
    """The parameters of a text encoder; nothing is allocated."""
    return jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))


def image_shapes(network: Encoder) -> Any:
    """The parameters of a vision encoder; nothing is allocated."""
    module = network.module
    image = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, module.channels), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), image)


def _block(prefix: str) -> TensorTable:
    """Blocks of either half; `prefix` is where they stand."""
    theirs = f"{prefix}.encoder.layers.{{}}"
    table = norm(f"{BLOCK}/attention/norm", f"{theirs}.layer_norm1") | norm(
        f"{BLOCK}/mlp/norm", f"{theirs}.layer_norm2"
    )
    for name in ("q", "k", "v", "out"):
        table |= dense(f"{BLOCK}/attention/attention/{name}", f"{theirs}.self_attn.{name}_proj")
    table |= dense(f"{BLOCK}/mlp/feed_forward/up", f"{theirs}.mlp.fc1")
    return table | dense(f"{BLOCK}/mlp/feed_forward/down", f"{theirs}.mlp.fc2")


def _text_table(module):
    table = vector("embed/embedding", "text_model.embeddings.token_embedding.weight")
    table |= vector("positions", "text_model.embeddings.position_embedding.weight")
    table |= _block("text_model") | norm("norm", "text_model.final_layer_norm")
    return table | (dense("projection", "text_projection", bias=False) if module.projection else {})


def _vision_table(module):
    table = vector("class_token", "vision_model.embeddings.class_embedding")
    table |= vector("positions", "vision_model.embeddings.position_embedding.weight")
    table |= patch_embedding(module, "vision_model.embeddings.patch_embedding") | _block("vision_model")
    # Their name, spelt as it is in every file.
    table |= norm("norm_in", "vision_model.pre_layrnorm") | norm("norm", "vision_model.post_layernorm")
    return table | (dense("projection", "visual_projection", bias=False) if module.projection else {})


def _sizes(config: Fields, width: int, depth: int, heads: int, mlp_width: int, projected: bool) -> dict[str, Any]:
    """What both halves say alike; the numbers are the peer's defaults."""
    projection = config.whole("projection_dim", 512) if projected else config.raw("projection_dim")
    fields = {
        "width": config.whole("hidden_size", width),
        "depth": config.layers("num_hidden_layers", depth),
        "heads": config.whole("num_attention_heads", heads),
        "mlp_width": config.whole("intermediate_size", mlp_width),
        "activation": activation(config, "hidden_act", "quick_gelu"),
        "eps": config.number("layer_norm_eps", 1e-5, least=0.0),
        "projection": projection if projected else 0,
    }
    if fields["width"] % fields["heads"]:
        raise config.wrong("num_attention_heads", f"it must divide hidden_size, {fields['width']}")
    return fields


def _half(config: Fields, name: str) -> Fields:
    """The config of one half, where the file is that of both."""
    part = config.section(name)
    config.known |= {"text_config", "vision_config"}
    if not part.values:
        return config
    source = part.source
    return Fields({**config.values, **part.values}, source, config.most_layers)


def _text_fields(config, files, projected):
    config = _half(config, "text_config")
    eos = config.raw("eos_token_id", 49407)
    if not isinstance(eos, int) or isinstance(eos, bool):
        raise config.wrong("eos_token_id", "one token is needed")
    return {
        **_sizes(config, 512, 12, 8, 2048, projected),
        "vocab_size": config.whole("vocab_size", 49408),
        "positions": config.whole("max_position_embeddings", 77),
        "eos": config.whole("eos_token_id", 49407, least=0),
    }


def _vision_fields(config, files, projected):
    config = _half(config, "vision_config")
    return {**_sizes(config, 768, 12, 12, 3072, projected), **picture_fields(config, 32)}


def picture_fields(config: Fields, patch: int) -> dict[str, int]:
    """What the configs of vision encoders say of the images that they take; patch: the peer's default."""
    fields = {
        "image_size": config.square("image_size", 224),
        "patch": config.square("patch_size", patch),
        "channels": config.whole("num_channels", 3),
    }
    if fields["patch"] > fields["image_size"]:
        raise config.wrong("patch_size", f"image_size is {fields['image_size']}")
    return fields


def _config(module, name, model_type):
    return {
        "architectures": [name + ("WithProjection" if module.projection else "")],
        "model_type": model_type,
        "hidden_size": module.width,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.heads,
        "intermediate_size": module.mlp_width,
        "hidden_act": their_activation(module.activation),
        "layer_norm_eps": module.eps,
        "projection_dim": module.projection or module.width,
    }


def _text_config(module):
    return {
        **_config(module, "CLIPTextModel", "clip_text_model"),
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.positions,
        "eos_token_id": module.eos,
    }


def _vision_config(module):
    for name, expected in (("pre_norm", True), ("norm_tokens", False), ("layer_scale", False), ("registers", 0)):
        if getattr(module, name) != expected:
            raise invalid(name, getattr(module, name), f"a CLIPVisionModel has {name}={expected!r}")
    return {
        **_config(module, "CLIPVisionModel", "clip_vision_model"),
        "image_size": module.image_size,
        "patch_size": module.patch,
        "num_channels": module.channels,
    }


_HEADS = (r"(^|\.)position_ids$", r"^logit_scale$")


def _text_family(projected):
    # One file may hold both halves; one that was written by transformers 5 lacks the first word of its names.
    others = (r"^vision_model\.", r"^visual_projection\.") + (() if projected else (r"^text_projection\.",))
    aliases = ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),)
    fields = partial(_text_fields, projected=projected)
    return Family(
        "transformers",
        clip_text,
        fields,
        _text_table,
        _text_config,
        text_shapes,
        (*_HEADS, *others),
        aliases,
        irrelevant=IRRELEVANT,
    )


def _vision_family(projected):
    others = (r"^text_model\.", r"^text_projection\.") + (() if projected else (r"^visual_projection\.",))
    aliases = ((r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),)
    fields = partial(_vision_fields, projected=projected)
    return Family(
        "transformers",
        clip_vision,
        fields,
        _vision_table,
        _vision_config,
        image_shapes,
        (*_HEADS, *others),
        aliases,
        irrelevant=(*IRRELEVANT, "eos_token_id"),
    )


CLIP = {
    "CLIPTextModel": _text_family(False),
    "CLIPTextModelWithProjection": _text_family(True),
    "CLIPVisionModel": _vision_family(False),
    "CLIPVisionModelWithProjection": _vision_family(True),
}
