"""ControlNets for the U-Nets of Stable Diffusion 1, 2 and XL, as diffusers stores them (`ControlNetModel`)."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.tables import TensorTable, conv
from diffusion_jax.interop.unet import IRRELEVANT, encoder_config, encoder_fields, encoder_table, example
from diffusion_jax.models import controlnet, param_shapes
from diffusion_jax.typing import Network


def fields(config: Fields, files: Any) -> dict[str, Any]:
    config.choice("controlnet_conditioning_channel_order", ("rgb",))
    config.choice("global_pool_conditions", (False,))
    config.choice("class_embed_type", (None, "projection"))
    fields = encoder_fields(config)
    if config.raw("num_attention_heads") is not None:
        heads = config.wholes_per_level("num_attention_heads", None, len(fields["multipliers"]))
        fields["heads"] = heads if len(set(heads)) > 1 else heads[0]
    return fields | {
        "control_channels": config.whole("conditioning_channels", 3),
        "control_features": config.wholes("conditioning_embedding_out_channels", (16, 32, 96, 256)),
    }


def table(module: Any) -> TensorTable:
    embedding = "controlnet_cond_embedding"
    rows = encoder_table(module)
    rows |= conv("control_in", f"{embedding}.conv_in") | conv("control_out", f"{embedding}.conv_out")
    for i in range(len(module.control_features) - 1):
        rows |= conv(f"control_{i}", f"{embedding}.blocks.{2 * i}")
        rows |= conv(f"control_{i}_down", f"{embedding}.blocks.{2 * i + 1}")
    # One behind the first convolution, one behind each residual block and one behind each halving.
    for i in range(sum(module.residuals) + len(module.features)):
        rows |= conv(f"zero_{i}", f"controlnet_down_blocks.{i}")
    return rows | conv("zero_mid", "controlnet_mid_block")


def config(module: Any) -> dict[str, Any]:
    if module.width not in (0, 4 * module.channels):
        raise invalid("width", module.width, f"a ControlNet of diffusers has {4 * module.channels}")
    return encoder_config(module) | {
        "_class_name": "ControlNetModel",
        "num_attention_heads": None,
        "conditioning_channels": module.control_channels,
        "conditioning_embedding_out_channels": list(module.control_features),
    }


def shapes(network: Network) -> Any:
    module = network.module
    (batch, height, width, channels), cond = example(module)
    factor = 2 ** (len(module.control_features) - 1)
    picture = (batch, height * factor, width * factor, module.control_channels)
    cond["control"] = jax.ShapeDtypeStruct(picture, jnp.float32)
    return param_shapes(network, (batch, height, width, channels), cond)


CONTROLNET = Family("diffusers", controlnet, fields, table, config, shapes, irrelevant=IRRELEVANT)
