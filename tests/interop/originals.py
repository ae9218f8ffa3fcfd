"""Folders of diffusers rewritten as one file in the layout of the original code, as the published conversion has it.

The names are written out here once more, independently of the library's tables.
"""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
CLIP_TO_OPENCLIP = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn", ".attn"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
)


def tensors(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def unet_tensors(folder):
    """Names of the U-Net in the original code."""
    config = json.loads((folder / "config.json").read_text())
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    pairs = [
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    ]  # fmt: skip
    for i in range(levels):
        for j in range(layers):
            pairs.append((f"down_blocks.{i}.resnets.{j}", f"input_blocks.{(layers + 1) * i + j + 1}.0"))
            pairs.append((f"down_blocks.{i}.attentions.{j}", f"input_blocks.{(layers + 1) * i + j + 1}.1"))
        pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(layers + 1) * (i + 1)}.0.op"))
        for j in range(layers + 1):
            pairs.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{(layers + 1) * i + j}.0"))
            pairs.append((f"up_blocks.{i}.attentions.{j}", f"output_blocks.{(layers + 1) * i + j}.1"))
        after = 2 if config["up_block_types"][i].startswith("CrossAttn") else 1
        last = (layers + 1) * i + layers
        pairs.append((f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{last}.{after}.conv"))
    result = {}
    for name, value in tensors(folder).items():
        (old, new), *more = [pair for pair in pairs if name.startswith(f"{pair[0]}.")]
        assert not more
        renamed = new + name[len(old) :]
        if "resnets" in old:
            for theirs, original in RESNET:
                renamed = renamed.replace(theirs, original)
        result[renamed] = value
    return result


def autoencoder_tensors(folder):
    """Names of the autoencoder in the original code; its attention is of 1 x 1 convolutions."""
    levels = len(json.loads((folder / "config.json").read_text())["block_out_channels"])
    pairs = [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")]
    for i in range(levels):
        pairs += [
            (f"down_blocks.{i}.resnets.", f"down.{i}.block."),
            (f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample."),
            (f"up_blocks.{i}.resnets.", f"up.{levels - 1 - i}.block."),
            (f"up_blocks.{i}.upsamplers.0.", f"up.{levels - 1 - i}.upsample."),
            (f"mid_block.resnets.{i}.", f"mid.block_{i + 1}."),
        ]
    pairs += [("mid_block.attentions.0.", "mid.attn_1."), ("group_norm.", "norm."), ("to_out.0.", "proj_out.")]
    pairs += [(f"to_{name}.", f"{name}.") for name in "qkv"]
    result = {}
    for name, value in tensors(folder).items():
        for old, new in pairs:
            name = name.replace(old, new)
        flat = "attn_1" in name and name.endswith("weight") and value.ndim == 2
        result[name] = value[:, :, None, None] if flat else value
    return result


def openclip_tensors(folder, unused_block=False):
    """Names of a text encoder in OpenCLIP. unused_block: with another block at the end, and a projection."""
    result, theirs = {}, tensors(folder)
    for name, value in theirs.items():
        if "self_attn.q_proj" in name:
            parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name = name.replace("q_proj.", "in_proj_")
            value = np.concatenate(parts)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        for old, new in CLIP_TO_OPENCLIP:
            name = name.replace(old, new)
        if name == "text_projection.weight":
            name, value = "text_projection", np.ascontiguousarray(value.T)
        result[name] = value
    if unused_block:
        depth = sum(name.endswith("ln_1.weight") for name in result)
        block = f"transformer.resblocks.{depth - 1}."
        last = {name.replace(block, f"transformer.resblocks.{depth}."): value + 1 for name, value in result.items()
                if name.startswith(block)}  # fmt: skip
        width = result["token_embedding.weight"].shape[1]
        result |= last | {
            "text_projection": np.ones((width, width), np.float32),
            "logit_scale": np.ones((), np.float32),
        }
    return result


def original_file(file, folder, kind, **others):
    """One file of a folder. kind: "sd1", "sd2" or "xl"; others: further tensors."""

    def under(prefix, part):
        return {f"{prefix}.{name}": value for name, value in part.items()}

    result = under("model.diffusion_model", unet_tensors(folder / "unet"))
    result |= under("first_stage_model", autoencoder_tensors(folder / "vae"))
    first = folder / "text_encoder"
    if kind == "sd1":
        result |= under("cond_stage_model.transformer", tensors(first))
        length = result["cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"].shape[0]
        ids = np.arange(length)[None]
        result["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    elif kind == "sd2":
        result |= under("cond_stage_model.model", openclip_tensors(first, unused_block=True))
    else:
        result |= under("conditioner.embedders.0.transformer", tensors(first))
        result |= under("conditioner.embedders.1.model", openclip_tensors(folder / "text_encoder_2"))
    result["alphas_cumprod"] = np.linspace(1, 0, 10, dtype=np.float32)
    save_file({**result, **others}, file)
    return file
