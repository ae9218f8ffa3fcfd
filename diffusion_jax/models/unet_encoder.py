"""The first half of a U-Net: conditions, the way down and the middle. U-Net and ControlNet share it.

Both are subclasses of `UNetEncoder`, so that their parameters have the same names. The way up is in `models.unet`, what
a ControlNet makes of the features in `models.controlnet`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.anatomy import condition_fields
from diffusion_jax.models.layers.branches import REMAT
from diffusion_jax.models.layers.conditioning import ConditionEncoder, ConditionStream
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


class UNetEncoder(nn.Module):
    """What a U-Net and a ControlNet for it have in common.

    channels, multipliers: level l has `round(channels * multipliers[l])` features; every level but the last halves the
        size, rounded up.
    num_residual: residual blocks on the way down, one number or one for each level; there is one more on the way up.
    attention: blocks of attention after each residual block, per level; 0 for none. A tuple in the place of a level's
        number has one for each of its residual blocks. mid_attention: in the middle.
    mid_residual: residual blocks in the middle: one before its attention, the others after it.
    heads, or head_dim: attention heads (one number, or one for each level), or channels of each; the latter wins.
    transformer: attention within a `SpatialTransformer` (as Stable Diffusion) instead of `PixelAttention` (as ADM).
    qkv_bias: whether queries, keys and values have biases. linear_projection: see `SpatialTransformer.linear`.
    modulation: how the vector of time and conditions enters, one of `MODULATIONS`.
    dropout: rate within residual branches, in training. groups: of the group norms.
    width: of the conditioning vector; 0 means four times `channels`. time_features: sinusoids of the time.
    conditions: see `layers.conditioning`; with a sequence among them, attention is followed by cross-attention.
    in_channels: of x; 0 takes what comes.
    remat: a key of `REMAT`, applied to each block. dtype: compute dtype; parameters and the output are float32.
    """

    channels: int = 64
    multipliers: tuple[int | float, ...] = (1, 2, 2)
    num_residual: int | tuple[int, ...] = 2
    attention: tuple[int | tuple[int, ...], ...] = (0, 1, 1)
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
    conditions: tuple[ConditionStream, ...] = ()
    in_channels: int = 0
    remat: str = "none"
    dtype: str = "float32"

    takes = ("vector", "context", "channels", "time")

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.channels * multiplier) for multiplier in self.multipliers)

    @property
    def residuals(self) -> tuple[int, ...]:
        """Residual blocks of each level on the way down."""
        return self.num_residual if isinstance(self.num_residual, tuple) else (self.num_residual,) * len(self.features)

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of attention behind each residual block of each level, on the way down."""
        return block_depths(self.attention, self.residuals)

    @property
    def level_heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        if self.head_dim:
            return tuple(features // self.head_dim for features in self.features)
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * len(self.multipliers)

    def parts(self, x, t, cond, train, *others):
        """`(residual, attention, h, own)` of the calling module's `__call__`.

        `residual(h, level, features, name)` and `attention(h, level, depth, name)` make the blocks and return the new
        h; `h` is x behind the first convolution. others: conditions of the calling module alone, with values `own`.
        """
        dtype = jnp.dtype(self.dtype)
        levels = len(self.multipliers)
        # Times of pixels are averaged from level to level; features of an odd size are not (see `Upsample`).
        check_images(x.shape, levels - 1 if jnp.ndim(t) > 1 else 0, "x")
        if self.in_channels and x.shape[-1] != self.in_channels:
            raise invalid("x.shape", x.shape, f"the network was made for in_channels={self.in_channels}")
        if train and self.dropout and not self.has_rng("dropout"):
            raise InvalidInput(f"Training with dropout={self.dropout} needs a key: apply(..., train=True, key=key).")
        conditioned = self._conditioned(x, t, cond, dtype, others)
        vectors = [conditioned.vector]
        for _ in range(levels - 1):
            vectors.append(average_pool(vectors[-1]) if conditioned.vector.ndim == 4 else conditioned.vector)

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
            cross=conditioned.context is not None,
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

        h = conv(self.channels, dtype=dtype, name="conv_in")(conditioned.join_channels(x.astype(dtype)))
        side = conditioned.side(h)
        return residual, attention, h, conditioned.own

    def down(self, h, residual, attention):
        """The features at the end of the way down, and all that skip connections take up."""
        skips = [h]
        last = len(self.multipliers) - 1
        for level, features in enumerate(self.features):
            for index, depth in enumerate(self.down_depths[level]):
                name = f"down_{level}_{index}"
                h = attention(residual(h, level, features, name), level, depth, name)
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

    def _conditioned(self, x, t, cond, dtype, others):
        """Its vector is `[B, D]`, or one per pixel `[B, H, W, D]`."""
        t = fill(t, x)
        if t.ndim > 3:
            raise invalid("t.shape", t.shape, "a U-Net takes times of shape [B], [B, H] or [B, H, W]")
        if t.ndim == 2:
            t = jnp.broadcast_to(t[..., None], x.shape[:3])
        encoder = ConditionEncoder(
            self.width or 4 * self.channels,
            (*self.conditions, *others),
            dtype=dtype,
            time_features=self.time_features,
            # As ADM's: through weak modulations at first, a small embedding would be heard late.
            table_std=1.0,
            name="condition",
        )
        return encoder(t, cond, x.shape)


def block_depths(attention: tuple[int | tuple[int, ...], ...], residuals: tuple[int, ...]) -> tuple:
    """The number of blocks of attention behind each residual block, by level. residuals: how many these are."""
    each = zip(attention, residuals, strict=True)
    return tuple(depth if isinstance(depth, tuple) else (depth,) * count for depth, count in each)


def check_depths(name: str, attention: tuple, residuals: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """`block_depths`, once they are one for each level, or for each of its residual blocks."""
    if len(attention) != len(residuals):
        told = f"one depth, 0 or more, is needed for each of the {len(residuals)} levels"
        raise invalid(name, attention, told)
    depths = block_depths(attention, residuals)
    for level, (found, count) in enumerate(zip(depths, residuals, strict=True)):
        if len(found) != count or min(found) < 0:
            told = f"level {level} has {count} residual blocks: one depth, 0 or more, for all or for each is needed"
            raise invalid(name, attention, told)
    return depths


def encoder_anatomy(module: UNetEncoder, **fields: Any) -> Anatomy:
    """What a U-Net and a ControlNet for it have in common, and further fields."""
    fields = {"width": module.width or 4 * module.channels, "entrance": "conv_in", **fields}
    return Anatomy(axes=4, **condition_fields(module, fields["entrance"]), **fields)


def check_heads(module: UNetEncoder, depths: tuple[int, ...]) -> None:
    """Raises InvalidInput unless the features of each level of attention divide into heads."""
    for depth, head, features in zip(depths, module.level_heads, module.features, strict=True):
        field, divisor = ("head_dim", module.head_dim) if module.head_dim else ("heads", head)
        if depth and features % divisor:
            raise invalid(field, divisor, f"it must divide the {features} features that attend")


def check_encoder(module: UNetEncoder) -> None:
    """Raises InvalidInput unless the sizes fit together and the named choices exist."""
    for name in ("channels", "groups", "time_features"):
        if getattr(module, name) < 1:
            raise invalid(name, getattr(module, name), "it must be a positive integer")
    for name in ("mid_attention", "mid_residual", "head_dim", "width", "in_channels"):
        if getattr(module, name) < 0:
            raise invalid(name, getattr(module, name), "it must not be negative")
    if not module.multipliers or min(module.features) < 1:
        raise invalid("multipliers", module.multipliers, "one positive number per level is needed")
    levels = len(module.multipliers)
    if len(module.residuals) != levels or min(module.residuals) < 1:
        told = f"a positive integer, or one for each of the {levels} levels is needed"
        raise invalid("num_residual", module.num_residual, told)
    deepest = [max(depths) for depths in check_depths("attention", module.attention, module.residuals)]
    if isinstance(module.heads, tuple) and len(module.heads) != levels:
        raise invalid("heads", module.heads, f"one number, or one for each of the {levels} levels is needed")
    if min(module.heads if isinstance(module.heads, tuple) else (module.heads,)) < 1:
        raise invalid("heads", module.heads, "it must be a positive integer")
    if module.mid_attention and not module.mid_residual:
        raise invalid("mid_attention", module.mid_attention, "attention in the middle follows a residual block there")
    check_heads(module, (*deepest[:-1], max(deepest[-1], module.mid_attention)))
    if module.modulation not in MODULATIONS:
        raise unknown("modulation", module.modulation, MODULATIONS)
    if not 0 <= module.dropout < 1:
        raise invalid("dropout", module.dropout, "a rate in [0, 1) is needed")
    if module.linear_projection and not module.transformer:
        raise invalid("linear_projection", True, "it needs transformer=True")
    if module.remat not in REMAT:
        raise unknown("remat", module.remat, REMAT)
    check_dtype(module.dtype)
