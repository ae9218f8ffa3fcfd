"""LoRA files of every dialect, in and out: as trees of factors for `adapters.lora`.

Dialects differ in how they spell a module and the two factors: PEFT (`base_model.model.X.lora_A.weight`), diffusers
(`unet.X.lora_A.weight`, older `unet.X.lora.down.weight` and `X.processor.to_q_lora.down.weight`), kohya
(`lora_unet_X_with_underscores.lora_down.weight` and `.alpha`, for SDXL with the block names of the original code).
All are told apart tensor by tensor and looked up among the modules that the network's table names. The scale
`alpha / rank` is folded into B, so the factors go with `adapters.attached`.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from diffusion_jax.errors import InvalidInput, nearest, unknown
from diffusion_jax.interop.families import FAMILIES
from diffusion_jax.interop.files import TensorFiles, local_folder, read_json, write_json
from diffusion_jax.interop.pretrained import Pretrained
from diffusion_jax.interop.tables import Slot, nested, slots, their_shapes
from diffusion_jax.models import by_path

DIALECTS = ("diffusers", "peft", "kohya")

PREFIXES = {
    "unet": ("base_model.model", "unet", "transformer", "diffusion_model", "lora_unet", "lora_transformer"),
    "text_encoder": ("base_model.model", "text_encoder", "lora_te1", "lora_te"),
    "text_encoder_2": ("base_model.model", "text_encoder_2", "lora_te2"),
}
"""What stands before the modules of a component; the first is PEFT's, which has one component a file."""

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
"""The prefix that kohya's files are written with."""

ROLES = (
    (r"\.lora_A(\.\w+)?\.weight$", "down"),
    (r"\.lora_B(\.\w+)?\.weight$", "up"),
    (r"(\.lora\.|\.lora_|_lora\.|\.lora_linear_layer\.)down\.weight$", "down"),
    (r"(\.lora\.|\.lora_|_lora\.|\.lora_linear_layer\.)up\.weight$", "up"),
    (r"\.alpha$", "alpha"),
)

UNSUPPORTED = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "lora_mid", "oft_")

SGM_RESIDUAL = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


class Target(NamedTuple):
    """A layer of the network that can be adapted.

    module: its name in their files. shape: of its weight, theirs. slots: our kernels that this weight joins.
    layer: which layer of each of them, None where they are not stacked.
    """

    module: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    layer: int | None


