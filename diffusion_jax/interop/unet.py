"""The U-Nets of Stable Diffusion 1, 2 and XL, as diffusers stores them (`UNet2DConditionModel`).

What a ControlNet shares with them (the way down, the middle, the conditions) is here too; the rest of it is in
`interop.controlnet`.
"""

from typing import Any

from diffusion_jax.errors import invalid
from diffusion_jax.interop.dit import check_stored, example_condition, stored_conditions
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import MOST_LEVELS, Fields, shown
from diffusion_jax.interop.tables import TensorTable, conv, dense, norm, vector
from diffusion_jax.models import ConditionStream, concat, context, guidance_scale, label, param_shapes, pooled, unet
from diffusion_jax.models.conditions import Concat, Context, GuidanceScale, Label, Pooled
from diffusion_jax.models.unet_encoder import UNetEncoder
from diffusion_jax.typing import Network

FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
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
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Options of the peer and their values that can be loaded; the first is the peer's default."""

IRRELEVANT = ("upcast_attention", "mid_block_only_cross_attention", "addition_embed_type_num_heads", "sample_size")
"""Softmax is float32 here anyway; the next two belong to blocks that cannot be loaded; the last is for pipelines."""

BLOCK_TENSORS = 10
"""Of a residual block, at least."""

DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
"""Types of levels, without and with attention."""

MIDDLE = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}
"""Types of the middle, and how many residual blocks they have."""

MODULATION = {"default": "shift", "scale_shift": "scale_shift"}

Depth = int | tuple[int, ...]
"""Blocks of attention behind each residual block of a level: one number, or one for each."""


