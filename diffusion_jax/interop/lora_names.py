"""How the files of others spell an adapter: which component, module and role a tensor's name says.

PEFT (`base_model.model.X.lora_A.weight`), diffusers (`unet.X.lora_A.weight`, older `unet.X.lora.down.weight` and
`X.processor.to_q_lora.down.weight`), kohya and LyCORIS (`lora_unet_X_with_underscores.lora_down.weight`, for SDXL with
the block names of the original code). All are told apart tensor by tensor.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusion_jax.errors import InvalidInput

PEFT = "base_model.model"
"""The prefix of PEFT, which has one component a file."""

DOTTED = {
    "unet": ("unet", "transformer", "diffusion_model", "model.diffusion_model"),
    "text_encoder": ("text_encoder", "text_encoders.clip_l.transformer"),
    "text_encoder_2": ("text_encoder_2", "text_encoders.clip_g.transformer"),
}
UNDERSCORED = {
    "unet": ("lora_unet", "lora_transformer"),
    "text_encoder": ("lora_te1", "lora_te"),
    "text_encoder_2": ("lora_te2",),
}
"""What stands before the modules of a component, before a dot or before an underscore."""

COMPONENTS = tuple(DOTTED)

# An adapter may have a name, which stands before the last part.
_NAMED = r"(\.\w+)?"
_OLD = r"(\.lora\.|\.lora_|_lora\.|\.lora_linear_layer\.)"
ROLES = tuple(
    (re.compile(pattern + "$"), role)
    for pattern, role in (
        (rf"\.lora_A{_NAMED}\.weight", "down"),
        (rf"\.lora_B{_NAMED}\.weight", "up"),
        (rf"\.lora_B{_NAMED}\.bias", "up_bias"),
        (rf"\.lora_embedding_A{_NAMED}", "embedding_down"),
        (rf"\.lora_embedding_B{_NAMED}", "embedding_up"),
        (rf"{_OLD}down\.weight", "down"),
        (rf"{_OLD}up\.weight", "up"),
        (rf"{_OLD}mid\.weight", "mid"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (rf"\.lora_magnitude_vector{_NAMED}(\.weight)?", "magnitude"),
        (r"\.(?P<role>hada_(w[12]_[ab]|t[12]))" + _NAMED, "hada"),
        (r"\.(?P<role>lokr_(w[12](_[ab])?|t2))" + _NAMED, "lokr"),
        (r"\.(diff|w_norm)", "change"),
        (r"\.(diff_b|b_norm)", "bias_change"),
    )
)
_SAVED = re.compile(r"(\.base_layer|\.modules_to_save" + _NAMED + r")?\.(?P<role>weight|bias)$")
"""PEFT's `bias="all"` and `modules_to_save`: the trained parameters themselves."""

OTHERS = {
    r"oft_|boft_": "OFT",
    r"\.ia3_|\.on_input$": "IA3",
    r"vera_lambda": "VeRA",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"trainable_tokens": "trainable tokens",
    r"prompt_embeddings|prefix_encoder": "a prompt",
}
"""Kinds of adapters that are told by name when they are refused."""

LAYOUTS = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|context_block": "Stable Diffusion 3",
    r"adaln_single.*patchify|blocks_\d+_(self_attn|cross_attn)_[qkvo]$": "a video transformer",
    r"(input|output|middle)_blocks?_": "a U-Net in the original code",
    r"down_blocks_|up_blocks_": "a U-Net of diffusers",
    r"transformer_blocks_\d+_attn2": "PixArt, or another transformer of diffusers with cross-attention",
    r"transformer_blocks_\d+_attn1": "DiT of diffusers",
    r"blocks_\d+_(attn_qkv|adaLN)": "DiT in the original code",
    r"encoder_layers_\d+_self_attn": "a CLIP encoder",
    r"SelfAttention|DenseReluDense": "T5",
}
"""What a module's name, with underscores for dots, tells of the network that a file is for."""

SGM_RESIDUAL = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


def component_of(name: str) -> str | None:
    """The component that a tensor's prefix names, None where it has none or PEFT's."""
    return _headed(name)[0]


def _headed(name):
    """Component and prefix, with what ends it."""
    heads = {f"{head}.": component for component, heads in DOTTED.items() for head in heads}
    heads |= {f"{head}_": component for component, heads in UNDERSCORED.items() for head in heads}
    found = max((head for head in heads if name.startswith(head)), key=len, default="")
    return heads.get(found), found


