"""Writing a whole pipeline as a folder that diffusers loads, and telling one base from another."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.files import TensorFiles, local_folder, write_json
from diffusion_jax.interop.pipelines import KINDS, Pipeline, pipeline_class
from diffusion_jax.interop.pretrained import save_pretrained
from diffusion_jax.reading import read_json

BLOCKS, BLOCK_BYTES = 64, 4096
"""How many blocks of a file of weights its digest reads, spread evenly, and how large each is."""

KEPT = (".json", ".txt", ".model", ".safetensors")
"""What is copied of the parts of a pipeline: what a loader reads that opens no pickles."""


def save_pipeline(folder: str | os.PathLike, pipeline: Pipeline, base: str | os.PathLike, **info: Any) -> Path:
    """Writes `pipeline`, loaded from the folder `base`, with its own network and everything else of `base`; returns the
    folder. `load_pipeline` and diffusers' `from_pretrained` read it.

    The folder appears when it is complete, and takes the place of one that was written there before.
    info: further entries of model_index.json. Raises InvalidInput where `base` is a single file, which has no folders
    of its parts, and where `folder` holds something else than a pipeline.
    """
    root, target = local_folder(base), Path(folder)
    if not root.is_dir():
        raise InvalidInput(f"{root} is a single file: a pipeline in folders is needed to write another beside it.")
    if target.exists() and not (target / "model_index.json").is_file() and any(target.iterdir()):
        raise InvalidInput(f"{target} holds something else than a pipeline: give another folder.")
    name = KINDS[pipeline_class(base)].network
    index = read_json(root / "model_index.json")
    draft = target.with_name(target.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for part in sorted(path for path in root.iterdir() if path.is_dir() and path.name != name):
        for file in sorted(path for path in part.iterdir() if path.is_file() and path.suffix in KEPT):
            (draft / part.name).mkdir(exist_ok=True)
            shutil.copyfile(file, draft / part.name / file.name)
    save_pretrained(draft / name, pipeline.network._replace(params=pipeline.params))
    write_json(draft / "model_index.json", {**index, **info})
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return target


def base_digest(base: str | os.PathLike, variant: str | None = None) -> str:
    """What tells the denoising network in a folder or a file from others of the same shapes: of every file of weights
    its size and some of its bytes, so that the largest ones take no time."""
    root = local_folder(base)
    part = root
    if root.is_dir():
        part = root / KINDS[pipeline_class(base)].network
        variant = variant if variant and list(part.glob(f"*.{variant}.*")) else None
    found = hashlib.sha256()
    for file in TensorFiles(part, variant).files:
        size = file.stat().st_size
        found.update(size.to_bytes(8, "big"))
        with file.open("rb") as opened:
            for block in range(BLOCKS):
                opened.seek(max(0, size - BLOCK_BYTES) * block // max(1, BLOCKS - 1))
                found.update(opened.read(BLOCK_BYTES))
    return found.hexdigest()[:16]


def new_class_names(base: str | os.PathLike, numbers: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """The entry `id2label` of a model_index.json in which these classes have their new names."""
    root = local_folder(base)
    stored = read_json(root / "model_index.json").get("id2label") if root.is_dir() else None
    return {"id2label": {**(stored or {}), **{str(number): name for name, number in numbers.items()}}}
