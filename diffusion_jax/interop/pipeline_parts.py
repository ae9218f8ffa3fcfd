"""What a pipeline is put together from, out of a folder in the Hugging Face layout or out of one file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.files import TensorFiles, local_folder, read_json
from diffusion_jax.interop.pretrained import Placement, Pretrained, assembled, load_pretrained
from diffusion_jax.interop.schedulers import Scheduler, read_scheduler
from diffusion_jax.interop.single_file import lone_component, recognised
from diffusion_jax.interop.tokenizers import Tokenizer, load_tokenizer


class PipelineParts(NamedTuple):
    """info: model_index.json. read: (name of a folder, **fields) -> the network there. tokenizer: (name) -> Tokenizer.

    scheduler: () -> Scheduler. source: (name) -> what messages call that network's config.
    """

    info: Fields
    read: Callable[..., Pretrained]
    tokenizer: Callable[[str], Tokenizer]
    scheduler: Callable[[], Scheduler]
    source: Callable[[str], str]


def folder_parts(root: Path, placement: Placement, variant: str | None) -> PipelineParts:
    """A folder with model_index.json and a folder for each part. variant: see `load_pretrained`."""
    if not (root / "model_index.json").is_file():
        raise InvalidInput(f"{root} has no model_index.json; for a single network use load_pretrained.")

    def read(name, **fields):
        # Published folders often lack the variant for some parts.
        there = variant if variant and list((root / name).glob(f"*.{variant}.*")) else None
        return load_pretrained(root / name, variant=there, **placement._asdict(), **fields)

    return PipelineParts(
        Fields(read_json(root / "model_index.json"), str(root / "model_index.json")),
        read,
        lambda name: load_tokenizer(root / name),
        lambda: read_scheduler(root / "scheduler"),
        lambda name: str(root / name / "config.json"),
    )


def file_parts(path: Path, placement: Placement, tokenizer: Any, prediction_type: str | None) -> PipelineParts:
    """One file in an original layout (`single_file`).

    tokenizer: a folder with CLIP's vocabulary; unless given, the folder `tokenizer` beside the file.
    prediction_type: see `single_file.recognised`.
    """
    files = TensorFiles(path)
    whole = recognised(files, prediction_type)

    def read(name, **fields):
        if name not in whole.components:
            raise InvalidInput(f"{path} holds no {name}: give {name}=, a folder or a file.")
        return assembled(whole.components[name], f"{path}, as read off its tensors,", placement, fields)

    def load(name):
        folder = path.parent / "tokenizer" if tokenizer is None else tokenizer
        if tokenizer is None and not folder.is_dir():
            raise InvalidInput(
                f"{path} holds no tokenizer, as no single file does: give tokenizer=, a folder with CLIP's vocab.json "
                "and merges.txt (that of any Stable Diffusion in the Hugging Face layout), or put it beside the file."
            )
        made = load_tokenizer(local_folder(folder))
        pad = whole.padded[name]
        if pad is None and made.end is None:
            raise InvalidInput(f"{folder} names no end token, with which prompts are padded.")
        return dataclasses.replace(made, pad=made.end if pad is None else pad)

    return PipelineParts(
        Fields(whole.info, str(path)), read, load, lambda: read_scheduler(whole.scheduler), lambda name: str(path)
    )


def load_autoencoder(path: Any, placement: Placement, pipeline: str) -> Pretrained:
    """An autoencoder by itself, of a folder or of a file. pipeline: the class of its pipeline, which tells the scale of
    its latents where it is in the original layout."""
    found = local_folder(path)
    if found.is_file() and not (found.parent / "config.json").is_file():
        component = lone_component(TensorFiles(found), 0.13025 if "XL" in pipeline else 0.18215)
        if component is not None:
            return assembled(component, f"{found}, as read off its tensors,", placement, {})
    return load_pretrained(found, **placement._asdict())