def spelled_modules(
    names: Iterable[str], component: str, path: Any, aliases: Sequence[tuple[str, str]] = ()
) -> dict[str, dict[str, str]]:
    """A component's tensors by module (underscores for dots, without the prefix) and role.

    path: of the file, for errors. aliases: see `Family`.
    Raises InvalidInput for a tensor that is none of an adapter, or of a kind of adapters that is not read.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        told, head = _headed(name)
        wrapped = name.startswith(f"{PEFT}.")
        rest = name.removeprefix(f"{PEFT}.") if wrapped else name.removeprefix(head)
        role, module = _role(rest, wrapped, name, path)
        if told not in (component, None):
            continue
        if re.search(r"\.processor\.to_\w+$", module):
            module = module.replace(".processor.", ".")
            module = module + ".0" if module.endswith("to_out") else module
        for pattern, replacement in aliases:
            module = re.sub(pattern, replacement, f"{module}.").removesuffix(".")
        roles = found.setdefault(module.replace(".", "_"), {})
        if role in roles:
            raise InvalidInput(f"{path} says the same twice: {roles[role]} and {name}.")
        roles[role] = name
    return found


def _role(rest, wrapped, name, path):
    for pattern, role in ROLES:
        if match := pattern.search(rest):
            return match.groupdict().get("role") or role, rest[: match.start()]
    if wrapped and (match := _SAVED.search(rest)):
        return match["role"], rest[: match.start()]
    for pattern, kind in OTHERS.items():
        if re.search(pattern, name):
            known = "LoRA, DoRA, LoHa, LoKr and differences are"
            raise InvalidInput(f"{path} holds {name}, a tensor of {kind}, which is not read: {known}.")
    raise InvalidInput(f"{path} holds {name}, which is no tensor of an adapter that is known here.")


def known_module(spelled: str, known: Mapping[str, Any]) -> str | None:
    """The module among `known` that a file means, whose names have underscores for dots; None where there is none."""
    # Text encoders are saved with and without the name of their inner model, long ago by the names of the U-Net's.
    renamed = re.sub(r"self_attn_to_(q|k|v|out)(_0)?$", r"self_attn_\1_proj", spelled)
    for other in (spelled, renamed, f"text_model_{renamed}", f"vision_model_{renamed}"):
        if other in known:
            return other
    return sgm_names(known).get(spelled)


def layout_hint(spelled: Iterable[str]) -> str | None:
    """What the modules' names tell of the network that a file is for."""
    spelled = list(spelled)
    for pattern, name in LAYOUTS.items():
        if any(re.search(pattern, module) for module in spelled):
            return name
    return None


def sgm_names(names: Iterable[str]) -> dict[str, str]:
    """The block names of the original latent-diffusion code (as SDXL's kohya files have them) to those of diffusers.

    names: modules of a U-Net with underscores for dots.
    """
    names = list(names)
    levels = [re.match(r"down_blocks_0_resnets_(\d+)_", name) for name in names]
    per_level = 2 + max((int(match[1]) for match in levels if match), default=0)
    attended = {match[0] for match in (re.match(r"up_blocks_\d+_attentions", name) for name in names) if match}
    fixed = {
        "conv_in": "input_blocks_0_0",
        "conv_norm_out": "out_0",
        "conv_out": "out_2",
        "time_embedding_linear_1": "time_embed_0",
        "time_embedding_linear_2": "time_embed_2",
        "add_embedding_linear_1": "label_emb_0_0",
        "add_embedding_linear_2": "label_emb_0_2",
    }

    def spelled(name: str) -> str | None:
        if name in fixed:
            return fixed[name]
        match = re.match(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)", name)
        if match:
            way, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if kind == "downsamplers":
                return f"input_blocks_{per_level * (block + 1)}_0_op"
            if kind == "upsamplers":
                inner = 2 if f"up_blocks_{block}_attentions" in attended else 1
                return f"output_blocks_{per_level * (block + 1) - 1}_{inner}_{rest}"
            number = per_level * block + index
            outer = f"input_blocks_{number + 1}" if way == "down" else f"output_blocks_{number}"
            return f"{outer}_0_{SGM_RESIDUAL.get(rest, rest)}" if kind == "resnets" else f"{outer}_1_{rest}"
        match = re.match(r"mid_block_(resnets|attentions)_(\d+)_(.+)", name)
        if not match:
            return None
        if match[1] == "attentions":
            return f"middle_block_1_{match[3]}"
        return f"middle_block_{2 * int(match[2])}_{SGM_RESIDUAL.get(match[3], match[3])}"

    return {theirs: name for name in names if (theirs := spelled(name)) is not None}
