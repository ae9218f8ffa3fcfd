"""The one condition encoder of all models: time and condition dict in, conditioning vector and context out."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers.branches import AttentionBranch, MlpBranch, Side, Stack
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import (
    TimeEmbedding,
    VectorEmbedding,
    grid_positions,
    rotary_angles,
    timestep_embedding,
)
from diffusion_jax.models.layers.norms import layer_norm

CONTEXT_PROJECTIONS = ("linear", "mlp", "none")
"""What is done to `cond["context"]`: "linear" and a norm, behind a learned token; "mlp", linear, GELU and linear
(PixArt-alpha); "none", it is attended to as it is."""


class TextEncoder(nn.Module):
    """A small bidirectional transformer over tokens, trained with the model: `[B, M]` int to `[B, M, width]`."""

    vocab_size: int
    width: int
    depth: int = 2
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, mask):
        h = nn.Embed(self.vocab_size, self.width, name="embed")(tokens).astype(self.dtype)
        # The blocks want a conditioning vector; text has no time, so it is one learned vector for all.
        style = self.param("style", nn.initializers.normal(0.02), (self.width,))
        c = jnp.broadcast_to(style, (tokens.shape[0], self.width)).astype(self.dtype)
        angles = rotary_angles(grid_positions(tokens.shape[1]), self.width // self.heads)
        branches = (
            ("attention", partial(AttentionBranch, self.heads, dtype=self.dtype)),
            ("mlp", partial(MlpBranch, dtype=self.dtype)),
        )
        h = Stack(branches, self.depth, name="blocks")(h, c, Side(mask=mask, rotary=jnp.asarray(angles)))
        return layer_norm(h)


class ConditionEncoder(nn.Module):
    """`(t, cond) -> (vector [*prefix, width], context [B, M, width] or None, context_mask or None)`.

    The vector is the sum of the embeddings of time, label, pooled vector, size and mean text; its prefix is that of t.
    The context is the projected sequence and the encoded text one after the other, behind one learned token that is
    always visible: a sample whose masks hide everything (the null condition) attends to that token. The sequence alone
    without that token, as networks on a frozen text encoder have it, is `context_projection` "mlp" or "none"; there a
    sample whose mask hides everything sees its first token.

    width: of the vector and of the context.
    num_classes: number of labels, 0 for none; label `num_classes` is the null class.
    pooled, context, time_ids: whether `cond` has these entries. The sinusoids of the time ids, `id_features` each,
        follow the pooled vector (Podell et al. 2023, section 2.2). pooled_layers: of the embedding of both, 1 or 2.
    vocab_size: of the text's tokens, 0 for no text. text_depth, text_heads: size of its encoder.
    time_features: number of sinusoids of the time. label_std: of the label embeddings at the start.
    frequency_shift: of the sinusoids of the time; see `timestep_embedding`.
    context_projection: a key of `CONTEXT_PROJECTIONS`.
    sizes: whether `cond` has "size" and "aspect"; their three numbers get a third of the width each.
    """

    width: int
    num_classes: int = 0
    pooled: bool = False
    context: bool = False
    vocab_size: int = 0
    text_depth: int = 2
    text_heads: int = 4
    dtype: Any = jnp.float32
    time_features: int = 256
    label_std: float = 0.02
    time_ids: bool = False
    id_features: int = 256
    pooled_layers: int = 1
    frequency_shift: float = 0.0
    context_projection: str = "linear"
    sizes: bool = False

    @property
    def taken(self) -> tuple[str, ...]:
        """The keys of `cond` that this encoder takes."""
        names = ("label",) * bool(self.num_classes) + ("pooled",) * self.pooled + ("time_ids",) * self.time_ids
        names += ("context", "context_mask") * self.context + ("size", "aspect") * self.sizes
        return names + ("tokens", "tokens_mask") * bool(self.vocab_size)

    @nn.compact
    def __call__(self, t, cond):
        cond = check_condition(cond, self.taken)
        batch = t.shape[0]
        vectors, sequences = [], []
        if self.num_classes:
            label = _checked(cond, "label", 1, batch, jnp.integer)
            init = nn.initializers.normal(self.label_std)
            vectors.append(nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="label")(label))
        if self.pooled:
            pooled = _checked(cond, "pooled", 2, batch, jnp.floating)
            if self.time_ids:
                ids = timestep_embedding(_checked(cond, "time_ids", 2, batch, jnp.number), self.id_features)
                pooled = jnp.concatenate([pooled.astype(jnp.float32), ids.reshape(batch, -1)], axis=-1)
            if self.pooled_layers == 1:
                vectors.append(projection(self.width, name="pooled")(pooled))
            else:
                vectors.append(VectorEmbedding(self.width, name="pooled")(pooled))
        if self.sizes:
            vectors.append(self._sizes(cond, batch))
        if self.context and self.context_projection != "linear":
            context = _checked(cond, "context", 3, batch, jnp.floating).astype(self.dtype)
            mask = (
                None if cond.get("context_mask") is None else _nonempty(_mask(cond, "context_mask", context.shape[:2]))
            )
            if self.context_projection == "mlp":
                up = projection(self.width, dtype=self.dtype, name="context_up")(context)
                context = projection(self.width, dtype=self.dtype, name="context_down")(jax.nn.gelu(up))
            return self._vector(t, vectors), context, mask
        if self.context:
            context = _checked(cond, "context", 3, batch, jnp.floating)
            projected = projection(self.width, dtype=self.dtype, name="context")(context)
            sequences.append((layer_norm(projected), _mask(cond, "context_mask", context.shape[:2])))
        if self.vocab_size:
            tokens = _checked(cond, "tokens", 2, batch, jnp.integer)
            mask = _mask(cond, "tokens_mask", tokens.shape)
            text = TextEncoder(self.vocab_size, self.width, self.text_depth, self.text_heads, self.dtype, name="text")(
                tokens, _nonempty(mask)
            )
            weights = mask.astype(jnp.float32)[..., None]
            mean = (text * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)
            vectors.append(projection(self.width, name="text_pooled")(mean))
            sequences.append((text, mask))

        vector = self._vector(t, vectors)
        if not sequences:
            return vector, None, None
        null = self.param("null_token", nn.initializers.normal(0.02), (self.width,))
        null = jnp.broadcast_to(null, (batch, 1, self.width)).astype(self.dtype)
        context = jnp.concatenate([null, *(sequence.astype(self.dtype) for sequence, _ in sequences)], axis=1)
        mask = jnp.concatenate([jnp.ones((batch, 1), bool), *(mask for _, mask in sequences)], axis=1)
        return vector, context, mask

    def _vector(self, t, vectors):
        vector = TimeEmbedding(self.width, self.time_features, self.frequency_shift, name="time")(t)
        for other in vectors:
            vector = vector + other.reshape(t.shape[0], *(1,) * (t.ndim - 1), self.width)
        return vector.astype(self.dtype)

    def _sizes(self, cond, batch):
        size, aspect = _checked(cond, "size", 2, batch, jnp.number), _checked(cond, "aspect", 1, batch, jnp.number)
        if size.shape[1] != 2:
            raise invalid("cond['size'].shape", size.shape, f"{(batch, 2)}, height and width, is needed")
        share = self.width // 3
        size = TimeEmbedding(share, self.time_features, name="size")(size.astype(jnp.float32))
        aspect = TimeEmbedding(share, self.time_features, name="aspect")(aspect.astype(jnp.float32))
        return jnp.concatenate([size.reshape(batch, 2 * share), aspect], axis=-1)


def _checked(cond, name, ndim, batch, kind):
    value = jnp.asarray(cond[name])
    if value.ndim != ndim or value.shape[0] != batch or not jnp.issubdtype(value.dtype, kind):
        expected = f"{ndim} axes of which the first is the batch, {batch}, and dtype {kind.__name__} are needed"
        raise invalid(f"cond[{name!r}]", f"{value.dtype}{list(value.shape)}", expected)
    return value


def _mask(cond, name, shape):
    mask = cond.get(name)
    if mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(mask)
    if mask.shape != tuple(shape):
        raise invalid(f"cond[{name!r}].shape", mask.shape, f"{tuple(shape)} is needed")
    return mask.astype(bool)


def _nonempty(mask):
    """The mask with the first position visible where nothing is, so that no softmax is over nothing."""
    first = jnp.arange(mask.shape[1]) == 0
    return mask | (first & ~mask.any(axis=1, keepdims=True))
