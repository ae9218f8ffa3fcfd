"""Pictures with captions or classes as examples for a pipeline: what its network is told of each, and their latents."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import data
from diffusion_jax.data.image_folders import ImageFolder
from diffusion_jax.distributed import automatic, batch_sharding, batch_shards, replicated
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.pipelines import Pipeline
from diffusion_jax.models.conditions import Label
from diffusion_jax.models.layers.conditioning import find_stream
from diffusion_jax.reading import IMAGE_FORMATS, first_line, regular_file

TRANSPOSED = (5, 6, 7, 8)
"""Orientations of EXIF at which height and width change places."""

ORIENTATION = 0x0112


def reads_classes(pipeline: Pipeline) -> bool:
    """Whether the network is told a class, and not a text."""
    return find_stream(pipeline.network.network.module.conditions, Label) is not None


def prompted(source: ImageFolder, pipeline: Pipeline, size: tuple[int, int]) -> ImageFolder:
    """`source` with what the network of `pipeline` is told of each picture as its condition.

    source: `data.captioned_folder`; for a network that knows classes, `data.image_folder` with a subfolder a class,
        which is called as the class is (see `class_numbers`).
    size: height and width that the pictures have.

    Texts are encoded once, equal ones together, and held in memory, since no augmentation changes them. Where the
    network reads how pictures lie in their frame (SDXL), it is told the height and width of the file and the corner of
    the middle square.
    """
    if not isinstance(source, ImageFolder):
        raise InvalidInput(f"A folder of pictures (data.captioned_folder) is needed, not a {type(source).__name__}.")
    texts = source.captions
    if reads_classes(pipeline):
        if source.class_names is None or source.labels is None:
            raise InvalidInput(f"This network is told classes: {source.name!r} must have a subfolder for each of them.")
        numbers = class_numbers(pipeline, source.class_names)
        texts = tuple(str(numbers[source.class_names[label]]) for label in source.labels)
    elif texts is None:
        raise InvalidInput(
            f"This network is told texts, so the pictures in {source.name!r} need captions: data.captioned_folder."
        )

    def encode(texts: Sequence[str]) -> dict[str, Any]:
        return jax.device_get(replicated(pipeline.prompter.main(list(texts), size), pipeline.mesh))

    bare = dataclasses.replace(source, cond={}, captions=texts, class_names=None)
    told = data.encoded_captions(bare, encode, batch=min(64, len(set(texts))))
    # Numbers of classes, one a picture, are no rows to share.
    cond = {name: rows[np.arange(len(rows))] if rows.ndim == 1 else rows for name, rows in told.cond.items()}
    reads_frames = pipeline.prompter.framed(np.zeros((1, 2)), np.zeros((1, 2)), size)
    frame = pipeline.prompter.framed(*_frames(source, size), size) if reads_frames else {}
    return dataclasses.replace(told, cond={**cond, **frame})


def class_numbers(pipeline: Pipeline, names: Sequence[str]) -> dict[str, int]:
    """The number that the network has for each class: that of its name, or the name itself where it is a number.

    Where it knows none of the names, they are new classes, which take the places 0, 1, ... in their order. Raises
    InvalidInput where it knows some names and not others, and for more classes than it has.
    """

    def number(name):
        return int(pipeline.prompter.main([name], None)["label"][0])

    known, strange = {}, None
    for name in names:
        try:
            known[name] = number(name)
        except InvalidInput as problem:
            strange = problem
    if strange is None:
        return known
    if known:
        raise strange
    return {name: number(place) for place, name in enumerate(names)}


def latent_examples(source: ImageFolder, pipeline: Pipeline, batch: int = 8) -> data.ArraySource:
    """`source` with the latents of its pictures (the means of the posterior), encoded once and held in memory.

    batch: how many pictures each device encodes at once.
    """
    mesh, autoencoder = pipeline.mesh, pipeline.autoencoder
    whole = None if mesh is None else NamedSharding(automatic(mesh), PartitionSpec())
    encode = jax.jit(autoencoder.network.encode, out_shardings=whole)

    def latents(x):
        return encode(autoencoder.params, x if mesh is None else jax.device_put(x, batch_sharding(mesh)))

    count = batch * (1 if mesh is None else batch_shards(mesh))
    pictures = data.encoded(dataclasses.replace(source, cond={}), latents, count)
    return data.ArraySource(pictures.x0, source.cond, f"latents of {source.name}")


def _frames(source: ImageFolder, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of each file, and the corner of its middle square once its shorter side is as long as that."""
    original = np.asarray([upright_size(path) for path in source.files], np.float64)
    resized = np.round(original * (min(size) / original.min(axis=1, keepdims=True)))
    return original, np.maximum(resized - np.asarray(size), 0) // 2


def upright_size(path: Any) -> tuple[int, int]:
    """Height and width of a picture file as it is seen, from its head alone."""
    from PIL import Image

    try:
        with Image.open(regular_file(path), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TRANSPOSED
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be decoded as a picture: {first_line(error)}.") from None
    return (width, height) if turned else (height, width)
