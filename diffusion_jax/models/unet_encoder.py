"""The half of a U-Net that looks: conditions, the way down and the middle. The U-Net itself and a ControlNet share it.

Both are subclasses of `UNetEncoder`, so that their parameters have the same names. The way up is in `models.unet`, what
a ControlNet makes of the features in `models.controlnet`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers.branches import REMAT, Side
from diffusion_jax.models.layers.conditioning import ConditionEncoder
from diffusion_jax.models.layers.convolution import (
    MODULATIONS,
    Downsample,
    ResidualBranch,
    average_pool,
    check_images,
    conv,
    residual_block,
)
from diffusion_jax.models.layers.spatial import PixelAttention, SpatialTransformer
from diffusion_jax.models.network import check_dtype
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Anatomy

CONTEXT = ("context", "context_mask")


class UNetEncoder(nn.Module):
    """What a U-Net and a ControlNet for it have in common.

    channels, multipliers: level l has `round(channels * multipliers[l])` features; every level but the last halves the
        size.
    num_residual: residual blocks per level on the way down; one more on the way up.
    attention: blocks of attention after each residual block, per level; 0 for none. mid_attention: in the middle.
    mid_residual: residual blocks in the middle: one before its attention, the others after it.
    heads, or head_dim: attention heads (one number, or one for each level), or channels of each; the latter wins.
    transformer: attention within a `SpatialTransformer` (as Stable Diffusion) instead of `PixelAttention` (as ADM).
    qkv_bias: whether queries, keys and values have biases. linear_projection: see `SpatialTransformer.linear`.
    modulation: how the vector of time and conditions enters, one of `MODULATIONS`.
    dropout: rate within residual branches, in training. groups: of the group norms.
    width: of the conditioning vector; 0 means four times `channels`. time_features: sinusoids of the time.
    num_classes, pooled, pooled_layers, time_ids, id_features, context, text_vocab_size, text_depth: the conditions; see
        `ConditionEncoder`. With `context` or text, attention is followed by cross-attention.
    raw_context: cross-attention sees `cond["context"]` as it is, not embedded by `ConditionEncoder` (as Stable
        Diffusion); the caller then says what "no condition" is.
    in_channels, context_channels, pooled_channels: channels of x, of the context, and of the pooled vector with the
        sinusoids of the time ids; 0 takes what comes.
    concat: channels of `cond["concat"] [B, H, W, concat]`, which join those of x; 0 for none.
    remat: a key of `REMAT`, applied to each block. dtype: compute dtype; parameters and the output are float32.
    """

    channels: int = 64
    multipliers: tuple[int | float, ...] = (1, 2, 2)
    num_residual: int = 2
    attention: tuple[int, ...] = (0, 1, 1)
    mid_attention: int = 1
    mid_residual: int = 2
    heads: int | tuple[int, ...] = 4
    head_dim: int = 0
    transformer: bool = False
    qkv_bias: bool = True
    linear_projection: bool = False
    modulation: str = "scale_shift"
    dropout: float = 0.0
    groups: int = 32
    width: int = 0
    time_features: int = 256
    num_classes: int = 0
    pooled: bool = False
    pooled_layers: int = 1
    time_ids: bool = False
    id_features: int = 256
    context: bool = False
    text_vocab_size: int = 0
    text_depth: int = 2
    raw_context: bool = False
    in_channels: int = 0
    context_channels: int = 0
    pooled_channels: int = 0
    concat: int = 0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.channels * multiplier) for multiplier in self.multipliers)

    @property
    def level_heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        if self.head_dim:
            return tuple(features // self.head_dim for features in self.features)
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * len(self.multipliers)

    def parts(self, x, t, cond, train, taken=()):
        """`(residual, attention, h, cond)` of the calling module's `__call__`.

        `residual(h, level, features, name)` and `attention(h, level, depth, name)` make the blocks and return the new
        h; `h` is x behind the first convolution. taken: keys of `cond` that the caller reads itself.
        """
        dtype = jnp.dtype(self.dtype)
        levels = len(self.multipliers)
        check_images(x.shape, levels - 1, "x")
        if self.in_channels and x.shape[-1] != self.in_channels:
            raise invalid("x.shape", x.shape, f"the network was made for in_channels={self.in_channels}")
        if train and self.dropout and not self.has_rng("dropout"):
            raise InvalidInput(f"Training with dropout={self.dropout} needs a key: apply(..., train=True, key=key).")
        c, side, cond = self._condition(x, t, cond, dtype, taken)
        vectors = [c]
        for _ in range(levels - 1):
            vectors.append(average_pool(vectors[-1]) if c.ndim == 4 else c)

        branch = partial(
            ResidualBranch,
            groups=self.groups,
            modulation=self.modulation,
            dropout=self.dropout if train else 0.0,
            eps=1e-5,
            dtype=dtype,
        )
        attend = partial(
            partial(SpatialTransformer, linear=self.linear_projection) if self.transformer else PixelAttention,
            cross=side.context is not None,
            groups=self.groups,
            remat=self.remat,
            dtype=dtype,
            qkv_bias=self.qkv_bias,
        )

        def residual(h, level, features, name):
            return residual_block(branch, features, remat=self.remat, dtype=dtype, name=name)(h, vectors[level], side)

        def attention(h, level, depth, name):
            if not depth:
                return h
            return attend(depth, self.level_heads[level], name=f"{name}_attention")(h, vectors[level], side)

        h = x.astype(dtype)
        if self.concat:
            h = jnp.concatenate([h, self._concat(x, cond).astype(dtype)], axis=-1)
        return residual, attention, conv(self.channels, dtype=dtype, name="conv_in")(h), cond

    def down(self, h, residual, attention):
        """The features at the end of the way down, and all that skip connections take up."""
        skips = [h]
        last = len(self.multipliers) - 1
        for level, features in enumerate(self.features):
            for index in range(self.num_residual):
                name = f"down_{level}_{index}"
                h = attention(residual(h, level, features, name), level, self.attention[level], name)
                skips.append(h)
            if level < last:
                h = Downsample(h.shape[-1], dtype=jnp.dtype(self.dtype), name=f"down_{level}")(h)
                skips.append(h)
        return h, skips

    def middle(self, h, residual, attention):
        last = len(self.multipliers) - 1
        for index in range(self.mid_residual):
            h = residual(h, last, h.shape[-1], f"mid_{index}")
            if index == 0:
                h = attention(h, last, self.mid_attention, "mid")
        return h

    def _condition(self, x, t, cond, dtype, taken):
        """The vector, `[B, D]` or one per pixel `[B, H, W, D]`; what cross-attention sees; the checked condition."""
        t = fill(t, x)
        if t.ndim > 3:
            raise invalid("t.shape", t.shape, "a U-Net takes times of shape [B], [B, H] or [B, H, W]")
        if t.ndim == 2:
            t = jnp.broadcast_to(t[..., None], x.shape[:3])
        encoder = ConditionEncoder(
            self.width or 4 * self.channels,
            num_classes=self.num_classes,
            pooled=self.pooled,
            context=self.context and not self.raw_context,
            vocab_size=self.text_vocab_size,
            text_depth=self.text_depth,
            dtype=dtype,
            time_features=self.time_features,
            # As ADM's: through weak modulations at first, a small embedding would be heard late.
            label_std=1.0,
            time_ids=self.time_ids,
            id_features=self.id_features,
            pooled_layers=self.pooled_layers,
            name="condition",
        )
        own = (*taken, *("concat",) * bool(self.concat), *CONTEXT * self.raw_context)
        cond = check_condition(cond, encoder.taken + own)
        if self.context_channels and cond["context"].shape[-1] != self.context_channels:
            expected = f"the network was made for context_channels={self.context_channels}"
            raise invalid("cond['context'].shape", cond["context"].shape, expected)
        if self.pooled_channels:
            ids = cond["time_ids"].shape[-1] if self.time_ids else 0
            if cond["pooled"].shape[-1] + ids * self.id_features != self.pooled_channels:
                sum_of = f" and {ids} time ids of {self.id_features} sinusoids" if self.time_ids else ""
                raise InvalidInput(
                    f"cond['pooled'] has {cond['pooled'].shape[-1]} channels{sum_of}, "
                    f"but the network was made for pooled_channels={self.pooled_channels} in total."
                )
        c, context, mask = encoder(t, {name: value for name, value in cond.items() if name not in own})
        if self.raw_context:
            context, mask = jnp.asarray(cond["context"], dtype), cond.get("context_mask")
        return c, Side(context, mask), cond

    def _concat(self, x, cond):
        others = jnp.asarray(cond["concat"])
        if others.shape != (*x.shape[:3], self.concat):
            raise invalid("cond['concat'].shape", others.shape, f"{(*x.shape[:3], self.concat)} is needed")
        return others


def encoder_anatomy(module: UNetEncoder, **fields: Any) -> Anatomy:
    """What a U-Net and a ControlNet for it have in common, and further fields."""
    fields = {"width": module.width or 4 * module.channels, "concat": module.concat, **fields}
    return Anatomy(axes=4, entrance="conv_in", condition=("condition",), time="condition/time", **fields)


def check_encoder(module: UNetEncoder) -> None:
    """Raises InvalidInput unless the sizes fit together and the named choices exist."""
    for name in ("channels", "num_residual", "groups", "time_features", "id_features"):
        if getattr(module, name) < 1:
            raise invalid(name, getattr(module, name), "it must be a positive integer")
    sizes = ("mid_attention", "mid_residual", "head_dim", "width", "num_classes", "text_vocab_size")
    for name in (*sizes, "in_channels", "context_channels", "pooled_channels", "concat"):
        if getattr(module, name) < 0:
            raise invalid(name, getattr(module, name), "it must not be negative")
    if not module.multipliers or min(module.features) < 1:
        raise invalid("multipliers", module.multipliers, "one positive number per level is needed")
    levels = len(module.multipliers)
    if len(module.attention) != levels or min(module.attention) < 0:
        raise invalid("attention", module.attention, f"one depth, 0 or more, is needed for each of the {levels} levels")
    if isinstance(module.heads, tuple) and len(module.heads) != levels:
        raise invalid("heads", module.heads, f"one number, or one for each of the {levels} levels is needed")
    if min(module.heads if isinstance(module.heads, tuple) else (module.heads,)) < 1:
        raise invalid("heads", module.heads, "it must be a positive integer")
    if module.mid_attention and not module.mid_residual:
        raise invalid("mid_attention", module.mid_attention, "attention in the middle follows a residual block there")
    depths, heads = (*module.attention, module.mid_attention), (*module.level_heads, module.level_heads[-1])
    for depth, head, features in zip(depths, heads, (*module.features, module.features[-1]), strict=True):
        field, divisor = ("head_dim", module.head_dim) if module.head_dim else ("heads", head)
        if depth and features % divisor:
            raise invalid(field, divisor, f"it must divide the {features} features that attend")
    if module.modulation not in MODULATIONS:
        raise unknown("modulation", module.modulation, MODULATIONS)
    if not 0 <= module.dropout < 1:
        raise invalid("dropout", module.dropout, "a rate in [0, 1) is needed")
    if module.raw_context and not module.context:
        raise invalid("raw_context", True, "it needs context=True")
    if module.raw_context and module.text_vocab_size:
        raise invalid(
            "text_vocab_size", module.text_vocab_size, "text cannot join a raw context; use raw_context=False"
        )
    if module.time_ids and not module.pooled:
        raise invalid("time_ids", module.time_ids, "they are embedded with the pooled vector; use pooled=True")
    if module.pooled_layers not in (1, 2):
        raise invalid("pooled_layers", module.pooled_layers, "1 or 2 is needed")
    if module.linear_projection and not module.transformer:
        raise invalid("linear_projection", True, "it needs transformer=True")
    for name in ("context", "pooled"):
        if getattr(module, f"{name}_channels") and not getattr(module, name):
            raise invalid(f"{name}_channels", getattr(module, f"{name}_channels"), f"it needs {name}=True")
    if module.remat not in REMAT:
        raise unknown("remat", module.remat, REMAT)
    check_dtype(module.dtype)
