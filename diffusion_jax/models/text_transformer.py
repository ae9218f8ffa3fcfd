"""Bidirectional transformer over tokens, for discrete diffusion: tokens `[B, N]` in, logits `[B, N, V]` out."""

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.anatomy import transformer_anatomy
from diffusion_jax.models.layers.branches import Stack, modulated_output, transformer_branches
from diffusion_jax.models.layers.conditioning import ConditionEncoder, ConditionStream, check_streams
from diffusion_jax.models.layers.embeddings import LookupTable, grid_positions, rotary_angles
from diffusion_jax.models.network import check_fields, check_transformer, network
from diffusion_jax.typing import Network


class TextTransformer(nn.Module):
    """Logits of the clean tokens from `tokens [B, N]`, times `[B]` or `[B, N]` and `cond`.

    vocab_size: V; ids 0 .. V - 1 are words, and id V is the absorbing mask, which has an embedding but no logit.
    Positions are rotary. The other fields are those of `DiT`.
    """

    vocab_size: int = 256
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    swiglu: bool = False
    conditions: tuple[ConditionStream, ...] = ()
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    takes = ("vector", "context", "tokens", "layers")

    @nn.compact
    def __call__(self, tokens, t, cond, train):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise invalid("x", f"{tokens.dtype}{list(tokens.shape)}", "integer tokens [B, N] are needed")
        if t.shape not in (tokens.shape[:1], tokens.shape):
            raise invalid("t.shape", t.shape, f"tokens {tokens.shape} take a time per sample or per token")
        dtype = jnp.dtype(self.dtype)
        embed = LookupTable(self.vocab_size + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        h = embed(tokens).astype(dtype)
        rotary = jnp.asarray(rotary_angles(grid_positions(tokens.shape[1]), self.width // self.heads))
        encoder = ConditionEncoder(self.width, self.conditions, self.depth, dtype, name="condition")
        conditioned = encoder(t, cond, (*tokens.shape, 1))
        h, c, rotary, joined = conditioned.prepend_tokens(h, conditioned.vector, rotary)
        branches = transformer_branches(
            self.heads, self.qk_norm, self.mlp_ratio, self.swiglu, dtype, crossed=conditioned.context is not None
        )
        stack = Stack(conditioned.block_branches(branches), self.depth, self.remat, self.scan, name="blocks")
        h = stack(h, c, conditioned.side(h, rotary=rotary))[:, joined:]
        logits = modulated_output(h, conditioned.vector, self.vocab_size, dtype)
        return logits.astype(jnp.float32), {}


def text_transformer(
    vocab_size: int = 256,
    *,
    width: int = 256,
    depth: int = 6,
    heads: int = 4,
    mlp_ratio: float = 4.0,
    qk_norm: bool = False,
    swiglu: bool = False,
    conditions: tuple[ConditionStream, ...] = (),
    remat: str = "none",
    scan: bool = True,
    dtype: str = "float32",
) -> Network:
    """A bidirectional transformer over tokens; see `TextTransformer`. Raises InvalidInput for sizes that do not fit."""
    if not isinstance(vocab_size, int) or vocab_size < 2:
        raise invalid("vocab_size", vocab_size, "it must be an integer of at least 2")
    check_fields("text_transformer", TextTransformer, {"vocab_size": vocab_size, "width": width, "depth": depth})
    conditions = check_streams("text_transformer", conditions, TextTransformer.takes)
    module = TextTransformer(
        vocab_size, width, depth, heads, mlp_ratio, qk_norm, swiglu, conditions, remat, scan, dtype
    )
    check_transformer(module)
    return network(module, transformer_anatomy(module, axes=2))
