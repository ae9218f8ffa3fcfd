"""Uniform blocks: a block is a list of named residual branches, a stack is a block scanned over depth.

Every block and every branch of every architecture is called as `(h, c, side)`, positional arguments only:

    h     the residual stream, `[B, N, C]` or `[B, H, W, C]`
    c     the conditioning vector, `[*prefix, D]`, its prefix one of h's shape and at least `[B]`
    side  `Side`: whatever else is looked at (context, masks, rotary angles)

A branch returns what is *added* to h, gate included. Branches are submodules with the field's names (`attention`,
`cross_attention`, `mlp`, `residual`), so one interception mechanism serves all architectures.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from diffusion_jax.errors import unknown
from diffusion_jax.models.layers.attention import ATTENDED, Attention, key_mask
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.models.layers.modulation import Modulation, TableModulation, expand_vector, modulate
from diffusion_jax.models.layers.norms import layer_norm

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}
"""What the forward pass keeps for the backward pass of each block: everything, only its input, all matrix products, or
those of dense layers and what attention makes of them (not its maps)."""

CARRIED = "flow"
"""The collection that passes from block to block; every other collection is stacked over depth."""


NamedBranch = tuple[str, Callable[..., nn.Module]]
"""`(name, make)`: `make(name=name)` is the branch."""


class Side(NamedTuple):
    """What branches look at besides the residual stream and the conditioning vector; unused entries are None.

    context: `[B, M, D]`, for cross-attention. context_mask: `[B, M]`, True where visible.
    mask: `[B, N]`, True where a position of the residual stream may be attended to.
    rotary: `[N, D_head / 2]`, angles of the positions of the residual stream.
    bias: broadcasts to `[B, H, N, N]`, added to the logits of self-attention where a branch takes one.
    frames: of clips, what their frames are told; see `temporal.Frames`.
    skip: `[depth, B, N, C]` for a `Stack`, of which each block is given its own entry, `[B, N, C]`.
    layers: `[depth, *prefix, C]` likewise, what conditions add to the residual stream of each layer.
    """

    context: Any = None
    context_mask: Any = None
    mask: Any = None
    rotary: Any = None
    bias: Any = None
    frames: Any = None
    skip: Any = None
    layers: Any = None

    @property
    def stacked(self) -> tuple[str, ...]:
        """Which entries have a leading depth axis here."""
        return tuple(name for name in ("skip", "layers") if getattr(self, name) is not None)

    def of_block(self, index: Any) -> "Side":
        """What block `index` (which may be traced) sees: its own entries of what is stacked."""
        own = {name: jax.lax.dynamic_index_in_dim(getattr(self, name), index, keepdims=False) for name in self.stacked}
        return self._replace(**own)


class Branch(nn.Module):
    """Marks a residual branch: `branch(h, c, side)` is added to h. Interceptors recognise branches by this class."""


def modulated_input(h, c, dtype, eps=1e-6, modulation=Modulation):
    """A branch's input and its gate: `(modulate(norm(h)), gate)`, from the calling module's `modulation`."""
    shift, scale, gate = modulation(h.shape[-1], 3, dtype, name="modulation")(c)
    return modulate(layer_norm(h, eps), shift, scale), expand_vector(gate, h)


def _tokens(y):
    """`[B, ..., C]` as `[B, N, C]`."""
    return y.reshape(y.shape[0], -1, y.shape[-1])


class AttentionBranch(Branch):
    """`gate * attention(modulate(norm(h)))` with adaLN-Zero. Images `[B, H, W, C]` are attended as H W tokens.

    qkv_bias: see `Attention`. eps: of the norm. modulation: makes the module that is called `modulation`.
    """

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32
    qkv_bias: bool = True
    eps: float = 1e-6
    modulation: Any = Modulation

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = modulated_input(h, c, self.dtype, self.eps, self.modulation)
        y = _tokens(y)
        attention = Attention(self.heads, self.qk_norm, self.dtype, qkv_bias=self.qkv_bias, name="attention")
        y = attention(y, y, key_mask(side.mask), side.rotary).reshape(h.shape)
        return gate * y


class CrossAttentionBranch(Branch):
    """`gate * attention(modulate(norm(h)), context)` with adaLN-Zero.

    plain: `attention(h, context)` instead, which starts at zero: neither norm nor modulation nor gate (PixArt-alpha).
    qkv_bias: see `Attention`.
    """

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32
    plain: bool = False
    qkv_bias: bool = True
    modulation: Any = Modulation

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = (h, 1) if self.plain else modulated_input(h, c, self.dtype, modulation=self.modulation)
        y = _tokens(y)
        attention = Attention(
            self.heads, self.qk_norm, self.dtype, zero_init=self.plain, qkv_bias=self.qkv_bias, name="attention"
        )
        y = attention(y, side.context.astype(y.dtype), key_mask(side.context_mask), None).reshape(h.shape)
        return gate * y


class MlpBranch(Branch):
    """`gate * feed_forward(modulate(norm(h)))` with adaLN-Zero. eps, modulation: see `AttentionBranch`."""

    ratio: float = 4.0
    swiglu: bool = False
    dtype: Any = jnp.float32
    eps: float = 1e-6
    modulation: Any = Modulation

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = modulated_input(h, c, self.dtype, self.eps, self.modulation)
        return gate * FeedForward(self.ratio, self.swiglu, self.dtype, name="feed_forward")(y)


class SkipBranch(Branch):
    """`linear([h, side.skip])`: a long skip connection (Bao et al. 2022, U-ViT) as a residual.

    U-ViT has `W [h, skip]` in place of h; this is `h + (W - [1, 0]) [h, skip]`, and begins without the connection.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        both = jnp.concatenate([h, side.skip.astype(h.dtype)], axis=-1)
        return projection(h.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name="linear")(both)