def load_lora(path: str | os.PathLike, pretrained: Pretrained, component: str = "unet") -> Any:
    """The factors of a LoRA file (or of a folder with one) for a network: `{path: {"a": ..., "b": ...}}`, nested.

    component: whose factors are wanted where the file has several: "unet" (any denoising network), "text_encoder" or
    "text_encoder_2". All factors get the file's largest rank, with zeros where a layer has less or none.
    Raises InvalidInput for a file without factors for the component, for another base (every module that is not
    there or has another shape is listed), and for kinds of adapters that are not low-rank sums.
    """
    if component not in PREFIXES:
        raise unknown("component", component, PREFIXES)
    location = local_folder(path)
    files = TensorFiles(location)
    modules = _modules(files, component)
    if not modules:
        raise InvalidInput(f"{location} holds no LoRA factors for the component {component!r}.")
    targets = targets_of(pretrained)
    found, strange = {}, []
    for spelled, tensors in modules.items():
        name = _known(spelled, targets)
        if name is None or not {"down", "up"} <= set(tensors):
            strange.append(spelled)
        else:
            found[name] = tensors
    if strange:
        close = nearest(strange[0], targets)
        hint = f" ({close!r} is near)" if close else ""
        raise InvalidInput(
            f"{location} is a LoRA for another network than {pretrained.family}: it adapts {len(strange)} modules that "
            f"are not there, such as {strange[0]!r}{hint}."
        )
    alphas = _alphas(files, location, component)
    rank = max(files.shape(tensors["down"])[0] for tensors in found.values())
    leaves: dict[str, np.ndarray] = {}
    for name, tensors in found.items():
        down, up = files.read(tensors["down"]), files.read(tensors["up"])
        alpha = files.read(tensors["alpha"]).item() if "alpha" in tensors else alphas(targets[name], len(down))
        scaled = up.astype(np.float32) * (alpha / len(down))
        _place(leaves, targets[name], down.astype(np.float32), scaled, rank, location)
    return nested({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def components_of(path: str | os.PathLike) -> tuple[str, ...]:
    """The components that a LoRA file has factors for, in the order of `PREFIXES`."""
    names = TensorFiles(local_folder(path)).names
    found = {_component(name) or "unet" for name in names}
    return tuple(component for component in PREFIXES if component in found)


def _component(name: str) -> str | None:
    """The component that a tensor's prefix names, None where it has none or PEFT's."""
    flat = name.replace(".", "_")
    lengths = {
        component: max((len(prefix) for prefix in prefixes[1:] if flat.startswith(f"{prefix}_")), default=0)
        for component, prefixes in PREFIXES.items()
    }
    component = max(lengths, key=lengths.__getitem__)
    return component if lengths[component] else None


def save_lora(
    path: str | os.PathLike,
    pretrained: Pretrained,
    factors: Any,
    *,
    dialect: str = "diffusers",
    component: str = "unet",
) -> Path:
    """Writes factors whose scale is 1 (of `load_lora`, or of `adapters.lora` with alpha = rank); returns the file.

    dialect: "diffusers" and "kohya" write one safetensors file, "peft" a folder with adapter_config.json beside it.
    """
    if dialect not in DIALECTS:
        raise unknown("dialect", dialect, DIALECTS)
    if component not in PREFIXES:
        raise unknown("component", component, PREFIXES)
    leaves = by_path(factors)
    tensors, ranks = {}, {}
    for target in targets_of(pretrained).values():
        pair = _joined(leaves, target)
        if pair is not None:
            ranks[target.module] = len(pair[0])
            tensors |= _spelled(dialect, component, pretrained.family, target, *pair)
    if not tensors:
        raise InvalidInput(f"The factors belong to no layer of {pretrained.family}.")
    file = Path(path)
    if dialect == "peft":
        file.mkdir(parents=True, exist_ok=True)
        rank = max(ranks.values())
        write_json(
            file / "adapter_config.json",
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_modules": sorted(ranks),
                "rank_pattern": ranks,
                "alpha_pattern": ranks,
            },
        )
        file = file / "adapter_model.safetensors"
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.array(value, order="C") for name, value in tensors.items()}, file, metadata={"format": "pt"})
    return file


def targets_of(pretrained: Pretrained) -> dict[str, Target]:
    """Every layer that can be adapted, by its name in their files with underscores for dots."""
    entry = FAMILIES[pretrained.family]
    shapes = {path: leaf.shape for path, leaf in by_path(entry.shapes(pretrained.network)).items()}
    places = slots(entry.table(pretrained.network.module), shapes)
    whole = their_shapes(places)
    joined: dict[str, list[Slot]] = {}
    for slot in places.values():
        if slot.path.endswith("/kernel") and slot.source.name.endswith(".weight"):
            joined.setdefault(slot.source.name, []).append(slot)
    targets = {}
    for group in joined.values():
        group.sort(key=lambda slot: slot.start)
        for layer, name in enumerate(group[0].names):
            module = name.removesuffix(".weight")
            where = layer if group[0].stacked else None
            targets[module.replace(".", "_")] = Target(module, whole[name], tuple(group), where)
    return targets


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


def _modules(files, component):
    """The file's tensors by module (underscores for dots, without the prefix) and role."""
    modules: dict[str, dict[str, str]] = {}
    for name in files.names:
        for mark in UNSUPPORTED:
            if mark in name:
                raise InvalidInput(
                    f"{files.path} holds {name}: only sums W + B A are read, and {mark!r} is another kind."
                )
        role = next(((kind, match) for pattern, kind in ROLES if (match := re.search(pattern, name))), None)
        if role is None:
            raise InvalidInput(f"{files.path} holds {name}, which is no factor of a LoRA file.")
        kind, match = role
        module = name[: match.start()]
        if re.search(r"\.processor\.to_\w+$", module):
            module = module.replace(".processor.", ".")
            module = module + ".0" if module.endswith("to_out") else module
        if _component(name) not in (component, None):
            continue
        module = module.replace(".", "_")
        heads = [prefix.replace(".", "_") + "_" for prefix in PREFIXES[component]]
        own = max((head for head in heads if module.startswith(head)), key=len, default="")
        modules.setdefault(module.removeprefix(own), {})[kind] = name
    return modules


