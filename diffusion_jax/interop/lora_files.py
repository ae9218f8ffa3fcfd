"""LoRA files of every dialect, in and out: as trees of adapters, see `adapters.trees`.

How a name is spelled is in `lora_names`, where a tensor belongs here in `lora_targets`, what it comes to in
`lora_values`, and its scale in `lora_scales`. Scales are folded into B, so a tree goes with `adapters.attached`.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from diffusion_jax.adapters import merged
from diffusion_jax.errors import InvalidInput, invalid, nearest, unknown
from diffusion_jax.interop.families import FAMILIES
from diffusion_jax.interop.files import TensorFiles, local_folder, write_json
from diffusion_jax.interop.lora_names import (
    COMPONENTS,
    PEFT,
    component_of,
    known_module,
    layout_hint,
    sgm_names,
    spelled_modules,
)
from diffusion_jax.interop.lora_scales import scales
from diffusion_jax.interop.lora_targets import (
    Module,
    joined_change,
    joined_factors,
    modules_of,
    place_change,
    place_factors,
)
from diffusion_jax.interop.lora_values import DECOMPOSED, Layer, LayerChange
from diffusion_jax.interop.pretrained import Pretrained
from diffusion_jax.interop.tables import nested
from diffusion_jax.models import by_path

CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the refiner of SDXL", 2048: "SDXL"}
"""The published U-Nets by the channels of the texts that they are told."""

DIALECTS = ("diffusers", "peft", "kohya", "kohya_sdxl")

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
"""The prefix that kohya's files are written with; beside a second text encoder, "lora_te1" is the first."""


