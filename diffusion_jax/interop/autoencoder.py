"""The autoencoders of latent diffusion, with 4 and with 16 channels, as diffusers stores them (`AutoencoderKL`)."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import MOST_LEVELS, SMALLEST, Fields
from diffusion_jax.interop.tables import TensorTable, conv, dense, norm
from diffusion_jax.interop.unet import multipliers
from diffusion_jax.models import Autoencoder, kl_vae

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

OLD_NAMES = tuple(
    (rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": r"to_out.0"}.items()
)
"""What attention was called in the files of Stable Diffusion 1."""


IRRELEVANT = ("force_upcast", "sample_size")
"""What is computed in float32 is our own choice; the size is that from which the peer cuts images into tiles."""


BLOCK_TENSORS = 8
"""Of a residual block, at least."""


def fields(config: Fields, files: Any) -> dict[str, Any]:
    config.choice("act_fn", ("silu", "swish"))
    features = config.wholes("block_out_channels", (64,))
    for name, kind in BLOCKS.items():
        kinds = config.items(name, (kind,), 1, MOST_LEVELS)
        if kinds != (kind,) * len(features):
            raise config.wrong(name, f"only {kind} can be loaded, one for each level")
    groups = config.whole("norm_num_groups", 32)
    if any(size % groups for size in features):
        raise config.wrong("norm_num_groups", f"it must divide block_out_channels, {list(features)}")
    channels = config.whole("in_channels", 3)
    config.choice("out_channels", (channels,), 3)
    quant = config.flag("use_quant_conv", True)
    config.choice("use_post_quant_conv", (quant,), True)
    latent_channels = config.whole("latent_channels", 4)
    layers = config.layers("layers_per_block", 1)
    if layers * len(features) * BLOCK_TENSORS > config.most_layers:
        raise config.wrong("layers_per_block", f"so many blocks have more than {config.most_layers} tensors")
    mean, std = (config.numbers(name, None, latent_channels) for name in ("latents_mean", "latents_std"))
    shift = config.number("shift_factor", None) or 0.0
    if (mean is None) != (std is None):
        raise config.wrong("latents_mean", "it and latents_std are needed both, or neither")
    if mean is not None and shift:
        raise config.wrong("latents_mean", f"shift_factor={shift} shifts the latents already: only one of them can be")
    if std is not None and min(std) < SMALLEST:
        raise config.wrong("latents_std", "numbers above 0 are needed")
    return {
        "channels": features[0],
        "multipliers": multipliers(features),
        "num_residual": layers,
        "latent_channels": latent_channels,
        "data_channels": channels,
        "attention": config.flag("mid_block_add_attention", True),
        "quant_conv": quant,
        "groups": groups,
        "scaling_factor": config.positive("scaling_factor", 0.18215),
        "shift_factor": shift,
        "latents_mean": mean or (),
        "latents_std": std or (),
    }


def table(module: Any) -> TensorTable:
    count = len(module.features)
    rows = conv("encoder/conv_in", "encoder.conv_in") | conv("decoder/conv_in", "decoder.conv_in")
    before = module.features[0]
    for level, features in enumerate(module.features):
        for i in range(module.num_residual):
            theirs = f"encoder.down_blocks.{level}.resnets.{i}"
            rows |= residual(f"encoder/level_{level}_{i}", theirs, before != features)
            before = features
        if level < count - 1:
            rows |= conv(f"encoder/level_{level}_down/conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
    for level, features in reversed(list(enumerate(module.features))):
        for i in range(module.num_residual + 1):
            theirs = f"decoder.up_blocks.{count - 1 - level}.resnets.{i}"
            rows |= residual(f"decoder/level_{level}_{i}", theirs, before != features)
            before = features
        if level:
            rows |= conv(f"decoder/level_{level}_up/conv", f"decoder.up_blocks.{count - 1 - level}.upsamplers.0.conv")
    for side in ("encoder", "decoder"):
        for i in range(2):
            rows |= residual(f"{side}/mid_{i}", f"{side}.mid_block.resnets.{i}", False)
        if module.attention:
            attention = f"{side}.mid_block.attentions.0"
            rows |= norm(f"{side}/attention/norm", f"{attention}.group_norm")
            rows |= dense(f"{side}/attention/attention/out", f"{attention}.to_out.0")
            for name in "qkv":
                rows |= dense(f"{side}/attention/attention/{name}", f"{attention}.to_{name}")
        rows |= norm(f"{side}/norm_out", f"{side}.conv_norm_out") | conv(f"{side}/conv_out", f"{side}.conv_out")
    if module.quant_conv:
        rows |= conv("to_moments", "quant_conv") | conv("from_latents", "post_quant_conv")
    return rows


def residual(ours: str, theirs: str, shortcut: bool) -> TensorTable:
    """A residual block without modulation."""
    rows = norm(f"{ours}/residual/norm_in", f"{theirs}.norm1") | conv(f"{ours}/residual/conv_in", f"{theirs}.conv1")
    rows |= norm(f"{ours}/residual/norm_out", f"{theirs}.norm2") | conv(f"{ours}/residual/conv_out", f"{theirs}.conv2")
    return rows | conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut") if shortcut else rows


def config(module: Any) -> dict[str, Any]:
    if module.features[0] != module.channels:
        raise invalid("multipliers", module.multipliers, "the first must be 1")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": module.data_channels,
        "out_channels": module.data_channels,
        "block_out_channels": list(module.features),
        **{name: [kind] * len(module.features) for name, kind in BLOCKS.items()},
        "layers_per_block": module.num_residual,
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.groups,
        "scaling_factor": module.scaling_factor,
        "shift_factor": module.shift_factor or None,
        "latents_mean": list(module.latents_mean) or None,
        "latents_std": list(module.latents_std) or None,
        "mid_block_add_attention": module.attention,
        "use_quant_conv": module.quant_conv,
        "use_post_quant_conv": module.quant_conv,
    }


def shapes(autoencoder: Autoencoder) -> Any:
    module = autoencoder.module
    x = jax.ShapeDtypeStruct((1, module.factor, module.factor, module.data_channels), jnp.float32)
    return jax.eval_shape(autoencoder.init, jax.random.key(0), x)


AUTOENCODER = Family("diffusers", kl_vae, fields, table, config, shapes, aliases=OLD_NAMES, irrelevant=IRRELEVANT)
