"""Attention on `[B, N, H, D]`: one function that picks layout, chunking and kernel per backend, and two submodules.

`Attend` is the inner product attention alone, a module of its own so that its queries, keys, values and maps can be
read and replaced by interception. `Attention` is the multi-head layer around it. Residual branches are in `branches`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import rotate
from diffusion_jax.models.layers.norms import RMSNorm

TILE = 2**21
"""Most logits a CPU holds at once: beyond, heads are taken one by one, and within a head queries in chunks, so that a
tile stays in the last-level cache (measured on one core at `[2, 1024, 16, 72]`: 78 ms by heads, 118 ms by chunks of the
queries of all heads, and 328 against 516 ms with the gradient)."""

ATTENDED = "attended"
"""The name by which policies of rematerialisation know what `Attend` returns."""


def key_mask(mask: Bool[Array, "B M"] | None) -> Bool[Array, "B 1 1 M"] | None:
    """Which keys are visible to every query and head, `[B, M]`, as an attention mask."""
    return None if mask is None else mask[:, None, None, :]


def attention_probabilities(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    mask: Bool[Array, "#B #H #N M"] | None = None,
    bias: Float[Array, "#B #H #N M"] | None = None,
) -> Float[Array, "B H N M"]:
    """softmax(q k^T / sqrt(D) + bias) in float32: the map that `dot_product_attention` applies without keeping it."""
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def dot_product_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    mask: Bool[Array, "#B #H #N M"] | None = None,
    bias: Float[Array, "#B #H #N M"] | None = None,
) -> Float[Array, "B N H D"]:
    """softmax(q k^T / sqrt(D) + bias) v, with the softmax in float32.

    mask: True where a query may see a key; every query must see at least one. bias: added to the float32 logits, as
    relative positions are; no fused kernel is used then.
    On CPUs: by heads and chunks of queries (`TILE`), recomputed in the backward pass. On NVIDIA GPUs: the fused
    cuDNN kernel where it exists (bfloat16 or float16, D <= 128 and a multiple of 8). Elsewhere: XLA's.
    """
    if jax.default_backend() == "cpu":
        return _heads_first(q, k, v, mask, bias)
    if bias is not None:
        return jax.nn.dot_product_attention(q, k, v, bias.astype(jnp.float32), mask, implementation="xla")
    fused = _has_fused_kernels() and q.dtype in (jnp.bfloat16, jnp.float16)
    fused = fused and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    # cuDNN's masked kernels want even lengths.
    fused = fused and (mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if fused else "xla")


def _has_fused_kernels() -> bool:
    """cuDNN's flash attention needs an NVIDIA GPU of compute capability 8.0 or more."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return jax.default_backend() == "gpu" and str(capability)[0].isdigit() and float(capability) >= 8.0


def _heads_first(q, k, v, mask, bias):
    q, k, v = (a.transpose(2, 0, 1, 3) for a in (q * q.shape[-1] ** -0.5, k, v))
    heads, batch, length, _ = q.shape
    seen = tuple(None if a is None else a.transpose(1, 0, 2, 3) for a in (mask, bias))
    if heads * batch * length * k.shape[2] <= TILE:
        return _attend_tile(q, k, v, *seen).transpose(1, 2, 0, 3)
    return _mapped(_in_chunks, (q, k, v), seen).transpose(1, 2, 0, 3)


def _mapped(function, parts, seen):
    """`lax.map` of `function(*parts, *seen)` over first axes; of `seen`, mask and bias, that axis may have length 1."""
    own = tuple(None if a is None or len(a) == 1 else a for a in seen)

    def each(item):
        part, own = item
        return function(*part, *(a if given is None or a is not None else given[0] for a, given in zip(own, seen)))

    return jax.lax.map(each, (parts, own))


