"""The encoders of T5, T5 1.1 and UMT5 as transformers stores them, alone or together with their decoders."""

from functools import partial

from diffusion_jax.interop.clip import ACTIVATIONS, BLOCK, IRRELEVANT, text_shapes, their_activation
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.tables import StoredTensor, dense, norm, vector
from diffusion_jax.models import t5_encoder

SYNONYMS = {
    "head_dim": "d_kv",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
}
"""What transformers calls these sizes in other classes, and reads here too."""

OTHERS = (
    *IRRELEVANT,
    "classifier_dropout",
    "dropout_rate",
    "eos_token_id",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "scalable_attention",
    "scale_decoder_outputs",
    "tokenizer_class",
    "use_cache",
)
"""What is for training or for decoders, and what files still say that no class reads."""


def feed_forward(config: Fields, default: str) -> tuple[str, bool]:
    """Our activation, and whether it is a gate: "gated-gelu" is the tanh form, and what two further fields say counts
    more, as it does for the peer."""
    said = config.text("feed_forward_proj", default)
    gated, _, name = said.rpartition("-")
    gelu = "gelu_new" if said == "gated-gelu" else name
    if gated not in ("", "gated") or gelu not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise config.wrong("feed_forward_proj", f"one of {names}, alone or after 'gated-', can be loaded")
    known = ACTIVATIONS[config.choice("dense_act_fn", tuple(ACTIVATIONS), gelu)]
    return known, config.flag("is_gated_act", bool(gated))


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


def _fields(config, files, proj, shared_bias):
    config.choice("is_decoder", (False,))
    activation, gated = feed_forward(config, proj)
    return {
        "vocab_size": config.whole("vocab_size", 32128 if shared_bias else 250112),
        "width": config.whole("d_model", 512),
        "depth": config.layers("num_layers", 6 if shared_bias else 8),
        "heads": config.whole("num_heads", 8 if shared_bias else 6),
        "head_dim": config.whole("d_kv", 64),
        "mlp_width": config.whole("d_ff", 2048 if shared_bias else 1024),
        "activation": activation,
        "gated": gated,
        "buckets": config.whole("relative_attention_num_buckets", 32, least=4),
        "max_distance": config.whole("relative_attention_max_distance", 128),
        "shared_bias": shared_bias,
        "eps": config.number("layer_norm_epsilon", 1e-6, least=0.0),
    }


def _config(module):
    name = their_activation(module.activation)
    kind = "gated-" * module.gated + name
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
        "feed_forward_proj": "gated-gelu" if kind == "gated-gelu_new" else kind,
        "dense_act_fn": name,
        "is_gated_act": module.gated,
        "is_encoder_decoder": False,
    }


def _family(proj, shared_bias):
    # The embedding is tied: files hold it under one name or under both. Decoders may stand beside it.
    ignored = (r"^decoder\.", r"^lm_head\.")
    aliases = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)
    fields = partial(_fields, proj=proj, shared_bias=shared_bias)
    return Family(
        "transformers",
        t5_encoder,
        fields,
        _table,
        _config,
        text_shapes,
        ignored,
        aliases,
        irrelevant=OTHERS,
        synonyms=SYNONYMS,
    )


T5 = {"T5EncoderModel": _family("relu", True), "UMT5EncoderModel": _family("gated-gelu", False)}
