"""The U-Nets of Stable Diffusion 1, 2 and XL, as diffusers stores them (`UNet2DConditionModel`).

What a ControlNet shares with them (the way down, the middle, the conditions) is here too; the rest of it is in
`interop.controlnet`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.family import Family, take
from diffusion_jax.interop.files import TensorFiles
from diffusion_jax.interop.tables import TensorTable, conv, dense, norm, vector
from diffusion_jax.models import param_shapes, unet
from diffusion_jax.models.unet_encoder import UNetEncoder
from diffusion_jax.typing import Network

FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "projection", "simple_projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Options of the peer and their values that can be loaded; the first is the peer's default."""

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
"""Types of levels, without and with attention."""

MODULATION = {"default": "shift", "scale_shift": "scale_shift"}


def levels(config: dict[str, Any], name: str, default: Any, count: int) -> tuple:
    """An entry of the config that is one value or a list of one for each level, as a tuple."""
    value = take(config, name, default)
    value = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(value) != count or any(isinstance(entry, list | tuple) for entry in value):
        raise InvalidInput(f"config.json says {name}={config[name]!r}, but one value for each level can be loaded.")
    return value


def encoder_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `UNetEncoder` from a config of a U-Net or of a ControlNet."""
    for name, allowed in FIXED.items():
        take(config, name, allowed[0], allowed)
    if any(
        levels(config, "only_cross_attention", False, len(take(config, "block_out_channels", (320, 640, 1280, 1280))))
    ):
        raise InvalidInput("config.json says only_cross_attention=true, but only false can be loaded.")
    features = tuple(take(config, "block_out_channels", (320, 640, 1280, 1280)))
    count = len(features)
    types = levels(config, "down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), count)
    for kind in types:
        if kind not in DOWN:
            raise InvalidInput(f"config.json says down_block_types={list(types)}, but only {' and '.join(DOWN)} exist.")
    layers = set(levels(config, "layers_per_block", 2, count))
    if len(layers) > 1:
        raise InvalidInput(f"config.json says layers_per_block={config['layers_per_block']}, but levels must be alike.")
    depths = levels(config, "transformer_layers_per_block", 1, count)
    heads = levels(config, "attention_head_dim", 8, count)
    middle = take(config, "mid_block_type", "UNetMidBlock2DCrossAttn")
    contexts = set(levels(config, "cross_attention_dim", 1280, count))
    if len(contexts) > 1:
        raise InvalidInput(
            f"config.json says cross_attention_dim={config['cross_attention_dim']}: levels must be alike."
        )
    groups = take(config, "norm_num_groups", 32)
    if groups is None:
        raise InvalidInput("config.json says norm_num_groups=null, but a number is needed.")
    fields = {
        "preset": "sd15",
        "channels": features[0],
        "multipliers": multipliers(features),
        "num_residual": layers.pop(),
        "attention": tuple(depth * DOWN.index(kind) for depth, kind in zip(depths, types, strict=True)),
        "mid_attention": depths[-1] if middle == "UNetMidBlock2DCrossAttn" else 0,
        "mid_residual": {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}[middle],
        "heads": heads if len(set(heads)) > 1 else heads[0],
        "linear_projection": take(config, "use_linear_projection", False),
        "modulation": MODULATION[take(config, "resnet_time_scale_shift", "default")],
        "dropout": float(take(config, "dropout", 0.0)),
        "groups": groups,
        "width": take(config, "time_embedding_dim", None) or 0,
        "time_features": features[0],
        "context_channels": contexts.pop(),
        "in_channels": take(config, "in_channels", 4),
    }
    return fields | _vectors(config)


def multipliers(features: tuple[int, ...]) -> tuple[int | float, ...]:
    """Channels of each level in units of the first level's."""
    return tuple(size // features[0] if size % features[0] == 0 else size / features[0] for size in features)


def _vectors(config: dict[str, Any]) -> dict[str, Any]:
    """What joins the embedding of the time."""
    kind, extra = take(config, "class_embed_type", None), take(config, "addition_embed_type", None)
    classes = take(config, "num_class_embeds", None)
    size = take(config, "projection_class_embeddings_input_dim", None)
    fields: dict[str, Any] = {}
    if kind and extra:
        raise InvalidInput(f"config.json says class_embed_type={kind!r} and addition_embed_type={extra!r}: one can be.")
    if kind is None and classes is not None:
        # The last row serves as null class where there is one.
        fields["num_classes"] = classes - 1
    if kind or extra:
        fields |= {"pooled": True, "pooled_layers": 1 if kind == "simple_projection" else 2, "pooled_channels": size}
    if extra:
        fields |= {"time_ids": True, "id_features": take(config, "addition_time_embed_dim", None)}
    return fields


def unet_fields(config: dict[str, Any], files: TensorFiles | None) -> dict[str, Any]:
    """Fields of `UNet`. More channels that go in than come out are a condition, `concat`."""
    fields = encoder_fields(config)
    count = len(fields["multipliers"])
    default = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    up, down = levels(config, "up_block_types", default, count), fields["attention"]
    if up != tuple(UP[bool(depth)] for depth in reversed(down)):
        raise InvalidInput(f"config.json says up_block_types={list(up)}, but the way up must mirror the way down.")
    going_in, out = fields["in_channels"], take(config, "out_channels", 4)
    if out == 2 * going_in:
        return fields | {"learn_sigma": True}
    if out > going_in:
        raise InvalidInput(f"config.json says out_channels={out}, but with in_channels={going_in} at most that can be.")
    return fields | {"in_channels": out, "concat": going_in - out}


def encoder_table(module: UNetEncoder) -> TensorTable:
    """Conditions, the way down and the middle."""
    table = conv("conv_in", "conv_in")
    table |= dense("condition/time/up", "time_embedding.linear_1")
    table |= dense("condition/time/down", "time_embedding.linear_2")
    if module.num_classes:
        table |= vector("condition/label/embedding", "class_embedding.weight")
    if module.pooled and module.pooled_layers == 1:
        table |= dense("condition/pooled", "class_embedding")
    elif module.pooled:
        theirs = "add_embedding" if module.time_ids else "class_embedding"
        table |= dense("condition/pooled/up", f"{theirs}.linear_1")
        table |= dense("condition/pooled/down", f"{theirs}.linear_2")
    before = module.channels
    for level, features in enumerate(module.features):
        theirs = f"down_blocks.{level}"
        for i in range(module.num_residual):
            table |= residual(module, f"down_{level}_{i}", f"{theirs}.resnets.{i}", before != features)
            if module.attention[level]:
                table |= transformer(module, f"down_{level}_{i}_attention", f"{theirs}.attentions.{i}")
            before = features
        if level < len(module.features) - 1:
            table |= conv(f"down_{level}/conv", f"{theirs}.downsamplers.0.conv")
    for i in range(module.mid_residual):
        table |= residual(module, f"mid_{i}", f"mid_block.resnets.{i}", False)
    if module.mid_attention:
        table |= transformer(module, "mid_attention", "mid_block.attentions.0")
    return table


def residual(module: UNetEncoder, ours: str, theirs: str, shortcut: bool) -> TensorTable:
    """A residual block."""
    inner = f"{ours}/residual"
    table = norm(f"{inner}/norm_in", f"{theirs}.norm1") | conv(f"{inner}/conv_in", f"{theirs}.conv1")
    table |= norm(f"{inner}/norm_out", f"{theirs}.norm2") | conv(f"{inner}/conv_out", f"{theirs}.conv2")
    # Theirs is the scale before the shift.
    swapped = module.modulation == "scale_shift"
    table |= dense(f"{inner}/modulation/dense", f"{theirs}.time_emb_proj", swapped=swapped)
    return table | conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut") if shortcut else table


def transformer(module: UNetEncoder, ours: str, theirs: str) -> TensorTable:
    """A spatial transformer."""
    layer = dense if module.linear_projection else conv
    table = norm(f"{ours}/norm", f"{theirs}.norm")
    table |= layer(f"{ours}/in", f"{theirs}.proj_in") | layer(f"{ours}/out", f"{theirs}.proj_out")
    ours, theirs = f"{ours}/blocks/block", f"{theirs}.transformer_blocks.{{}}"
    for branch, number in (("attention", 1), ("cross_attention", 2)):
        table |= norm(f"{ours}/{branch}/norm", f"{theirs}.norm{number}")
        for name in "qkv":
            there = f"{theirs}.attn{number}.to_{name}"
            table |= dense(f"{ours}/{branch}/attention/{name}", there, module.qkv_bias)
        table |= dense(f"{ours}/{branch}/attention/out", f"{theirs}.attn{number}.to_out.0")
    table |= norm(f"{ours}/mlp/norm", f"{theirs}.norm3")
    for part, name in enumerate(("up", "gate")):
        table |= dense(f"{ours}/mlp/{name}", f"{theirs}.ff.net.0.proj", part=part, parts=2)
    return table | dense(f"{ours}/mlp/down", f"{theirs}.ff.net.2")


def unet_table(module: Any) -> TensorTable:
    """The whole U-Net."""
    table = encoder_table(module)
    count = len(module.features)
    skips = [module.channels]
    for level, features in enumerate(module.features):
        skips += [features] * (module.num_residual + (level < count - 1))
    before = module.features[-1]
    for level, features in reversed(list(enumerate(module.features))):
        theirs = f"up_blocks.{count - 1 - level}"
        for i in range(module.num_residual + 1):
            shortcut = before + skips.pop() != features
            table |= residual(module, f"up_{level}_{i}", f"{theirs}.resnets.{i}", shortcut)
            if module.attention[level]:
                table |= transformer(module, f"up_{level}_{i}_attention", f"{theirs}.attentions.{i}")
            before = features
        if level:
            table |= conv(f"up_{level}/conv", f"{theirs}.upsamplers.0.conv")
    return table | norm("norm_out", "conv_norm_out") | conv("conv_out", "conv_out")


def encoder_config(module: UNetEncoder) -> dict[str, Any]:
    """The inverse of `encoder_fields`. Raises InvalidInput for what these files cannot tell."""
    expected = {"transformer": True, "qkv_bias": False, "raw_context": True, "text_vocab_size": 0}
    for name, value in expected.items():
        if getattr(module, name) != value:
            raise invalid(name, getattr(module, name), f"a U-Net of diffusers has {name}={value!r}")
    depths = {depth for depth in (*module.attention, module.mid_attention) if depth}
    if module.time_features != module.channels or module.features[0] != module.channels:
        raise invalid("time_features", module.time_features, "a U-Net of diffusers has as many as channels")
    if module.mid_attention and module.attention[-1] not in (0, module.mid_attention):
        raise invalid("mid_attention", module.mid_attention, "it must be that of the last level")
    if (not module.mid_attention and module.mid_residual > 1) or module.mid_residual > 2:
        raise invalid("mid_residual", module.mid_residual, "two residual blocks have attention between them")
    spare = depths.pop() if len(depths) == 1 else 1
    layers = [depth or spare for depth in module.attention[:-1]]
    layers.append(module.mid_attention or module.attention[-1] or spare)
    heads = module.level_heads
    vectors: dict[str, Any] = {}
    if module.num_classes:
        vectors["num_class_embeds"] = module.num_classes + 1
    if module.pooled:
        vectors["projection_class_embeddings_input_dim"] = module.pooled_channels
    if module.time_ids:
        vectors |= {"addition_embed_type": "text_time", "addition_time_embed_dim": module.id_features}
    elif module.pooled:
        vectors["class_embed_type"] = "simple_projection" if module.pooled_layers == 1 else "projection"
    return vectors | {
        "in_channels": module.in_channels + module.concat,
        "block_out_channels": list(module.features),
        "down_block_types": [DOWN[bool(depth)] for depth in module.attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn"
        if module.mid_attention
        else (None, "UNetMidBlock2D")[module.mid_residual],
        "layers_per_block": module.num_residual,
        "transformer_layers_per_block": layers,
        "attention_head_dim": list(heads) if len(set(heads)) > 1 else heads[0],
        "use_linear_projection": module.linear_projection,
        "cross_attention_dim": module.context_channels,
        "norm_num_groups": module.groups,
        "resnet_time_scale_shift": {ours: theirs for theirs, ours in MODULATION.items()}[module.modulation],
    }


def unet_config(module: Any) -> dict[str, Any]:
    """The inverse of `unet_fields`."""
    if module.out_channels not in (0, module.in_channels):
        raise invalid("out_channels", module.out_channels, f"it must be in_channels={module.in_channels}")
    return encoder_config(module) | {
        "_class_name": "UNet2DConditionModel",
        "out_channels": module.in_channels * (2 if module.learn_sigma else 1),
        "up_block_types": [UP[bool(depth)] for depth in reversed(module.attention)],
        "time_embedding_dim": module.width or None,
        "dropout": module.dropout,
    }


def example(module: UNetEncoder) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of an x, and a condition, with which the parameters have their shapes."""
    for name in ("in_channels", "context_channels", *("pooled_channels",) * module.pooled):
        if not getattr(module, name):
            raise invalid(name, 0, "to be loaded or stored the network must know it: give it to the constructor")
    size = 2 ** (len(module.features) - 1)
    shape = (1, size, size)
    cond = {"context": jax.ShapeDtypeStruct((1, 1, module.context_channels), jnp.float32)}
    if module.num_classes:
        cond["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    if module.pooled:
        cond["pooled"] = jax.ShapeDtypeStruct((1, module.pooled_channels), jnp.float32)
    if module.time_ids:
        cond["time_ids"] = jax.ShapeDtypeStruct((1, 0), jnp.float32)
    if module.concat:
        cond["concat"] = jax.ShapeDtypeStruct((*shape, module.concat), jnp.float32)
    return (*shape, module.in_channels), cond


def shapes(network: Network) -> Any:
    """The parameters as a tree of ShapeDtypeStruct."""
    return param_shapes(network, *example(network.module))


UNET = Family("diffusers", unet, unet_fields, unet_table, unet_config, shapes)