def _known(spelled: str, targets: Mapping[str, Target]) -> str | None:
    if spelled in targets:
        return spelled
    # Text encoders are saved with and without the name of their inner model.
    for other in (spelled.removeprefix("text_model_"), f"text_model_{spelled}"):
        if other in targets:
            return other
    return sgm_names(targets).get(spelled)


def _alphas(files, location, component):
    """`(target, rank) -> alpha` where the file itself has no alphas: from PEFT's config, or the rank."""
    folder = location if location.is_dir() else location.parent
    config = {}
    told = json.loads(files.metadata().get("lora_adapter_metadata", "{}"))
    if told:
        named = [
            {name.removeprefix(f"{head}."): value for name, value in told.items() if name.startswith(f"{head}.")}
            for head in PREFIXES[component]
        ]
        config = next((one for one in named if one), told)
    elif (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
    patterns = config.get("alpha_pattern") or {}

    def alpha(target, rank):
        if "lora_alpha" not in config:
            return float(rank)
        value = next((v for pattern, v in patterns.items() if re.search(rf"(^|\.){pattern}$", target.module)), None)
        value = config["lora_alpha"] if value is None else value
        return value * rank**0.5 if config.get("use_rslora") else value

    return alpha


def _module(slot: Slot) -> str:
    return slot.path.removesuffix("/kernel")


def _place(leaves, target, down, up, rank, location):
    """Writes one module's factors (theirs) into our leaves, made on the way."""
    outputs, *inputs = target.shape
    own = len(down)
    if (
        up.size != outputs * own
        or up.shape[:2] != (outputs, own)
        or list(down.shape)
        not in (
            [own, *inputs],
            [own, *inputs, 1, 1],
            [own, *(inputs if inputs[1:] != [1, 1] else inputs[:1])],
        )
    ):
        raise InvalidInput(
            f"{location} is a LoRA for another base: {target.module} has factors {list(up.shape)} and "
            f"{list(down.shape)} there, but a weight {list(target.shape)} here."
        )
    for slot in target.slots:
        inputs, outputs = slot.factors()
        a = np.moveaxis(down.reshape(own, -1)[:, inputs], 0, -1)
        b = up.reshape(target.shape[0], own)[slot.start + outputs].T
        stack = slot.shape[:1] if slot.stacked else ()
        first = leaves.setdefault(f"{_module(slot)}/a", np.zeros((*stack, *a.shape[:-1], rank), np.float32))
        second = leaves.setdefault(f"{_module(slot)}/b", np.zeros((*stack, rank, b.shape[-1]), np.float32))
        at = () if target.layer is None else (target.layer,)
        first[(*at, ..., slice(0, own))] = a
        second[(*at, slice(0, own), slice(None))] = b


def _joined(leaves, target):
    """Their two factors of a weight; where it joins several of ours, side by side, or shared where ours are equal."""
    downs, ups = [], []
    for slot in target.slots:
        if f"{_module(slot)}/a" not in leaves:
            continue
        a, b = (np.asarray(leaves[f"{_module(slot)}/{name}"], np.float32) for name in "ab")
        if target.layer is not None:
            a, b = a[target.layer], b[target.layer]
        inputs, outputs = slot.factors()
        down = np.zeros((a.shape[-1], math.prod(target.shape[1:])), np.float32)
        down[:, inputs] = np.moveaxis(a, -1, 0)
        up = np.zeros((target.shape[0], len(b)), np.float32)
        up[slot.start + outputs] = b.T
        if downs and np.array_equal(downs[-1], down):
            ups[-1] = ups[-1] + up
        else:
            downs.append(down)
            ups.append(up)
    if not downs:
        return None
    down, up = np.concatenate(downs).reshape(-1, *target.shape[1:]), np.concatenate(ups, axis=1)
    return down, up.reshape(*up.shape, *(1,) * (down.ndim - 2))


def _spelled(dialect, component, family, target, down, up):
    if dialect == "kohya":
        name = f"{KOHYA[component]}_{target.module.replace('.', '_')}"
        alpha = np.asarray(len(down), np.float32)
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    head = component
    if dialect == "peft":
        head = "base_model.model"
    elif component == "unet" and "Transformer" in family:
        head = "transformer"
    return {f"{head}.{target.module}.lora_A.weight": down, f"{head}.{target.module}.lora_B.weight": up}