def encoder_fields(config: Fields) -> dict[str, Any]:
    """Fields of `UNetEncoder` from a config of a U-Net or of a ControlNet."""
    for name, allowed in FIXED.items():
        config.choice(name, allowed)
    features = config.wholes("block_out_channels", (320, 640, 1280, 1280))
    count = len(features)
    if any(value is not False for value in config.per_level("only_cross_attention", False, count)):
        raise config.wrong("only_cross_attention", "only false can be loaded")
    groups = config.whole("norm_num_groups", 32)
    if any(size % groups for size in features):
        raise config.wrong("norm_num_groups", f"it must divide block_out_channels, {list(features)}")
    residuals = config.layers_per_level("layers_per_block", 2, count)
    if sum(residuals) * BLOCK_TENSORS > config.most_layers:
        raise config.wrong("layers_per_block", f"so many blocks have more than {config.most_layers} tensors")
    attended = level_types(config, "down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), DOWN, count)
    depths = config.per_level("transformer_layers_per_block", 1, count)
    attention = tuple(
        _depth(config, "transformer_layers_per_block", depth, blocks) if attends else 0
        for depth, attends, blocks in zip(depths, attended, residuals, strict=True)
    )
    middle = config.choice("mid_block_type", tuple(MIDDLE))
    mid_depth = 0
    if middle == "UNetMidBlock2DCrossAttn":
        last = depths[-1][0] if isinstance(depths[-1], list | tuple) and depths[-1] else depths[-1]
        mid_depth = _depth(config, "transformer_layers_per_block", last, 1)
    heads = config.wholes_per_level("attention_head_dim", 8, count)
    contexts = config.wholes_per_level("cross_attention_dim", 1280, count)
    if len(set(contexts)) > 1:
        raise config.wrong("cross_attention_dim", "all levels attend to the same context, so one number is needed")
    guided = config.whole("time_cond_proj_dim", None, least=4)
    return {
        "preset": "sd15",
        "channels": features[0],
        "multipliers": multipliers(features),
        "num_residual": residuals[0] if len(set(residuals)) == 1 else residuals,
        "attention": attention,
        "mid_attention": mid_depth,
        "mid_residual": MIDDLE[middle],
        "heads": heads if len(set(heads)) > 1 else heads[0],
        "linear_projection": config.flag("use_linear_projection", False),
        "modulation": MODULATION[config.choice("resnet_time_scale_shift", tuple(MODULATION))],
        "dropout": config.number("dropout", 0.0, least=0.0, most=0.99),
        "groups": groups,
        "width": config.whole("time_embedding_dim", None) or 0,
        "time_features": features[0],
        "conditions": (
            context("none", contexts[0]),
            *_vectors(config),
            *(() if guided is None else (guidance_scale(guided),)),
        ),
        "in_channels": config.whole("in_channels", 4),
    }


def level_types(config: Fields, name: str, default: tuple, known: tuple[str, str], count: int) -> tuple[bool, ...]:
    """Whether each level has attention, by the names of its blocks."""
    types = config.items(name, default, 1, MOST_LEVELS)
    if len(types) != count:
        raise config.wrong(name, f"one for each of the {count} levels is needed")
    if any(kind not in known for kind in types):
        raise config.wrong(name, f"only {' and '.join(known)} can be loaded")
    return tuple(kind == known[1] for kind in types)


def _depth(config: Fields, name: str, value: Any, blocks: int) -> Depth:
    """The depths of a level with `blocks` residual blocks: one number where they are alike."""
    each = value if isinstance(value, list | tuple) else [value] * blocks
    whole = [isinstance(one, int) and not isinstance(one, bool) and 1 <= one <= config.most_layers for one in each]
    if not all(whole) or len(each) != blocks:
        told = f"{shown(value)} stands where one number from 1 to {config.most_layers}, or {blocks} of them, are needed"
        raise config.wrong(name, told)
    return each[0] if len(set(each)) == 1 else tuple(each)


def multipliers(features: tuple[int, ...]) -> tuple[int | float, ...]:
    """Channels of each level in units of the first level's."""
    return tuple(size // features[0] if size % features[0] == 0 else size / features[0] for size in features)


def _vectors(config: Fields) -> tuple[ConditionStream, ...]:
    """What joins the embedding of the time."""
    kind = config.choice("class_embed_type", (None, "projection", "simple_projection"))
    extra = config.choice("addition_embed_type", (None, "text_time"))
    classes = config.whole("num_class_embeds", None, least=2)
    size = config.whole("projection_class_embeddings_input_dim", None)
    ids = config.whole("addition_time_embed_dim", None, least=2)
    if kind and extra:
        raise config.wrong("class_embed_type", f"addition_embed_type is {extra!r}, and only one of them can be")
    # The last row serves as null class where there is one.
    labels = (label(classes - 1),) if kind is None and classes is not None else ()
    if not (kind or extra):
        return labels
    if size is None:
        raise config.wrong("projection_class_embeddings_input_dim", f"{kind or extra} needs it, a whole number")
    if extra and ids is None:
        raise config.wrong("addition_time_embed_dim", f"{extra} needs it, a whole number")
    return (*labels, pooled(1 if kind == "simple_projection" else 2, size, ids if extra else 0))


def unet_fields(config: Fields, files: Any) -> dict[str, Any]:
    """Fields of `UNet`. More channels that go in than come out are a condition, `concat`."""
    config.choice("num_attention_heads", (None,))
    fields = encoder_fields(config)
    attention = fields["attention"]
    going_up = _up_attention(config, fields)
    fields["up_attention"] = () if going_up == attention else going_up
    going_in, out = fields["in_channels"], config.whole("out_channels", 4)
    if out == 2 * going_in:
        return fields | {"learn_sigma": True}
    if out > going_in:
        raise config.wrong("out_channels", f"with in_channels={going_in} at most that can be")
    others = (concat(going_in - out),) if going_in > out else ()
    return fields | {"in_channels": out, "conditions": (*fields["conditions"], *others)}


def _up_attention(config: Fields, fields: dict[str, Any]) -> tuple[Depth, ...]:
    """Depths of attention on the way up, by level."""
    count = len(fields["multipliers"])
    attended = level_types(config, "up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, UP, count)[::-1]
    residuals = fields["num_residual"]
    residuals = residuals if isinstance(residuals, tuple) else (residuals,) * count
    name = "reverse_transformer_layers_per_block"
    depths = config.items(name, None, count, count)
    if depths is None:
        name, depths = "transformer_layers_per_block", config.per_level("transformer_layers_per_block", 1, count)
        if any(isinstance(depth, list | tuple) for depth in depths):
            raise config.wrong(name, "with a list in it reverse_transformer_layers_per_block is needed for the way up")
    else:
        depths = depths[::-1]
    return tuple(
        _depth(config, name, depth, blocks + 1) if attends else 0
        for depth, attends, blocks in zip(depths, attended, residuals, strict=True)
    )


def encoder_table(module: UNetEncoder) -> TensorTable:
    """Conditions, the way down and the middle."""
    table = conv("conv_in", "conv_in")
    table |= dense("condition/time/up", "time_embedding.linear_1")
    table |= dense("condition/time/down", "time_embedding.linear_2")
    _, labels, vectors, guided, _ = _conditions(module)
    if guided:
        table |= dense("condition/guidance", "time_embedding.cond_proj", bias=False)
    if labels:
        table |= vector("condition/label/embedding", "class_embedding.weight")
    if vectors and vectors.layers == 1:
        table |= dense("condition/pooled", "class_embedding")
    elif vectors:
        theirs = "add_embedding" if vectors.id_features else "class_embedding"
        table |= dense("condition/pooled/up", f"{theirs}.linear_1")
        table |= dense("condition/pooled/down", f"{theirs}.linear_2")
    before = module.channels
    for level, features in enumerate(module.features):
        theirs = f"down_blocks.{level}"
        for i, depth in enumerate(module.down_depths[level]):
            table |= residual(module, f"down_{level}_{i}", f"{theirs}.resnets.{i}", before != features)
            if depth:
                table |= transformer(module, f"down_{level}_{i}_attention", f"{theirs}.attentions.{i}")
            before = features
        if level < len(module.features) - 1:
            table |= conv(f"down_{level}/conv", f"{theirs}.downsamplers.0.conv")
    for i in range(module.mid_residual):
        table |= residual(module, f"mid_{i}", f"mid_block.resnets.{i}", False)
    if module.mid_attention:
        table |= transformer(module, "mid_attention", "mid_block.attentions.0")
    return table


def _conditions(module: UNetEncoder) -> list[Any]:
    """Its context, and its label, pooled vector, guidance scale and joined channels, each or None."""
    told = stored_conditions(module, "U-Net of diffusers", Context, Label, Pooled, GuidanceScale, Concat)
    if told[0] is None or told[0].projection != "none":
        raise invalid("conditions", module.conditions, "a U-Net of diffusers has a context with projection 'none'")
    return told


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
        skips += [features] * (len(module.down_depths[level]) + (level < count - 1))
    before = module.features[-1]
    for level, features in reversed(list(enumerate(module.features))):
        theirs = f"up_blocks.{count - 1 - level}"
        for i, depth in enumerate(module.up_depths[level]):
            shortcut = before + skips.pop() != features
            table |= residual(module, f"up_{level}_{i}", f"{theirs}.resnets.{i}", shortcut)
            if depth:
                table |= transformer(module, f"up_{level}_{i}_attention", f"{theirs}.attentions.{i}")
            before = features
        if level:
            table |= conv(f"up_{level}/conv", f"{theirs}.upsamplers.0.conv")
    return table | norm("norm_out", "conv_norm_out") | conv("conv_out", "conv_out")


def encoder_config(module: UNetEncoder) -> dict[str, Any]:
    """The inverse of `encoder_fields`. Raises InvalidInput for what these files cannot tell."""
    expected = {"transformer": True, "qkv_bias": False}
    check_stored(module, "U-Net of diffusers", **expected)
    told, labels, pooling, _, joined = _conditions(module)
    if module.time_features != module.channels or module.features[0] != module.channels:
        raise invalid("time_features", module.time_features, "a U-Net of diffusers has as many as channels")
    if module.mid_attention and module.down_depths[-1][0] not in (0, module.mid_attention):
        raise invalid("mid_attention", module.mid_attention, "it must be that of the last level")
    if (not module.mid_attention and module.mid_residual > 1) or module.mid_residual > 2:
        raise invalid("mid_residual", module.mid_residual, "two residual blocks have attention between them")
    depths = {depth for depth in (*module.attention, module.mid_attention) if depth and isinstance(depth, int)}
    # What a level without attention says is not read.
    spare = depths.pop() if len(depths) == 1 else 1
    layers = [_listed(depth or spare) for depth in module.attention[:-1]]
    layers.append(_listed(module.attention[-1] or module.mid_attention or spare))
    heads = module.level_heads
    names = ("num_class_embeds", "projection_class_embeddings_input_dim", "class_embed_type", "addition_embed_type")
    vectors: dict[str, Any] = dict.fromkeys((*names, "addition_time_embed_dim"))
    if labels:
        vectors["num_class_embeds"] = labels.num_classes + 1
    if pooling:
        vectors["projection_class_embeddings_input_dim"] = pooling.channels
        if pooling.id_features:
            vectors |= {"addition_embed_type": "text_time", "addition_time_embed_dim": pooling.id_features}
        else:
            vectors["class_embed_type"] = "simple_projection" if pooling.layers == 1 else "projection"
    return vectors | {
        "in_channels": module.in_channels + (joined.channels if joined else 0),
        "block_out_channels": list(module.features),
        "down_block_types": [DOWN[bool(depth)] for depth in module.attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn"
        if module.mid_attention
        else (None, "UNetMidBlock2D")[module.mid_residual],
        "layers_per_block": _listed(module.num_residual),
        "transformer_layers_per_block": layers,
        "attention_head_dim": list(heads) if len(set(heads)) > 1 else heads[0],
        "use_linear_projection": module.linear_projection,
        "cross_attention_dim": told.channels,
        "norm_num_groups": module.groups,
        "resnet_time_scale_shift": {ours: theirs for theirs, ours in MODULATION.items()}[module.modulation],
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def unet_config(module: Any) -> dict[str, Any]:
    """The inverse of `unet_fields`."""
    if module.out_channels not in (0, module.in_channels):
        raise invalid("out_channels", module.out_channels, f"it must be in_channels={module.in_channels}")
    going_up = module.up_attention or module.attention
    return encoder_config(module) | {
        "_class_name": "UNet2DConditionModel",
        "out_channels": module.in_channels * (2 if module.learn_sigma else 1),
        "up_block_types": [UP[bool(depth)] for depth in reversed(going_up)],
        "reverse_transformer_layers_per_block": [_listed(depth or 1) for depth in reversed(going_up)]
        if module.up_attention
        else None,
        "time_embedding_dim": module.width or None,
        "time_cond_proj_dim": guided.features if (guided := _conditions(module)[3]) else None,
        "dropout": module.dropout,
    }


def example(module: UNetEncoder) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of an x, and a condition, with which the parameters have their shapes."""
    if not module.in_channels:
        raise invalid("in_channels", 0, "to be loaded or stored the network must know it: give it to the constructor")
    size = 2 ** (len(module.features) - 1)
    shape = (1, size, size, module.in_channels)
    return shape, example_condition(module.conditions, shape)


def shapes(network: Network) -> Any:
    """The parameters as a tree of ShapeDtypeStruct."""
    return param_shapes(network, *example(network.module))


UNET = Family("diffusers", unet, unet_fields, unet_table, unet_config, shapes, irrelevant=IRRELEVANT)