def load_lora(
    path: str | os.PathLike, pretrained: Pretrained, component: str = "unet", *, partial: bool = False
) -> Any:
    """The adapter in a LoRA file (or in a folder with one) for a network, as a tree of `adapters.trees`.

    LoRA stays factors, `{path: {"a": ..., "b": ...}}`, nested; all get the file's largest rank, with zeros where a
    layer has less or none. DoRA, LoHa, LoKr, differences and trained parameters are changes of the parameters of
    `pretrained`: DoRA and trained parameters are right beside these parameters alone.
    component: whose layers are wanted where the file has several: "unet" (any denoising network), "text_encoder" or
    "text_encoder_2". partial: whether layers that the network lacks may be left out; how many is then a warning.
    Raises InvalidInput for a file without an adapter for the component, for another base (layers that are not there,
    or have another shape), for kinds of adapters that are not read, and for tensors that do not belong together.
    """
    if component not in COMPONENTS:
        raise unknown("component", component, COMPONENTS)
    location = local_folder(path)
    files = TensorFiles(location)
    spelled = spelled_modules(files.names, component, location, FAMILIES[pretrained.family].aliases)
    if not spelled:
        raise InvalidInput(f"{location} holds no LoRA factors for the component {component!r}.")
    modules = modules_of(pretrained)
    _check_context(spelled, modules, files, location)
    layers = _matched(spelled, modules, pretrained, location, partial)
    scale, config = scales(files, location, component)
    weights = by_path(pretrained.params) if pretrained.params is not None else {}

    def base(target):
        if not weights:
            raise InvalidInput(f"{location} changes {target.name} itself, so the network's parameters are needed.")
        return target.theirs(weights)

    plain = [names["down"] for names in layers.values() if "down" in names and not DECOMPOSED & set(names)]
    rank = max((files.shape(name)[0] for name in plain if files.shape(name)), default=0)
    leaves: dict[str, np.ndarray] = {}
    seen: dict[str, LayerChange] = {}
    for key, names in layers.items():
        if config.get("use_dora") and "down" in names and not DECOMPOSED & set(names):
            raise InvalidInput(f"{location} says use_dora, but {names['down']} has no lora_magnitude_vector beside it.")
        update = Layer(location, modules[key], names, files.read, scale, base).update()
        _check_copies(seen, modules, key, update, layers, location)
        _place(leaves, modules[key], update, rank)
    return nested({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def _check_context(spelled, modules, files: TensorFiles, location: Path) -> None:
    """Raises InvalidInput where a file is told of texts of other channels than the network: the usual mistake."""
    reading = re.compile(r"attn2_to_[kv]$")
    here = {m.weight.shape[1] for key, m in modules.items() if m.weight and reading.search(key)}
    downs = [files.shape(names["down"]) for name, names in spelled.items() if "down" in names and reading.search(name)]
    there = {shape[1] for shape in downs if len(shape) > 1}
    if len(here) == len(there) == 1 and here != there:
        (found,), (own,) = there, here
        told, ours = (f" ({CONTEXTS[size]})" if size in CONTEXTS else "" for size in (found, own))
        raise InvalidInput(
            f"{location} is a LoRA for another network: it is told of texts of {found} channels{told}, but this one of "
            f"{own}{ours}."
        )


def _matched(spelled, modules, pretrained, location, partial) -> dict[str, Mapping[str, str]]:
    """The names of the tensors of each layer of ours, by its key in `modules`."""
    found, strange = {}, []
    for name, names in spelled.items():
        key = known_module(name, modules)
        if key is None:
            strange.append(name)
        elif key in found:
            first, second = (next(iter(one.values())) for one in (found[key], names))
            raise InvalidInput(f"{location} says the same layer twice: {first} and {second}.")
        else:
            found[key] = names
    if strange and not (partial and found):
        close, layout = nearest(strange[0], modules), layout_hint(strange)
        hint = f" ({close!r} is near)" if close else ""
        hint += f"; it looks like one for {layout}" if layout and not found else ""
        hint += f"; partial=True leaves them out and reads the other {len(found)}" if found else ""
        raise InvalidInput(
            f"{location} is a LoRA for another network than {pretrained.family}: it adapts {len(strange)} modules that "
            f"are not there, such as {strange[0]!r}{hint}."
        )
    if strange:
        message = f"{location}: {len(strange)} of {len(spelled)} modules are not in a {pretrained.family}"
        warnings.warn(f"{message} and were left out, such as {strange[0]!r}.", stacklevel=3)
    return found


def _check_copies(seen, modules, key, update, layers, location) -> None:
    """Layers that their file repeats and that are one here must be changed alike."""
    target = modules[key].weight or modules[key].bias
    if not target.copies:
        return
    stem = target.slots[0].source.name.rpartition(".")[0]
    copies = {name.rpartition(".")[0].replace(".", "_") for name in target.copies}
    pairs = zip(_arrays(seen.setdefault(stem, update)), _arrays(update), strict=True)
    if not copies <= set(layers) or not all(np.array_equal(a, b) for a, b in pairs):
        raise InvalidInput(
            f"{location} adapts the copies of {stem} differently, but they are one layer here: a DiT keeps them apart "
            "with embeddings='per_block'."
        )


def _arrays(update):
    return [np.zeros(0) if one is None else one for one in (*(update.factors or (None, None)), *update[1:])]


def _place(leaves, module: Module, update: LayerChange, rank: int) -> None:
    if update.factors is not None and module.weight is not None:
        place_factors(leaves, module.weight, *update.factors, rank)
    for target, change in ((module.weight, update.weight), (module.bias, update.bias)):
        if change is not None and target is not None:
            place_change(leaves, target, change)


def components_of(path: str | os.PathLike) -> tuple[str, ...]:
    """The components that a LoRA file has tensors for, in the order of `COMPONENTS`."""
    names = TensorFiles(local_folder(path)).names
    found = {component_of(name) or "unet" for name in names}
    return tuple(component for component in COMPONENTS if component in found)


def merged_files(
    pretrained: Pretrained, weighted: Sequence[tuple[str | os.PathLike, Any]], component: str
) -> Pretrained:
    """The network with the adapters of those files that have one for the component merged into its parameters."""
    adapters = [
        (load_lora(path, pretrained, component), scale) for path, scale in weighted if component in components_of(path)
    ]
    params = pretrained.params
    for factors, scale in adapters:
        params = merged(params, factors, scale)
    return pretrained._replace(params=params)


def check_components(paths: Sequence[str | os.PathLike], known: Sequence[str]) -> None:
    """Raises InvalidInput for a LoRA file that adapts a component which is not among those `known`."""
    there = ", ".join(name for name in COMPONENTS if name in known)
    for path in paths:
        if lacking := [name for name in components_of(path) if name not in known]:
            raise InvalidInput(
                f"{path} adapts {', '.join(lacking)}, but the pipeline has {there} only: it is for another."
            )


def save_lora(
    path: str | os.PathLike,
    pretrained: Pretrained,
    factors: Any,
    *,
    dialect: str = "diffusers",
    component: str = "unet",
    beside: Mapping[str, tuple[Pretrained, Any]] | None = None,
) -> Path:
    """Writes a tree of `load_lora`, or factors of `adapters.lora` with alpha = rank; returns the file.

    dialect: "diffusers", "kohya" and "kohya_sdxl" (with the block names of the original code, as other programs have
    SDXL's) write one safetensors file, "peft" a folder with adapter_config.json beside it.
    beside: further components of the same file, `{"text_encoder": (pretrained, factors)}`.
    Raises InvalidInput where the dialect has no place for something: changes that are not factors go into kohya's.
    """
    if dialect not in DIALECTS:
        raise unknown("dialect", dialect, DIALECTS)
    parts = {component: (pretrained, factors), **(beside or {})}
    for name in parts:
        if name not in COMPONENTS:
            raise unknown("component", name, COMPONENTS)
    if dialect != "peft" and Path(path).suffix != ".safetensors":
        raise invalid("path", str(path), "the name of a .safetensors file is needed")
    if dialect == "peft" and len(parts) > 1:
        raise invalid("beside", sorted(beside or {}), "a folder of PEFT holds one component")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, (network, tree) in parts.items():
        written, theirs = _spelled(dialect, name, network, tree, "text_encoder_2" in parts)
        tensors |= written
        ranks |= theirs
    file = Path(path)
    if dialect == "peft":
        file.mkdir(parents=True, exist_ok=True)
        rank = max(ranks.values())
        others = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
        write_json(
            file / "adapter_config.json",
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_modules": sorted(ranks),
                "rank_pattern": others,
                "alpha_pattern": others,
            },
        )
        file = file / "adapter_model.safetensors"
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.array(value, order="C") for name, value in tensors.items()}, file, metadata={"format": "pt"})
    return file


