"""The tensors of Stable Diffusion under the names of its original code (CompVis, Stability AI) and of OpenCLIP.

Each table here is the table of a family (diffusers, transformers) with other names, and other layouts where those
differ, so that a file in either layout is the same network. Which file is which is found out in `single_file`.
"""

import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.interop import autoencoder, clip, unet
from diffusion_jax.interop.tables import StoredTensor, TensorTable

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Within a residual block of the U-Net: diffusers' names and the original ones."""

ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
"""Within the attention of the autoencoder."""

ENCODER_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Within a block of a text encoder: transformers' names and OpenCLIP's."""


def _moved(name: str, places: Mapping[str, str]) -> str:
    """The name with the module that it begins with under its other name; the longest one counts."""
    for module in sorted(places, key=len, reverse=True):
        if name.startswith(f"{module}."):
            return places[module] + name[len(module) :]
    return name


def unet_blocks(module: Any) -> dict[str, str]:
    """Blocks of the U-Net: diffusers' names, which count levels, and the original ones, which count all blocks."""
    blocks, number, last = {}, 1, len(module.features) - 1
    for level, depths in enumerate(module.down_depths):
        for i in range(len(depths)):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{number}.1"
            number += 1
        if level < last:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for part, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        blocks[f"mid_block.{part}"] = f"middle_block.{place}"
    number = 0
    for up, depths in enumerate(reversed(module.up_depths)):
        for i, depth in enumerate(depths):
            blocks[f"up_blocks.{up}.resnets.{i}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{up}.attentions.{i}"] = f"output_blocks.{number}.1"
            if i == len(depths) - 1 and up < last:
                # Behind the residual block and its attention, where it has some.
                blocks[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + bool(depth)}.conv"
            number += 1
    return blocks


def original_unet_table(module: Any) -> TensorTable:
    """The U-Net behind "model.diffusion_model."."""
    places = unet_blocks(module)
    inner = {f"{old}.{part}": f"{new}.{name}" for old, new in places.items() if ".resnets." in old
             for part, name in RESIDUAL.items()}  # fmt: skip
    places = {**places, **inner, **ENDS}
    return {ours: row._replace(name=_moved(row.name, places)) for ours, row in unet.unet_table(module).items()}


def autoencoder_table(module: Any, convolved: bool) -> TensorTable:
    """The autoencoder behind "first_stage_model.". convolved: whether its attention is stored as 1 x 1 convolutions."""
    count = len(module.features)
    places = {"encoder.conv_norm_out": "encoder.norm_out", "decoder.conv_norm_out": "decoder.norm_out"}
    for side in ("encoder", "decoder"):
        for i in range(2):
            places[f"{side}.mid_block.resnets.{i}"] = f"{side}.mid.block_{i + 1}"
        for old, new in ATTENTION.items():
            places[f"{side}.mid_block.attentions.0.{old}"] = f"{side}.mid.attn_1.{new}"
    for level in range(count):
        up = f"decoder.up_blocks.{count - 1 - level}"
        places[f"encoder.down_blocks.{level}.resnets"] = f"encoder.down.{level}.block"
        places[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        places[f"{up}.resnets"] = f"decoder.up.{level}.block"
        places[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    table = {}
    for ours, row in autoencoder.table(module).items():
        name = _moved(row.name, places).replace(".conv_shortcut.", ".nin_shortcut.")
        flat = convolved and ".attn_1." in name and row.layout
        table[ours] = row._replace(name=name, layout="o i 1 1 -> i o" if flat else row.layout)
    return table


def openclip_table(module: Any) -> TensorTable:
    """A text encoder as OpenCLIP stores it: queries, keys and values in one tensor."""
    theirs, places = "text_model.encoder.layers.{}", {}
    for old, new in ENCODER_BLOCK.items():
        places[f"{theirs}.{old}"] = f"transformer.resblocks.{{}}.{new}"
    places["text_model.final_layer_norm"] = "ln_final"
    places["text_model.embeddings.token_embedding"] = "token_embedding"
    fused = re.compile(r"\.self_attn\.([qkv])_proj\.(weight|bias)$")
    table = {}
    for ours, row in clip.CLIP["CLIPTextModel"].table(module).items():
        found = fused.search(row.name)
        if found:
            name = f"transformer.resblocks.{{}}.attn.in_proj_{found[2]}"
            table[ours] = row._replace(name=name, part="qkv".index(found[1]), parts=3)
        else:
            table[ours] = row._replace(name=_moved(row.name, places))
    table["positions"] = StoredTensor("positional_embedding")
    if module.projection:
        # Theirs is multiplied from the right, as ours is.
        table["projection/kernel"] = StoredTensor("text_projection")
    return table
