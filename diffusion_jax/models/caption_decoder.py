"""Text from continuous latents: a causal transformer that reads them as a prefix (UniDiffuser, Bao et al. 2023).

An encoder's hidden vectors `[B, M, D]` become latents `[B, M, Z]`, short enough for a diffusion model, by one linear
layer; the decoder begins with them and writes tokens one by one. The encoder stays as it is. The loss that trains both
is `objectives.caption_loss`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.encoders import prenorm_stack
from diffusion_jax.models.layers.branches import REMAT, Side
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import LookupTable
from diffusion_jax.models.layers.mlp import ACTIVATIONS
from diffusion_jax.models.layers.prenorm import affine_norm
from diffusion_jax.models.network import check_dtype, make_module


class CaptionDecoder(nn.Module):
    """Logits `[B, length, V]` of each token from the latents `[B, M, Z]` and the tokens before it.

    vocab_size: V; the decoder knows a further token, which begins every text. length: tokens of a text.
    The other fields are those of `CLIPText`.
    """

    vocab_size: int
    length: int
    width: int = 64
    depth: int = 2
    heads: int = 2
    mlp_width: int = 256
    activation: str = "gelu"
    eps: float = 1e-5
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, latents, tokens):
        init = nn.initializers.normal(0.02)
        begin = jnp.full_like(tokens[:, :1], self.vocab_size)
        before = jnp.concatenate([begin, tokens[:, :-1]], axis=1)
        embedded = LookupTable(self.vocab_size + 1, self.width, embedding_init=init, name="embed")(before)
        h = jnp.concatenate([projection(self.width, name="prefix")(latents), embedded], axis=1)
        h = h + self.param("positions", init, h.shape[1:])
        last, _ = prenorm_stack(self, h, Side(), {"causal": True}, {})
        return projection(self.vocab_size, name="head")(affine_norm("layer", self.eps)(last[:, -self.length :]))


class Captioner(NamedTuple):
    """Text as latents, as pure functions.

    init:   (key, hidden [B, M, D]) -> params
    encode: (params, hidden) -> latents [B, M, Z]
    logits: (params, latents, tokens) -> [B, N, V], of each token given the latents and the tokens before it
    decode: (params, latents) -> tokens [B, N], the likeliest one at each place, one after the other
    """

    init: Callable[..., Any]
    encode: Callable[..., Any]
    logits: Callable[..., Any]
    decode: Callable[..., Any]
    module: Any = None


def caption_decoder(vocab_size: int, length: int, latent_channels: int = 8, **fields: Any) -> Captioner:
    """A captioner with latents of Z = `latent_channels` and any fields of `CaptionDecoder`.

    Raises InvalidInput for a field or value that does not exist.
    """
    module = make_module(CaptionDecoder, "caption_decoder", {}, fields, vocab_size, length)
    for name in ("vocab_size", "length", "width", "depth", "heads", "mlp_width"):
        if getattr(module, name) < 1:
            raise invalid(name, getattr(module, name), "it must be a positive integer")
    if module.width % module.heads:
        raise invalid("width", module.width, f"it must divide by the number of heads, {module.heads}")
    for name, valid in (("activation", ACTIVATIONS), ("remat", REMAT)):
        if getattr(module, name) not in valid:
            raise unknown(name, getattr(module, name), valid)
    check_dtype(module.dtype)
    compress = projection(latent_channels)

    @jax.jit
    def init(key, hidden):
        first, second = jax.random.split(key)
        latents, params = compress.init_with_output(first, hidden)
        tokens = jnp.zeros((len(hidden), length), jnp.int32)
        return {"compress": params["params"], "decoder": module.init(second, latents, tokens)["params"]}

    def encode(params, hidden):
        return compress.apply({"params": params["compress"]}, hidden)

    def logits(params, latents, tokens):
        return module.apply({"params": params["decoder"]}, latents, tokens)

    def decode(params, latents):
        def write(tokens, place):
            # What stands at `place` and behind it is not seen: the decoder is causal.
            return tokens.at[:, place].set(logits(params, latents, tokens)[:, place].argmax(-1)), None

        blank = jnp.zeros((latents.shape[0], length), jnp.int32)
        return jax.lax.scan(write, blank, jnp.arange(length))[0]

    return Captioner(init, encode, logits, decode, module)