def transformer_branches(
    heads,
    qk_norm,
    ratio,
    swiglu,
    dtype,
    crossed,
    *,
    qkv_bias=True,
    eps=1e-6,
    mlp_eps=1e-6,
    single=False,
    modulation: Callable[..., nn.Module] = Modulation,
) -> tuple[NamedBranch, ...]:
    """The branches of a transformer block: `attention`, `cross_attention` if there is a context, `mlp`.

    qkv_bias: whether queries, keys and values have biases. eps, mlp_eps: of the norms of `attention` and `mlp`.
    single: adaLN-single: `c` is the modulation `[*prefix, 6 D]` of both, to which they add tables of their own, and
        cross-attention is plain.
    modulation: makes the modules called `modulation`, if not `single`.
    """
    first, second = (partial(TableModulation, first=i) if single else modulation for i in (0, 3))
    attention = partial(AttentionBranch, heads, qk_norm, dtype, qkv_bias=qkv_bias, eps=eps, modulation=first)
    branches: list[NamedBranch] = [("attention", attention)]
    if crossed:
        cross = partial(
            CrossAttentionBranch, heads, qk_norm, dtype, plain=single, qkv_bias=qkv_bias, modulation=modulation
        )
        branches.append(("cross_attention", cross))
    return (*branches, ("mlp", partial(MlpBranch, ratio, swiglu, dtype, eps=mlp_eps, modulation=second)))


def modulated_output(h, c, features, dtype, modulation: Callable[..., nn.Module] = Modulation):
    """The last layer of a transformer, `final(modulate(norm(h)))`, which starts at zero; of the calling module."""
    shift, scale = modulation(h.shape[-1], 2, dtype, name="final_modulation")(c)
    y = modulate(layer_norm(h), shift, scale)
    return projection(features, dtype=dtype, kernel_init=nn.initializers.zeros, name="final")(y)


class Block(nn.Module):
    """Residual branches one after the other: `h = h + branch(h, c, side)`.

    branches: in their order. A new kind of branch is a new entry.
    """

    branches: tuple[NamedBranch, ...]

    @nn.compact
    def __call__(self, h, c, side):
        for name, make in self.branches:
            h = h + make(name=name)(h, c, side).astype(h.dtype)
        return h


def constrain_activations(h):
    """Lays the residual stream out by the logical names (batch, tokens, ..., embed); the identity without
    `flax.linen.logical_axis_rules`."""
    names = ("batch", "tokens", *(None,) * (h.ndim - 3), "embed") if h.ndim > 2 else ("batch", "embed")
    return with_logical_constraint(h, names)


class Stack(nn.Module):
    """`depth` equal blocks as one `lax.scan`: one trace, one compilation, whatever the depth.

    Parameters and all other collections get a leading depth axis; `flow` alone is carried from block to block.
    branches: see `Block`. remat: a key of `REMAT`. scan: False unrolls the loop; the parameters are laid out alike.
    stacked: c is `[depth, *prefix, D]`, a conditioning vector for each block.
    keep: returns `(h, every)`, where `every [depth, ...]` is the residual stream after each block; inside jit it costs
        nothing where it is not used.
    """

    branches: tuple[NamedBranch, ...]
    depth: int
    remat: str = "none"
    scan: bool = True
    stacked: bool = False
    keep: bool = False

    @nn.compact
    def __call__(self, h, c, side) -> Any:
        if self.remat not in REMAT:
            raise unknown("remat", self.remat, REMAT)

        def body(block, h, c, side):
            h = block(h, c, side)
            return h, h if self.keep else None

        if self.remat != "none":
            body = nn.remat(body, policy=REMAT[self.remat], prevent_cse=not self.scan)
        sides = nn.broadcast
        if side.stacked:
            sides = Side(*(0 if name in side.stacked else nn.broadcast for name in Side._fields))
        scanned = nn.scan(
            body,
            variable_axes={nn.DenyList(CARRIED): 0},
            variable_carry=CARRIED,
            split_rngs={True: True},
            in_axes=(0 if self.stacked else nn.broadcast, sides),  # pyright: ignore[reportArgumentType]: flax shows its default
            length=self.depth,
            unroll=1 if self.scan else self.depth,
            # Nothing is broadcast out of the loop, so the check would only trace every block a second time.
            check_constancy_invariants=False,
        )
        h = constrain_activations(h)
        h, every = scanned(Block(self.branches, name="block"), h, c, side)
        return (h, every) if self.keep else h
