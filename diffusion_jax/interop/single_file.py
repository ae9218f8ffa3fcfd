"""Whole pipelines in one safetensors file, in the layouts of the original code: Stable Diffusion 1, 2 and XL, DiT.

Such a file has no config: what it is follows from names and shapes of its tensors (`recognised`), and each part is
read as the class of diffusers or transformers that it is the same as. What tensors cannot tell has to be given:
tokenizers, the kind of prediction of Stable Diffusion 2, and the autoencoder of DiT.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.interop.clip import CLIP
from diffusion_jax.interop.dit import DIT_ORIGINAL
from diffusion_jax.interop.original import autoencoder_table, openclip_table, original_unet_table
from diffusion_jax.interop.tables import TensorTable

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."

GROUPS = 32
"""Of every group norm of the original code."""

HEAD = 64
"""Channels of a head wherever the original configs count heads by their channels."""

UNUSED = re.compile(
    r"^(model_ema\.|alphas_|betas$|sqrt_|log_one_minus_|posterior_|lvlb_weights$|logvar$|loss\.|denoiser\.|scale_factor$"
    r"|global_step$|v_pred$|ztsnr$|cond_stage_model\.logit_scale$|conditioner\.embedders\.\d\.(model\.)?logit_scale$)"
)
"""What stands beside the parts in published files: tables of noise, averages, counters, the other ends of losses."""


class FilePart:
    """The tensors of `files` whose names begin with `prefix`, under their names without it."""

    def __init__(self, files: Any, prefix: str = "", aliases: Sequence[tuple[str, str]] = ()):
        self.files, self.path = files, files.path
        self._whole = {}
        for name in files.names:
            if name.startswith(prefix):
                now = name[len(prefix) :]
                for pattern, replacement in aliases:
                    now = re.sub(pattern, replacement, now)
                self._whole[now] = name

    @property
    def names(self) -> list[str]:
        return list(self._whole)

    def __contains__(self, name: str) -> bool:
        return name in self._whole

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises InvalidInput where the tensor is not there."""
        if name not in self._whole:
            raise InvalidInput(f"{self.path} is not in the original layout: it lacks {name}.")
        return self.files.shape(self._whole[name])

    def axis(self, name: str, axis: int) -> int:
        """The length of an axis; raises InvalidInput where there is none."""
        shape = self.shape(name)
        if axis >= len(shape):
            raise InvalidInput(f"{self.path}: {name} has shape {list(shape)}, but {axis + 1} axes or more are needed.")
        return shape[axis]

    def dtype(self, name: str) -> str:
        return self.files.dtype(self._whole[name])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.files.read(self._whole[name], index)

    def count(self, pattern: str) -> int:
        """How many of 0, 1, ... put for "{}" give a name that is there."""
        count = 0
        while pattern.replace("{}", str(count)) in self._whole:
            count += 1
        return count


class Component(NamedTuple):
    """A part of a single file as the network of a family.

    family: a key of `FAMILIES`. part: its tensors, a `FilePart` or `TensorFiles`. config: what config.json would say.
    table: (module) -> the rows of the original layout. ignored: as of a `Family`.
    """

    family: str
    part: Any
    config: dict[str, Any]
    table: Callable[[Any], TensorTable]
    ignored: tuple[str, ...] = ()