def _spelled(dialect, component, pretrained, factors, two_encoders):
    """A component's tensors by their names, and the ranks of the layers that have factors."""
    leaves = by_path(factors)
    modules = modules_of(pretrained)
    theirs = {key: key for key in modules}
    if dialect == "kohya_sdxl":
        if component == "unet" and pretrained.family != "UNet2DConditionModel":
            raise invalid("dialect", dialect, f"a {pretrained.family} has no block names of the original code")
        theirs |= {key: name for name, key in sgm_names(modules).items()} if component == "unet" else {}
    head = KOHYA[component]
    if component == "text_encoder" and (two_encoders or dialect == "kohya_sdxl"):
        head = "lora_te1"
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    used: set[str] = set()
    for key, module in modules.items():
        used |= _paths(module)
        update = _update_of(leaves, module)
        if update.factors is not None:
            ranks[module.name] = len(update.factors[0])
        if dialect.startswith("kohya"):
            tensors |= _kohya(f"{head}_{theirs[key]}", update, module)
        else:
            if update.weight is not None or update.bias is not None:
                raise invalid(
                    "dialect", dialect, f"{module.name} has changes that are not factors, which 'kohya' has a place for"
                )
            if update.factors is not None:
                name = f"{_dotted_head(dialect, component, pretrained.family)}.{module.name}"
                tensors |= {f"{name}.lora_A.weight": update.factors[0], f"{name}.lora_B.weight": update.factors[1]}
    if idle := sorted(set(leaves) - used):
        raise InvalidInput(
            f"The factors of {idle[0]} belong to no layer of {pretrained.family} that has a file's name."
        )
    if not tensors:
        raise InvalidInput(f"The factors belong to no layer of {pretrained.family}, or are all 0.")
    return tensors, ranks


def _paths(module: Module) -> set[str]:
    """The entries of a tree that a layer's tensors tell."""
    paths = {slot.path for target in module[1:] if target for slot in target.slots}
    return paths | {
        f"{path.removesuffix('/kernel')}/{name}" for path in paths if path.endswith("/kernel") for name in "ab"
    }


def _update_of(leaves, module: Module) -> LayerChange:
    factors = joined_factors(leaves, module.weight) if module.weight and module.weight.low_rank else None
    changes = [joined_change(leaves, target) if target else None for target in module[1:]]
    return LayerChange(factors, *(None if change is None or not change.any() else change for change in changes))


def _kohya(name, update: LayerChange, module: Module) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    if update.factors is not None:
        down, up = update.factors
        alpha = np.asarray(len(down), np.float32)
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    norm = module.weight is not None and len(module.weight.shape) == 1
    for change, role in ((update.weight, "w_norm" if norm else "diff"), (update.bias, "b_norm" if norm else "diff_b")):
        if change is not None:
            tensors[f"{name}.{role}"] = change
    return tensors


def _dotted_head(dialect, component, family):
    if dialect == "peft":
        return PEFT
    return "transformer" if component == "unet" and "Transformer" in family else component
