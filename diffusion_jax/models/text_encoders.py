"""Published text encoders: the text half of CLIP, and the encoder half of T5.

Tokens come from the checkpoint's own tokenizer (`interop.load_tokenizer`), weights from `interop.load_pretrained`. The
small text encoder that is trained together with a diffusion network is `conditions.TextEncoder`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.encoders import Encoded, Encoder, check_mask, make_encoder, prenorm_stack
from diffusion_jax.models.layers.branches import Side
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import LookupTable
from diffusion_jax.models.layers.prenorm import RelativeBias, affine_norm

HIGHEST_ID = 2
"""The `eos` of CLIP configs from before the token was written down right: pooled is then the highest id there is."""


def _check_tokens(tokens, limit: int | None = None) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise invalid("tokens", f"{tokens.dtype}{list(tokens.shape)}", "integers [B, N] are needed")
    if limit is not None and tokens.shape[1] > limit:
        raise invalid("tokens.shape", tokens.shape, f"this encoder has {limit} positions: cut the prompts to that")


class CLIPText(nn.Module):
    """The causal transformer of CLIP's text half (Radford et al. 2021, section 2.4).

    positions: the most tokens a prompt may have. mlp_width: hidden width of the feed-forward layers.
    activation: a key of `layers.mlp.ACTIVATIONS`; OpenAI's have "quick_gelu", OpenCLIP's "gelu".
    eps: of the norms. projection: length of the pooled vector; 0 leaves it unprojected, `[B, width]`.
    eos: the token at whose first place the last layer is pooled; 2 means the highest id in the prompt, whichever it is.
    remat: a key of `REMAT`. scan: see `Stack`. dtype: compute dtype.
    """

    vocab_size: int = 49408
    positions: int = 77
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection: int = 0
    eos: int = 49407
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens, mask):
        _check_tokens(tokens, self.positions)
        check_mask(mask, tokens.shape)
        init = nn.initializers.normal(0.02)
        embed = LookupTable(self.vocab_size, self.width, embedding_init=init, name="embed")
        positions = self.param("positions", init, (self.positions, self.width))
        h = embed(tokens) + positions[: tokens.shape[1]]
        last, states = prenorm_stack(self, h, Side(mask=mask), {"causal": True}, {})
        hidden = affine_norm("layer", self.eps)(last)
        end = jnp.argmax(tokens if self.eos == HIGHEST_ID else tokens == self.eos, axis=-1)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        if self.projection:
            layer = projection(self.projection, use_bias=False, dtype=jnp.dtype(self.dtype), name="projection")
            pooled = layer(pooled).astype(jnp.float32)
        return Encoded(hidden, pooled, states)


CLIP_TEXT = {
    "vit_l": {},
    "vit_h": {"width": 1024, "depth": 23, "heads": 16, "mlp_width": 4096, "activation": "gelu"},
    "big_g": {
        "width": 1280, "depth": 32, "heads": 20, "mlp_width": 5120, "activation": "gelu", "projection": 1280,
    },
    "small": {"vocab_size": 1024, "width": 64, "depth": 2, "heads": 2, "mlp_width": 256, "eos": HIGHEST_ID},
}  # fmt: skip
"""Fields of `CLIPText`. Stable Diffusion 1 has `vit_l`, 2 has `vit_h` (one block short of OpenCLIP's 24, as published),
and XL `vit_l` and `big_g`. `small` is for trying things out."""


def clip_text(preset: str = "vit_l", **fields: Any) -> Encoder:
    """The text half of CLIP: a preset of `CLIP_TEXT`, and any fields of `CLIPText` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    return make_encoder(CLIPText, CLIP_TEXT, preset, fields, "clip_text")


class T5(nn.Module):
    """The encoder of T5 (Raffel et al. 2020) and its version 1.1: RMS norms, no biases, logits q k^T + relative bias.

    head_dim: channels of a head; `heads * head_dim` need not be the width. gated: version 1.1's feed-forward layers.
    buckets, max_distance: of the relative positions, see `relative_buckets`.
    shared_bias: whether all blocks share the relative bias of the first; UMT5's have one each.
    The other fields are those of `CLIPText`. There is no pooled vector.
    """

    vocab_size: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10240
    activation: str = "gelu_tanh"
    gated: bool = True
    buckets: int = 32
    max_distance: int = 128
    shared_bias: bool = True
    eps: float = 1e-6
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens, mask):
        _check_tokens(tokens)
        check_mask(mask, tokens.shape)
        h = LookupTable(self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="embed")(tokens)
        bias = None
        if self.shared_bias:
            bias = RelativeBias(self.heads, self.buckets, self.max_distance, name="relative_bias")(tokens.shape[1])
        attention = {"norm": "rms", "bias": False, "head_dim": self.head_dim, "scaled": False}
        if not self.shared_bias:
            attention |= {"buckets": self.buckets, "max_distance": self.max_distance}
        mlp = {"norm": "rms", "bias": False, "gated": self.gated}
        last, states = prenorm_stack(self, h, Side(mask=mask, bias=bias), attention, mlp)
        return Encoded(affine_norm("rms", self.eps)(last), None, states)


T5_ENCODER = {
    "v1_1_small": {"width": 512, "depth": 8, "heads": 6, "mlp_width": 1024},
    "v1_1_base": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 2048},
    "v1_1_large": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 2816},
    "xl": {"width": 2048, "depth": 24, "heads": 32, "mlp_width": 5120},
    "xxl": {},
    "umt5_xxl": {"vocab_size": 256384, "shared_bias": False},
    "small": {"vocab_size": 1024, "width": 64, "depth": 2, "heads": 2, "head_dim": 16, "mlp_width": 128},
}
"""Fields of `T5`. PixArt, Stable Diffusion 3 and FLUX have `xxl`. `small` is for trying things out."""


def t5_encoder(preset: str = "xxl", **fields: Any) -> Encoder:
    """The encoder of T5: a preset of `T5_ENCODER`, and any fields of `T5` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist, and for float16, whose range T5 exceeds.
    """
    made = make_encoder(T5, T5_ENCODER, preset, fields, "t5_encoder")
    if made.module.buckets < 4 or made.module.buckets % 4:
        raise invalid("buckets", made.module.buckets, "a multiple of 4 is needed")
    if made.module.dtype == "float16":
        raise invalid("dtype", "float16", "T5's feed-forward layers exceed its range: use bfloat16 or float32")
    return made