def unet_component(part: FilePart, sample_size: int | None = None, sized: bool = False) -> Component:
    """The U-Net. sized: whether the vector that joins the time ends in the sinusoids of sizes (XL)."""
    down: list[list[tuple[int, int]]] = [[]]
    for n in range(1, 1000):
        if f"input_blocks.{n}.0.op.weight" in part:
            down.append([])
        elif f"input_blocks.{n}.0.out_layers.3.weight" in part:
            down[-1].append(_block(part, f"input_blocks.{n}"))
        else:
            break
    if not all(down):
        raise InvalidInput(f"{part.path} is not in the original layout: a level of its U-Net has no residual block.")
    features = [blocks[0][0] for blocks in down]
    up, number = [], 0
    for blocks in reversed(down):
        up.append([_block(part, f"output_blocks.{number + i}")[1] for i in range(len(blocks) + 1)])
        number += len(blocks) + 1
    depths = [[depth for _, depth in blocks] for blocks in down]
    keys = [name for name in part.names if name.endswith("transformer_blocks.0.attn2.to_k.weight")]
    if not keys:
        raise InvalidInput(f"{part.path}: its U-Net attends to no text, and only those that do can be loaded.")
    projection = keys[0].replace("transformer_blocks.0.attn2.to_k", "proj_in")
    linear = len(part.shape(projection)) == 2
    middle = {0: None, 1: "UNetMidBlock2D", 2: "UNetMidBlock2DCrossAttn"}
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": part.axis("input_blocks.0.0.weight", 1),
        "out_channels": part.axis("out.2.weight", 0),
        "block_out_channels": features,
        "layers_per_block": _alike([len(blocks) for blocks in down]),
        "norm_num_groups": GROUPS,
        "down_block_types": [("DownBlock2D", "CrossAttnDownBlock2D")[any(level)] for level in depths],
        "up_block_types": [("UpBlock2D", "CrossAttnUpBlock2D")[any(level)] for level in up],
        "mid_block_type": middle[
            ("middle_block.0.out_layers.3.weight" in part) + ("middle_block.1.norm.weight" in part)
        ],
        "transformer_layers_per_block": [_alike(level) or 1 for level in depths],
        "reverse_transformer_layers_per_block": [_alike(level) or 1 for level in up],
        "attention_head_dim": [max(size // HEAD, 1) for size in features] if linear else 8,
        "use_linear_projection": linear,
        "cross_attention_dim": part.axis(keys[0], 1),
    }
    if config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
        # Where the last level has no attention of its own, the entry is that of the middle.
        depth = part.count("middle_block.1.transformer_blocks.{}.norm1.weight")
        if not any(depths[-1]):
            config["transformer_layers_per_block"][-1] = depth
    if "label_emb.0.0.weight" in part:
        config["projection_class_embeddings_input_dim"] = part.axis("label_emb.0.0.weight", 1)
        if sized:
            config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        else:
            config["class_embed_type"] = "projection"
    return Component("UNet2DConditionModel", part, config, original_unet_table)


def _block(part: FilePart, name: str) -> tuple[int, int]:
    """Features of a residual block, and how many blocks of attention stand behind it."""
    return (
        part.axis(f"{name}.0.out_layers.3.weight", 0),
        part.count(f"{name}.1.transformer_blocks.{{}}.norm1.weight"),
    )


def _alike(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def autoencoder_component(part: FilePart, scaling_factor: float | None) -> Component:
    """The autoencoder. scaling_factor: of its latents, which tensors do not tell; None takes what is given besides."""
    levels = part.count("encoder.down.{}.block.0.conv2.weight")
    features = [part.axis(f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(levels)]
    attention = "encoder.mid.attn_1.q.weight"
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": part.axis("encoder.conv_in.weight", 1),
        "out_channels": part.axis("decoder.conv_out.weight", 0),
        "block_out_channels": features or [part.axis("encoder.down.0.block.0.conv2.weight", 0)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": part.count("encoder.down.0.block.{}.conv2.weight"),
        "latent_channels": part.axis("decoder.conv_in.weight", 1),
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": attention in part,
        "use_quant_conv": "quant_conv.weight" in part,
        "use_post_quant_conv": "post_quant_conv.weight" in part,
    }
    if scaling_factor is not None:
        config["scaling_factor"] = scaling_factor
    convolved = attention in part and len(part.shape(attention)) == 4
    return Component(
        "AutoencoderKL",
        part,
        config,
        lambda module: autoencoder_table(module, convolved),
        (r"^loss\.", r"^model_ema\."),
    )


def clip_component(part: FilePart, family: Any) -> Component:
    """OpenAI's text encoder, under the names of transformers; family: of `CLIPTextModel`."""
    embedding = "text_model.embeddings.token_embedding.weight"
    width, vocabulary = part.axis(embedding, 1), part.axis(embedding, 0)
    config = {
        "architectures": ["CLIPTextModel"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": part.count("text_model.encoder.layers.{}.layer_norm1.weight"),
        "num_attention_heads": max(width // HEAD, 1),
        "intermediate_size": part.axis("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "max_position_embeddings": part.axis("text_model.embeddings.position_embedding.weight", 0),
        "hidden_act": "quick_gelu",
        "eos_token_id": vocabulary - 1,
    }
    return Component("CLIPTextModel", part, config, family.table, family.ignored)


def openclip_component(part: FilePart, penultimate: bool) -> Component:
    """OpenCLIP's text encoder. penultimate: it ends one block early, as Stable Diffusion 2 has it, and unprojected."""
    vocabulary, width = part.axis("token_embedding.weight", 0), part.axis("token_embedding.weight", 1)
    depth = part.count("transformer.resblocks.{}.ln_1.weight")
    name = "CLIPTextModel" if penultimate else "CLIPTextModelWithProjection"
    config = {
        "architectures": [name],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": depth - penultimate,
        "num_attention_heads": max(width // HEAD, 1),
        "intermediate_size": part.axis("transformer.resblocks.0.mlp.c_fc.weight", 0),
        "max_position_embeddings": part.axis("positional_embedding", 0),
        "hidden_act": "gelu",
        "eos_token_id": vocabulary - 1,
    }
    ignored = (r"^logit_scale$", r"^attn_mask$")
    if penultimate:
        ignored += (r"^text_projection$", rf"^transformer\.resblocks\.{depth - 1}\.")
    else:
        config["projection_dim"] = part.axis("text_projection", 1)
    return Component(name, part, config, openclip_table, ignored)


class SingleFile(NamedTuple):
    """What a single file holds.

    info, scheduler: what model_index.json and scheduler_config.json would say. components: by the name of their folder.
    padded: the id that pads each tokenizer's prompts, None for its end token.
    """

    info: dict[str, Any]
    scheduler: dict[str, Any]
    components: dict[str, Component]
    padded: dict[str, int | None]


NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}

SCHEDULERS = {
    1: {"_class_name": "PNDMScheduler", **NOISE, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
    2: {"_class_name": "DDIMScheduler", **NOISE, "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1},
    "xl": {"_class_name": "EulerDiscreteScheduler", **NOISE, "timestep_spacing": "leading", "steps_offset": 1},
    "dit": {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False},
}
"""What the published folders ship: Stable Diffusion 1, 2, XL and DiT."""

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def recognised(files: Any, prediction_type: str | None = None) -> SingleFile:
    """What the file is, by its names and shapes.

    prediction_type: "epsilon" or "v_prediction". Without it, it is what the file's metadata says, or epsilon; for
    Stable Diffusion 2, of which both were published, it is needed. Raises InvalidInput for a file of another kind.
    """
    names = set(files.names)
    if prediction_type is not None and prediction_type not in ("epsilon", "v_prediction"):
        raise unknown("prediction_type", prediction_type, ("epsilon", "v_prediction"))
    if "x_embedder.proj.weight" in names:
        return _dit(files)
    _refuse_others(files, names)
    encoders = {
        "clip": "cond_stage_model.transformer.",
        "openclip": "cond_stage_model.model.",
        "xl clip": "conditioner.embedders.0.transformer.",
        "xl openclip": "conditioner.embedders.1.model.",
        "refiner openclip": "conditioner.embedders.0.model.",
    }
    there = {kind for kind, prefix in encoders.items() if any(name.startswith(prefix) for name in names)}
    if there == {"clip"}:
        version: Any = 1
    elif there == {"openclip"}:
        version = 2
    elif there in ({"xl clip", "xl openclip"}, {"refiner openclip"}):
        version = "xl"
    else:
        found = f"that it holds {', '.join(sorted(there))} together" if there else "it holds no text encoder"
        told = "the text encoders of Stable Diffusion 1, 2 or XL in their original layout are needed"
        raise InvalidInput(f"{files.path} is no pipeline in a single file: {found}, but {told}.")
    predicted = _prediction(files, names, prediction_type, version)
    side = {1: 64, 2: 96 if predicted == "v_prediction" else 64, "xl": 128}[version]
    unet = unet_component(FilePart(files, UNET), side, version == "xl")
    components = {"unet": unet}
    if any(name.startswith(AUTOENCODER) for name in names):
        factor = 0.13025 if version == "xl" else 0.18215
        components["vae"] = autoencoder_component(FilePart(files, AUTOENCODER), factor)
    scheduler = {**SCHEDULERS[version], "prediction_type": predicted}
    if "ztsnr" in names:
        scheduler["rescale_betas_zero_snr"] = True
    joined = unet.config["in_channels"] - unet.config["out_channels"]
    if joined not in (0, 5):
        told = "only text to image, and inpainting with a mask and an image beside it, can be loaded"
        raise InvalidInput(f"{files.path}: its U-Net takes {joined} channels more than it gives, but {told}.")
    info: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if version == "xl" else "StableDiffusionPipeline"
    }
    if joined:
        info["_class_name"] = info["_class_name"].replace("Pipeline", "InpaintPipeline")
    padded: dict[str, int | None] = {}
    for kind in sorted(there):
        second = kind in ("xl openclip", "refiner openclip")
        name = "text_encoder_2" if second else "text_encoder"
        padded[name.replace("text_encoder", "tokenizer")] = 0 if "openclip" in kind else None
        info[name] = ["transformers", "CLIPTextModel"]
        if "openclip" in kind:
            components[name] = openclip_component(FilePart(files, encoders[kind]), penultimate=kind == "openclip")
        else:
            family = CLIP["CLIPTextModel"]
            components[name] = clip_component(FilePart(files, encoders[kind], family.aliases), family)
    if there == {"refiner openclip"}:
        info |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    used = (UNET, AUTOENCODER, *(encoders[kind] for kind in there))
    if left := sorted(name for name in names if not name.startswith(used) and not UNUSED.match(name)):
        warnings.warn(
            f"{files.path}: {_listed(left)} belong to no part of the pipeline and are left out.", stacklevel=4
        )
    return SingleFile(info, scheduler, components, padded)


def _prediction(files: Any, names: set[str], told: str | None, version: Any) -> str:
    said = files.metadata().get("modelspec.prediction_type")
    found = told or PREDICTIONS.get(said or "") or ("v_prediction" if "v_pred" in names else None)
    if found is None and version == 2:
        raise InvalidInput(
            f"{files.path} is a Stable Diffusion 2, of which there are two kinds that its tensors do not tell apart: "
            "give prediction_type='v_prediction' (768 pixels) or 'epsilon' (base, 512 pixels)."
        )
    return found or "epsilon"


def _dit(files: Any) -> SingleFile:
    part = FilePart(files)
    patch = part.axis("x_embedder.proj.weight", 2)
    config = {"_class_name": "dit_original"}
    if "pos_embed" in part:
        config["sample_size"] = patch * round(part.axis("pos_embed", 1) ** 0.5)
    network = Component("dit_original", part, config, DIT_ORIGINAL.table, DIT_ORIGINAL.ignored)
    return SingleFile({"_class_name": "DiTPipeline"}, SCHEDULERS["dit"], {"transformer": network}, {})


def _refuse_others(files: Any, names: set[str]) -> None:
    """Raises InvalidInput, with what to do instead, for a file that is no pipeline in the original layout."""
    if not any(name.startswith(f"{UNET}input_blocks.0.") for name in names):
        told = f"{UNET}input_blocks... of a U-Net, or x_embedder... of a DiT"
        if any(name.startswith(("lora_", "unet.", "text_encoder.")) or "lora_" in name for name in names):
            raise InvalidInput(f"{files.path} holds a LoRA and no network: give it as loras=[(file, weight)].")
        if lone_component(files) is not None or any(name.startswith("down_blocks.") for name in names):
            raise InvalidInput(f"{files.path} holds a single network and no pipeline: use load_pretrained.")
        raise InvalidInput(f"{files.path} holds {_listed(sorted(names))}, but {told}, are needed.")
    if "edm_mean" in names:
        raise invalid("checkpoint", str(files.path), "Playground 2.5 is trained with noise levels that cannot be read")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if names else "no tensors"


def lone_component(files: Any, scaling_factor: float | None = None) -> Component | None:
    """The one network of a file in the original layout: a U-Net, an autoencoder or a DiT; None for anything else."""
    names = set(files.names)
    if "x_embedder.proj.weight" in names:
        return _dit(files).components["transformer"]
    for prefix in (AUTOENCODER, ""):
        if f"{prefix}encoder.down.0.block.0.conv2.weight" in names:
            return autoencoder_component(FilePart(files, prefix), scaling_factor)
    for prefix in (UNET, ""):
        if f"{prefix}input_blocks.0.0.weight" in names and f"{prefix}out.2.weight" in names:
            part = FilePart(files, prefix)
            context = [part.axis(name, 1) for name in part.names if name.endswith("attn2.to_k.weight")]
            return unet_component(part, None, sized=bool(context) and max(context) > 1024)
    return None
