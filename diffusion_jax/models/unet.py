"""The U-Net of diffusion models: residual blocks and attention at several resolutions, with skip connections.

One module spans DDPM (Ho et al. 2020), ADM (Dhariwal & Nichol 2021) and Stable Diffusion (Rombach et al. 2022): they
differ in how the conditioning vector enters a residual block and in what stands between residual blocks. Times may be
per pixel: the modulation of every residual block is then a field at the block's resolution. Convolutions, residual
branches and spatial transformers are in `layers.convolution` and `layers.spatial`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers.branches import REMAT, Side
from diffusion_jax.models.layers.conditioning import ConditionEncoder
from diffusion_jax.models.layers.convolution import (
    MODULATIONS,
    Downsample,
    ResidualBranch,
    Upsample,
    average_pool,
    check_images,
    conv,
    residual_block,
)
from diffusion_jax.models.layers.norms import GroupNorm
from diffusion_jax.models.layers.spatial import PixelAttention, SpatialTransformer
from diffusion_jax.models.network import check_dtype, network
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Network

CONTEXT = ("context", "context_mask")


class UNet(nn.Module):
    """Predicts an image-shaped output from `x [B, H, W, C]`, `t` of shape `[B]`, `[B, H]` or `[B, H, W]`, and `cond`.

    channels, multipliers: level l has `channels * multipliers[l]` features; every level but the last halves the size.
    num_residual: residual blocks per level on the way down; one more on the way up.
    attention: blocks of attention after each residual block, per level; 0 for none. mid_attention: in the middle.
    heads, or head_dim: number of attention heads, or channels of each; the latter wins.
    transformer: attention within a `SpatialTransformer` (as Stable Diffusion) instead of `PixelAttention` (as ADM).
    modulation: how the vector of time and conditions enters, one of `MODULATIONS`.
    dropout: rate within residual branches, in training. groups: of the group norms.
    width: of the conditioning vector; 0 means four times `channels`. time_features: sinusoids of the time.
    num_classes, pooled, context, text_vocab_size, text_depth: the conditions; see `ConditionEncoder`. With `context`
        or text, attention is followed by cross-attention.
    raw_context: cross-attention sees `cond["context"]` as it is, not embedded by `ConditionEncoder` (as Stable
        Diffusion); the caller then says what "no condition" is.
    learn_sigma: a second set of output channels, reported as `extras["log_variance"]`.
    remat: a key of `REMAT`, applied to each block. dtype: compute dtype; parameters and the output are float32.
    """

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    num_residual: int = 2
    attention: tuple[int, ...] = (0, 1, 1)
    mid_attention: int = 1
    heads: int = 4
    head_dim: int = 0
    transformer: bool = False
    modulation: str = "scale_shift"
    dropout: float = 0.0
    groups: int = 32
    width: int = 0
    time_features: int = 256
    num_classes: int = 0
    pooled: bool = False
    context: bool = False
    text_vocab_size: int = 0
    text_depth: int = 2
    raw_context: bool = False
    learn_sigma: bool = False
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, t, cond, train):
        dtype = jnp.dtype(self.dtype)
        levels = len(self.multipliers)
        check_images(x.shape, levels - 1, "x")
        if train and self.dropout and not self.has_rng("dropout"):
            raise InvalidInput(f"Training with dropout={self.dropout} needs a key: apply(..., train=True, key=key).")
        c, side = self._condition(x, t, cond, dtype)
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
            SpatialTransformer if self.transformer else PixelAttention,
            cross=side.context is not None,
            groups=self.groups,
            remat=self.remat,
            dtype=dtype,
        )

        def residual(h, level, features, name):
            return residual_block(branch, features, remat=self.remat, dtype=dtype, name=name)(h, vectors[level], side)

        def attention(h, level, depth, name):
            if not depth:
                return h
            return attend(depth, self._heads(h.shape[-1]), name=f"{name}_attention")(h, vectors[level], side)

        h = conv(self.channels, dtype=dtype, name="conv_in")(x.astype(dtype))
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            for index in range(self.num_residual):
                name = f"down_{level}_{index}"
                h = residual(h, level, self.channels * multiplier, name)
                h = attention(h, level, self.attention[level], name)
                skips.append(h)
            if level < levels - 1:
                h = Downsample(h.shape[-1], dtype=dtype, name=f"down_{level}")(h)
                skips.append(h)

        h = residual(h, levels - 1, h.shape[-1], "mid_0")
        h = attention(h, levels - 1, self.mid_attention, "mid")
        h = residual(h, levels - 1, h.shape[-1], "mid_1")

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for index in range(self.num_residual + 1):
                name = f"up_{level}_{index}"
                h = residual(jnp.concatenate([h, skips.pop()], -1), level, self.channels * multiplier, name)
                h = attention(h, level, self.attention[level], name)
            if level > 0:
                h = Upsample(h.shape[-1], dtype=dtype, name=f"up_{level}")(h)

        h = jax.nn.silu(GroupNorm(self.groups, 1e-5, dtype=dtype, name="norm_out")(h))
        features = x.shape[-1] * (2 if self.learn_sigma else 1)
        y = conv(features, dtype=dtype, zero=True, name="conv_out")(h).astype(jnp.float32)
        if not self.learn_sigma:
            return y, {}
        return y[..., : x.shape[-1]], {"log_variance": y[..., x.shape[-1] :]}

    def _condition(self, x, t, cond, dtype):
        """The vector, `[B, D]` or one per pixel `[B, H, W, D]`, and what cross-attention sees."""
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
            name="condition",
        )
        if not self.raw_context:
            c, context, mask = encoder(t, cond)
            return c, Side(context, mask)
        cond = check_condition(cond, encoder.taken + CONTEXT)
        c, _, _ = encoder(t, {name: value for name, value in cond.items() if name not in CONTEXT})
        return c, Side(jnp.asarray(cond["context"], dtype), cond.get("context_mask"))

    def _heads(self, features: int) -> int:
        return features // self.head_dim if self.head_dim else self.heads


PRESETS = {
    "digits": {"channels": 32, "multipliers": (1, 2), "num_residual": 1, "attention": (0, 1), "groups": 8},
    "ddpm_cifar10": {
        "channels": 128,
        "multipliers": (1, 2, 2, 2),
        "attention": (0, 1, 0, 0),
        "heads": 1,
        "modulation": "shift",
        "time_features": 128,
        "dropout": 0.1,
    },
    "adm_imagenet64": {
        "channels": 192,
        "multipliers": (1, 2, 3, 4),
        "num_residual": 3,
        "attention": (0, 1, 1, 1),
        "head_dim": 64,
        "time_features": 192,
        "dropout": 0.1,
        "num_classes": 1000,
    },
    "sd15": {
        "channels": 320,
        "multipliers": (1, 2, 4, 4),
        "attention": (1, 1, 1, 0),
        "heads": 8,
        "transformer": True,
        "modulation": "shift",
        "time_features": 320,
        "context": True,
        "raw_context": True,
    },
}
"""Fields of `UNet`. `digits` is for 8 x 8 images; the others follow Ho et al. 2020 (appendix B), Dhariwal & Nichol 2021
(table 11; down- and upsampling are convolutions here) and Stable Diffusion 1.5 (latents of 64 x 64 x 4)."""


def unet(preset: str = "digits", **fields) -> Network:
    """A U-Net: a preset of `PRESETS`, and any fields of `UNet` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    known = [name for name in UNet.__dataclass_fields__ if name not in ("parent", "name")]
    for name in fields:
        if name not in known:
            raise unknown("field of unet", name, known)
    module = UNet(**{**PRESETS[preset], **fields})
    _check(module)
    return network(module)


def _check(module: UNet) -> None:
    for name in ("channels", "num_residual", "heads", "groups", "time_features"):
        if getattr(module, name) < 1:
            raise invalid(name, getattr(module, name), "it must be a positive integer")
    for name in ("mid_attention", "head_dim", "width", "num_classes", "text_vocab_size"):
        if getattr(module, name) < 0:
            raise invalid(name, getattr(module, name), "it must not be negative")
    if not module.multipliers or min(module.multipliers) < 1:
        raise invalid("multipliers", module.multipliers, "one positive integer per level is needed")
    if len(module.attention) != len(module.multipliers) or min(module.attention) < 0:
        levels = len(module.multipliers)
        raise invalid("attention", module.attention, f"one depth, 0 or more, is needed for each of the {levels} levels")
    depths = (*module.attention, module.mid_attention)
    for depth, multiplier in zip(depths, (*module.multipliers, module.multipliers[-1]), strict=True):
        features = module.channels * multiplier
        field = "head_dim" if module.head_dim else "heads"
        if depth and features % getattr(module, field):
            raise invalid(field, getattr(module, field), f"it must divide the {features} features that attend")
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
    if module.remat not in REMAT:
        raise unknown("remat", module.remat, REMAT)
    check_dtype(module.dtype)
