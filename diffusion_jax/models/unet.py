"""The U-Net of diffusion models: residual blocks and attention at several resolutions, with skip connections.

One module spans DDPM (Ho et al. 2020), ADM (Dhariwal & Nichol 2021) and Stable Diffusion (Rombach et al. 2022): they
differ in how the conditioning vector enters a residual block and in what stands between residual blocks. Times may be
per pixel: the modulation of every residual block is then a field at the block's resolution. The way down and the middle
are in `models.unet_encoder`, convolutions and spatial transformers in `layers.convolution` and `layers.spatial`.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.conditions import context, label, pooled
from diffusion_jax.models.layers.conditioning import ConditionStream, CondKey
from diffusion_jax.models.layers.convolution import Upsample, conv
from diffusion_jax.models.layers.norms import GroupNorm
from diffusion_jax.models.network import chosen, make_module, network
from diffusion_jax.models.unet_encoder import (
    UNetEncoder,
    block_depths,
    check_depths,
    check_encoder,
    check_heads,
    encoder_anatomy,
)
from diffusion_jax.typing import Network


@dataclass(frozen=True)
class Residuals(ConditionStream):
    """`cond["residuals"]`, a tuple of features that are added to those of a U-Net; may be left out."""

    keys = (CondKey("residuals", optional=True),)
    enters = ("residuals",)

    def embed(self, cond, place):
        return {"residuals": cond.get("residuals")}


class UNet(UNetEncoder):
    """Predicts an image-shaped output from `x [B, H, W, C]`, `t` of shape `[B]`, `[B, H]` or `[B, H, W]`, and `cond`.

    The fields of `UNetEncoder`, and
    up_attention: blocks of attention on the way up, as `attention` has those of the way down, whose levels have one
        residual block less; () for as many as there.
    out_channels: channels of the output; 0 for those of x.
    learn_sigma: a second set of output channels, reported as `extras["log_variance"]`.

    `cond["residuals"]`, where given, are added to what the skip connections carry, in their order on the way down, and
    the last one to the middle (`models.controlnet`).
    """

    up_attention: tuple[int | tuple[int, ...], ...] = ()
    out_channels: int = 0
    learn_sigma: bool = False

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of attention behind each residual block of each level, on the way up."""
        return block_depths(self.up_attention or self.attention, self.up_residuals)

    @property
    def up_residuals(self) -> tuple[int, ...]:
        """Residual blocks of each level on the way up."""
        return tuple(count + 1 for count in self.residuals)

    @nn.compact
    def __call__(self, x, t, cond, train):
        residual, attention, h, own = self.parts(x, t, cond, train, Residuals())
        h, skips = self.down(h, residual, attention)
        h = self.middle(h, residual, attention)
        if own["residuals"] is not None:
            h, skips = add_residuals(h, skips, own["residuals"])

        dtype = jnp.dtype(self.dtype)
        for level, features in reversed(list(enumerate(self.features))):
            for index, depth in enumerate(self.up_depths[level]):
                name = f"up_{level}_{index}"
                h = residual(jnp.concatenate([h, skips.pop()], -1), level, features, name)
                h = attention(h, level, depth, name)
            if level > 0:
                h = Upsample(h.shape[-1], dtype=dtype, name=f"up_{level}")(h, skips[-1].shape[1:3])

        h = jax.nn.silu(GroupNorm(self.groups, 1e-5, dtype=dtype, name="norm_out")(h))
        features = self.out_channels or x.shape[-1]
        total = features * (2 if self.learn_sigma else 1)
        y = conv(total, dtype=dtype, zero=True, name="conv_out")(h).astype(jnp.float32)
        if not self.learn_sigma:
            return y, {}
        return y[..., :features], {"log_variance": y[..., features:]}


def add_residuals(h, skips, residuals):
    """The middle and the skip connections with `residuals`, whose last entry belongs to the middle, added."""
    there = [entry.shape for entry in (*skips, h)]
    given = [jnp.shape(entry) for entry in residuals]
    if given != there:
        raise InvalidInput(f"cond['residuals'] has shapes {given}, but the features are {there}: another ControlNet?")
    *down, mid = (jnp.asarray(entry, h.dtype) for entry in residuals)
    return h + mid, [skip + entry for skip, entry in zip(skips, down, strict=True)]


STABLE_DIFFUSION = {
    "channels": 320,
    "multipliers": (1, 2, 4, 4),
    "attention": (1, 1, 1, 0),
    "heads": 8,
    "transformer": True,
    "qkv_bias": False,
    "modulation": "shift",
    "time_features": 320,
    "conditions": (context("none", 768),),
    "in_channels": 4,
}
SDXL = {
    **STABLE_DIFFUSION,
    "multipliers": (1, 2, 4),
    "attention": (0, 2, 10),
    "mid_attention": 10,
    "heads": (5, 10, 20),
    "linear_projection": True,
    "conditions": (context("none", 2048), pooled(2, 1280 + 6 * 256, 256)),
}
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
        "conditions": (label(1000),),
    },
    "sd15": STABLE_DIFFUSION,
    "sd21": {
        **STABLE_DIFFUSION,
        "heads": (5, 10, 20, 20),
        "linear_projection": True,
        "conditions": (context("none", 1024),),
    },
    "sdxl": SDXL,
    "sdxl_refiner": {
        **SDXL,
        "channels": 384,
        "multipliers": (1, 2, 4, 4),
        "attention": (0, 4, 4, 0),
        "mid_attention": 4,
        "heads": (6, 12, 24, 24),
        "time_features": 384,
        "conditions": (context("none", 1280), pooled(2, 1280 + 5 * 256, 256)),
    },
}
"""Fields of `UNet`. `digits` is for 8 x 8 images; the others follow Ho et al. 2020 (appendix B), Dhariwal & Nichol 2021
(table 11; down- and upsampling are convolutions here), Stable Diffusion 1.5 and 2.1 (latents of 64 x 64 x 4, or 96 x 96
x 4 for 2.1), and Stable Diffusion XL (Podell et al. 2023; latents of 128 x 128 x 4), its base and its refiner."""


def unet(preset: str = "digits", **fields) -> Network:
    """A U-Net: a preset of `PRESETS`, and any fields of `UNet` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    module = make_module(UNet, "unet", chosen(preset, PRESETS), fields)
    check_encoder(module)
    if module.out_channels < 0:
        raise invalid("out_channels", module.out_channels, "it must not be negative")
    told = "up_attention" if module.up_attention else "attention"
    depths = check_depths(told, module.up_attention or module.attention, module.up_residuals)
    check_heads(module, tuple(map(max, depths)))
    cuts = ("conv_in", "down_0_0")
    return network(module, encoder_anatomy(module, cuts=cuts, tail="norm_out", last=("norm_out", "conv_out")))