def _in_chunks(q, k, v, mask, bias):
    """Attention of one head, `[B, N, D]`, in chunks of queries; each is recomputed in the backward pass."""
    batch, length, _ = q.shape
    tile = jax.checkpoint(_attend_tile, prevent_cse=False)
    chunk = _chunk(length, TILE // (batch * k.shape[1]))
    if chunk == length:
        return tile(q, k, v, mask, bias)

    def split(a):
        """`[B, N, ...]` as `[N / chunk, B, chunk, ...]`, or what is the same for all queries as `[1, B, 1, ...]`."""
        return jnp.moveaxis(a.reshape(a.shape[0], -1, min(chunk, a.shape[1]), a.shape[2]), 1, 0)

    seen = tuple(None if a is None else split(a) for a in (mask, bias))
    out = _mapped(lambda q, *seen: tile(q, k, v, *seen), (split(q),), seen)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _chunk(length: int, limit: int) -> int:
    """The largest divisor of `length` within `limit`, if that leaves chunks worth a matrix product."""
    if limit >= length:
        return length
    divisors = [size for size in range(16, length) if length % size == 0]
    return max((size for size in divisors if size <= max(limit, 32)), default=length)


@jax.custom_jvp
def _attend_tile(q, k, v, mask, bias):
    """softmax(q k^T + bias) v for `[..., N, D]`, whose derivative needs the map, but not the product with v again."""
    weights = _unnormalised(q, k, mask, bias)
    # Dividing after the product with v touches D numbers a query instead of M.
    out = jnp.einsum("...nm,...md->...nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


@_attend_tile.defjvp
def _attend_tile_jvp(primals, tangents):
    (q, k, v, mask, bias), (dq, dk, dv, _, dbias) = primals, tangents
    weights = _unnormalised(q, k, mask, bias)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    dlogits = _logits(dq, k) + _logits(q, dk) + (0 if dbias is None else dbias.astype(jnp.float32))
    # A masked weight is zero, and so is its derivative.
    dweights = weights * (dlogits - jnp.sum(weights * dlogits, axis=-1, keepdims=True))

    def applied(weights, v):
        return jnp.einsum("...nm,...md->...nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

    out, dout = applied(weights, v), applied(dweights, v) + applied(weights, dv)
    return out.astype(v.dtype), dout.astype(v.dtype)


def _logits(q, k):
    return jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)


def _unnormalised(q, k, mask, bias):
    """exp(logits - their largest), float32."""
    logits = _logits(q, k)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))


class Attend(nn.Module):
    """Inner product attention as a module without parameters: `attend(q, k, v, mask)` on `[B, N, H, D]`.

    A bias of the logits, `[#B, #H, N, M]`, is a fifth argument where an architecture has one.
    """

    @nn.compact
    def __call__(self, q, k, v, mask, bias=None):
        return checkpoint_name(dot_product_attention(q, k, v, mask, bias), ATTENDED)


class Attention(nn.Module):
    """Multi-head attention of `x [B, N, C]` to `context [B, M, C']` (to itself when the two are the same).

    heads: number of heads; divides the width.
    qk_norm: RMS-normalises queries and keys per head (Dehghani et al. 2023, section 3.2; Esser et al. 2024, 5.3.2).
    dtype: compute dtype; parameters are float32.
    zero_init: whether the last projection starts at zero; for branches without a gate.
    qkv_bias, out_bias: whether the projections have biases.
    head_dim: channels of a head; 0 means width / heads.
    scaled: False leaves the logits q k^T as they are, without 1 / sqrt(D) (T5, Raffel et al. 2020).
    """

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32
    zero_init: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    head_dim: int = 0
    scaled: bool = True

    @nn.compact
    def __call__(self, x, context, mask, rotary, bias=None):
        """mask: bool, broadcasts to `[B, H, N, M]`, or None; rotary: angles `[N, D / 2]`, or None; bias: of the logits,
        broadcasts to `[B, H, N, M]`, or None."""
        width = x.shape[-1]
        head_dim = self.head_dim or width // self.heads

        def project(inputs, name):
            kernel_init = nn.initializers.xavier_uniform()
            dense = projection(
                self.heads * head_dim, use_bias=self.qkv_bias, dtype=self.dtype, kernel_init=kernel_init, name=name
            )
            y = dense(inputs)
            return y.reshape(*y.shape[:-1], self.heads, head_dim)

        q, k, v = project(x, "q"), project(context, "k"), project(context, "v")
        if self.qk_norm:
            q, k = RMSNorm(dtype=self.dtype, name="q_norm")(q), RMSNorm(dtype=self.dtype, name="k_norm")(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if not self.scaled:
            q = q * head_dim**0.5
        attend = Attend(name="attend")
        y = attend(q, k, v, mask) if bias is None else attend(q, k, v, mask, bias)
        y = y.reshape(*y.shape[:-2], self.heads * head_dim)
        out_init = nn.initializers.zeros if self.zero_init else nn.initializers.xavier_uniform()
        return projection(width, use_bias=self.out_bias, dtype=self.dtype, kernel_init=out_init, name="out")(y)
