"""Checkpoints in the Hugging Face layout, in and out: from a folder to parameters on a mesh, and back.

Tensors go one by one from the mapped file to where they live: cast on the way, each process reading only the slices
that its devices hold. Which name is which parameter is said by the tables of the families.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffusion_jax.distributed import Rules, shardings
from diffusion_jax.errors import InvalidInput, nearest
from diffusion_jax.interop.families import FAMILIES, family_of, network_fields
from diffusion_jax.interop.files import TensorFiles, TensorWriter, local_folder, write_json
from diffusion_jax.interop.single_file import Component, lone_component
from diffusion_jax.interop.tables import Slot, nested, slots, their_shapes
from diffusion_jax.models import by_path
from diffusion_jax.reading import read_json

SHOWN = 5
"""How many tensors a message lists of each kind."""


class Pretrained(NamedTuple):
    """A network with its parameters.

    network: a `Network`, `Autoencoder` or `Encoder`. family: its entry of `FAMILIES`. config: their config.json.
    """

    network: Any
    params: Any
    family: str
    config: dict[str, Any]


def load_pretrained(
    folder: str | os.PathLike,
    *,
    family: str | None = None,
    variant: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **overrides: Any,
) -> Pretrained:
    """The network of a folder (config.json and safetensors, in one file or in shards), and its parameters.

    folder: a folder, a safetensors file, or a repo id (fetched by huggingface_hub where there is a network). A file
        without config.json beside it may be a U-Net, an autoencoder or a DiT in the layout of the original code.
    family: the class of the network, where no config.json tells. variant: "fp16" for `*.fp16.safetensors`.
    mesh, rules: where the parameters are put; on the first device without a mesh.
    param_dtype: dtype of the parameters. overrides: fields of the network, `dtype="bfloat16"`, `remat="full"`, ...
    Raises InvalidInput for files that are missing, damaged, pickled or of another network, with all tensors that are
    missing, unexpected or of another shape in one message.
    """
    placement = Placement(mesh, rules, param_dtype)
    path = local_folder(folder)
    root = path if path.is_dir() else path.parent
    source = root / "config.json"
    known = source.is_file()
    if path.is_file() and not family and not known:
        return _load_lone(path, placement, overrides)
    config = read_json(source) if known or not family else {}
    name = family_of(config, family, str(source))
    entry = FAMILIES[name]
    files = TensorFiles(path, variant, entry.aliases)
    return assembled(Component(name, files, config, entry.table, entry.ignored), str(source), placement, overrides)


class Placement(NamedTuple):
    """Where parameters are put, and their dtype; see `load_pretrained`."""

    mesh: Mesh | None = None
    rules: Rules | None = None
    param_dtype: DTypeLike = jnp.float32


def assembled(component: Component, source: str, placement: Placement, overrides: Mapping[str, Any]) -> Pretrained:
    """The network of a component with its parameters. source: what messages call its config. overrides: its fields."""
    name, files, config = component.family, component.part, component.config
    entry = FAMILIES[name]
    network = entry.make(**{**network_fields(name, config, files, source), **overrides})
    shapes = entry.shapes(network)
    places = slots(component.table(network.module), {path: leaf.shape for path, leaf in by_path(shapes).items()})
    check_tensors(files, their_shapes(places), component.ignored, name)
    check_copies(files, places)
    return Pretrained(network, read_params(files, places, shapes, *placement), name, config)


def _load_lone(path: Path, placement: Placement, overrides: Mapping[str, Any]) -> Pretrained:
    """The network of a file without a config, which its tensors tell."""
    files = TensorFiles(path)
    if any(name.startswith(("cond_stage_model.", "conditioner.")) for name in files.names):
        raise InvalidInput(f"{path} holds a whole pipeline: use load_pipeline, or sample --pretrained.")
    component = lone_component(files)
    if component is None:
        raise InvalidInput(
            f"{path} has no config.json beside it, and its tensors are of no network that is known in the original "
            f"layout: give family=, one of {', '.join(sorted(FAMILIES))}."
        )
    if component.family == "AutoencoderKL" and "scaling_factor" not in overrides:
        told = "0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL"
        raise InvalidInput(f"{path} is an autoencoder, whose tensors do not tell scaling_factor: give it ({told}).")
    return assembled(component, str(path), placement, overrides)


def check_tensors(files: Any, expected: Mapping[str, tuple], ignored: tuple[str, ...], family: str) -> None:
    """Raises InvalidInput with every tensor that is missing, unexpected or misshapen."""
    there = [name for name in files.names if not any(re.search(pattern, name) for pattern in ignored)]
    missing = [name for name in expected if name not in files.names]
    unexpected = [name for name in there if name not in expected]
    misshapen = [
        f"{name} is {list(files.shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in files.names and files.shape(name) != tuple(shape)
    ]
    problems = []
    if missing:
        close = nearest(missing[0], unexpected)
        problems.append(_listed("missing", missing) + (f" ({close!r} is near {missing[0]!r})" if close else ""))
    problems += [
        _listed(kind, names) for kind, names in (("unexpected", unexpected), ("misshapen", misshapen)) if names
    ]
    if problems:
        raise InvalidInput(f"{files.path} is no {family} of this config: {'; '.join(problems)}.")


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}"


def check_copies(files: Any, places: Mapping[str, Slot]) -> None:
    """Raises InvalidInput where the copies that become one tensor of ours differ."""
    for slot in places.values():
        if not slot.source.copies:
            continue
        first, *others = slot.names
        value = files.read(first)
        for other in others:
            if not np.array_equal(value, files.read(other)):
                raise InvalidInput(f"{files.path}: {first} and {other} differ, but here they are one tensor.")


def read_params(
    files: Any,
    places: Mapping[str, Slot],
    shapes: Any,
    mesh: Mesh | None,
    rules: Rules | None,
    dtype: DTypeLike,
) -> Any:
    """The parameters, each tensor put where `rules` place it on the mesh before the next is read."""
    if mesh is None:
        # On CPUs the array takes over the buffer that was filled.
        return nested(
            {path: jax.device_put(slot.whole(files.read, dtype), may_alias=True) for path, slot in places.items()}
        )
    layout = by_path(shardings(shapes, mesh, rules, strict=True))
    leaves = {}
    for path, slot in places.items():
        seen: dict[tuple, np.ndarray] = {}
        parts = []
        for device, index in layout[path].addressable_devices_indices_map(slot.shape).items():
            key = tuple((entry.start, entry.stop) for entry in index)
            if key not in seen:
                seen[key] = slot.fill(files.read, index, dtype)
            parts.append(jax.device_put(seen[key], device, may_alias=True))
        leaves[path] = jax.make_array_from_single_device_arrays(slot.shape, layout[path], parts)
    return nested(leaves)


def save_pretrained(
    folder: str | os.PathLike,
    pretrained: Pretrained,
    *,
    dtype: DTypeLike = np.float32,
    max_shard_bytes: int | float = 5e9,
) -> Path:
    """Writes config.json and safetensors in the peer's layout, so that the peer loads them; returns the folder.

    dtype: of the stored tensors. max_shard_bytes: where a file would be larger, there are several and an index.
    One layer of one tensor at a time comes to the host. Raises InvalidInput for parameters of another network.
    """
    entry = FAMILIES[family_of({}, pretrained.family)]
    module = pretrained.network.module
    leaves = by_path(pretrained.params)
    shapes = {path: leaf.shape for path, leaf in by_path(entry.shapes(pretrained.network)).items()}
    wrong = [path for path in {**shapes, **leaves} if path not in leaves or np.shape(leaves[path]) != shapes.get(path)]
    if wrong:
        raise InvalidInput(f"The parameters are not those of the network: {_listed('misfits', wrong)}.")
    config, places = entry.config(module), slots(entry.table(module), shapes)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    joined: dict[str, list[Slot]] = {}
    for slot in places.values():
        joined.setdefault(slot.source.name, []).append(slot)
    writer = TensorWriter(root, entry.library, max_shard_bytes)
    for group in joined.values():
        group.sort(key=lambda slot: slot.start)
        for layer, name in enumerate(group[0].names):
            parts = [slot.theirs(_host(leaves[slot.path], layer if slot.stacked else None)) for slot in group]
            value = parts[0] if len(parts) == 1 else np.concatenate(parts)
            writer.add(name, value.astype(dtype))
    for name, value in entry.buffers(module).items():
        writer.add(name, value.astype(dtype))
    writer.close()
    # What the config that was read says beside our fields (sample_size of a U-Net, versions) is kept.
    same = pretrained.config.get("_class_name", "") == config.get("_class_name")
    write_json(root / "config.json", {**pretrained.config, **config} if same else config)
    return root


def _host(leaf: Any, layer: int | None) -> np.ndarray:
    return np.asarray(leaf if layer is None else leaf[layer])
