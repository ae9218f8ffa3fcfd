"""The encoders of T5, T5 1.1 and UMT5 as transformers stores them, alone or together with their decoders."""

from functools import partial

from diffusion_jax.errors import invalid
from diffusion_jax.interop.clip import BLOCK, text_shapes
from diffusion_jax.interop.family import Family, take
from diffusion_jax.interop.tables import StoredTensor, dense, norm, vector
from diffusion_jax.models import t5_encoder

FEED_FORWARD = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    # Their "gated-gelu" is the tanh form.
    "gated-gelu": ("gelu_tanh", True),
    "gated-relu": ("relu", True),
    "gated-silu": ("silu", True),
}
"""Their `feed_forward_proj`: our activation, and whether it is a gate."""


def _table(module):
    theirs = "encoder.block.{}.layer"
    table = vector("embed/embedding", "shared.weight")
    table |= norm(f"{BLOCK}/attention/norm", f"{theirs}.0.layer_norm", bias=False)
    table |= norm(f"{BLOCK}/mlp/norm", f"{theirs}.1.layer_norm", bias=False)
    table |= norm("norm", "encoder.final_layer_norm", bias=False)
    for ours, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
        table |= dense(f"{BLOCK}/attention/attention/{ours}", f"{theirs}.0.SelfAttention.{name}", bias=False)
    layers = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if module.gated else {"up": "wi", "down": "wo"}
    for ours, name in layers.items():
        table |= dense(f"{BLOCK}/mlp/feed_forward/{ours}", f"{theirs}.1.DenseReluDense.{name}", bias=False)
    relative = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
    if module.shared_bias:
        return table | {"relative_bias/embedding": StoredTensor(relative.replace("{}", "0"))}
    return table | {f"{BLOCK}/attention/relative_bias/embedding": StoredTensor(relative)}


def _fields(config, files, feed_forward, shared_bias):
    take(config, "is_decoder", False, (False,))
    activation, gated = FEED_FORWARD[take(config, "feed_forward_proj", feed_forward, tuple(FEED_FORWARD))]
    return {
        "vocab_size": take(config, "vocab_size", 32128 if shared_bias else 250112),
        "width": take(config, "d_model", 512),
        "depth": take(config, "num_layers", 6 if shared_bias else 8),
        "heads": take(config, "num_heads", 8 if shared_bias else 6),
        "head_dim": take(config, "d_kv", 64),
        "mlp_width": take(config, "d_ff", 2048 if shared_bias else 1024),
        "activation": activation,
        "gated": gated,
        "buckets": take(config, "relative_attention_num_buckets", 32),
        "max_distance": take(config, "relative_attention_max_distance", 128),
        "shared_bias": shared_bias,
        "eps": take(config, "layer_norm_epsilon", 1e-6),
    }


def _config(module):
    kinds = {kind: name for name, kind in FEED_FORWARD.items()}
    kind = (module.activation, module.gated)
    if kind not in kinds:
        raise invalid("activation", module.activation, f"with gated={module.gated} a T5 file cannot say so")
    return {
        "architectures": ["T5EncoderModel" if module.shared_bias else "UMT5EncoderModel"],
        "model_type": "t5" if module.shared_bias else "umt5",
        "vocab_size": module.vocab_size,
        "d_model": module.width,
        "d_kv": module.head_dim,
        "d_ff": module.mlp_width,
        "num_layers": module.depth,
        "num_heads": module.heads,
        "relative_attention_num_buckets": module.buckets,
        "relative_attention_max_distance": module.max_distance,
        "layer_norm_epsilon": module.eps,
        "feed_forward_proj": kinds[kind],
        "is_encoder_decoder": False,
    }


def _family(feed_forward, shared_bias):
    # The embedding is tied: files hold it under one name or under both. Decoders may stand beside it.
    ignored = (r"^decoder\.", r"^lm_head\.")
    aliases = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)
    fields = partial(_fields, feed_forward=feed_forward, shared_bias=shared_bias)
    return Family("transformers", t5_encoder, fields, _table, _config, text_shapes, ignored, aliases)


T5 = {"T5EncoderModel": _family("relu", True), "UMT5EncoderModel": _family("gated-gelu", False)}
