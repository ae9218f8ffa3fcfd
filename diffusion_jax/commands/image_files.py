"""Images as PNG files that say what made them, a grid of them, and one JSON file for all.

FOLDER/images/00000.png ...    each with its settings in text chunks: `parameters`, the line that other programs
                               read, and `diffusion_jax`, the same as JSON (`read_settings`)
FOLDER/samples.png             a grid of the first images
FOLDER/generated.json          the settings that all images share, and a list with those of each
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_jax import __version__, pictures, pixels, reading
from diffusion_jax.errors import InvalidInput
from diffusion_jax.shards import write_whole
from diffusion_jax.whole_files import written_whole

IMAGES, GRID, GENERATED = "images", "samples.png", "generated.json"

CHUNK = "diffusion_jax"
"""The text chunk of a PNG file that holds its settings as JSON."""

OF_AN_IMAGE = ("prompt", "class", "seed", "index")
"""Settings that stand with each image in the JSON, also where all images share them."""

MOST_SHOWN = 100
"""Images of a grid."""

NOT_COMPARED = ("version", "flags")
"""Settings that may differ between two files of one image: `flags` repeat what the others say."""

LABELS = {"steps": "Steps", "solver": "Sampler", "scale": "CFG scale", "seed": "Seed", "size": "Size"}
LABELS |= {"model": "Model", "index": "Index", "class": "Class"}
"""Names of settings in the line `parameters`, as other programs write and read them."""


def image_path(folder: Path, number: int) -> Path:
    return folder / IMAGES / f"{number:05d}.png"


def parameters_text(settings: Mapping[str, Any]) -> str:
    """Prompt, negative prompt and settings in the three lines that most image programs read."""
    shown = dict(settings)
    if "size" in shown:
        height, width = shown["size"]
        shown["size"] = f"{width}x{height}"
    told = [f"{label}: {shown[name]}" for name, label in LABELS.items() if shown.get(name) is not None]
    told.append(f"Version: diffusion_jax {settings.get('version', __version__)}")
    lines = [settings["prompt"]] if settings.get("prompt") else []
    lines += [f"Negative prompt: {settings['negative']}"] if settings.get("negative") else []
    return "\n".join([*lines, ", ".join(told)])


def write_image(path: Path, image: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Writes an image `[H, W, C]` (floats in [-1, 1] or uint8) as a PNG file with its settings, in one go."""
    settings = {**settings, "version": __version__}
    info = PngInfo()
    info.add_text("parameters", parameters_text(settings))
    info.add_text("Software", f"diffusion_jax {__version__}")
    info.add_text(CHUNK, json.dumps(settings))
    bytes_ = pictures.to_uint8(image)
    try:
        with written_whole(path) as draft:
            Image.fromarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_).save(draft, "PNG", pnginfo=info)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror or error}.") from None


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings that `write_image` stored. Raises InvalidInput for a file without any."""
    stored = _stored(path)
    if stored is None:
        raise InvalidInput(f"{path} does not say what made it: it has no settings of diffusion_jax.")
    return stored


def _stored(path: Path | str) -> dict[str, Any] | None:
    text = reading.read_image(path).info.get(CHUNK)
    return reading.parse_json(text, f"the settings in {path}") if isinstance(text, str) else None


def is_there(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the image was written already. Raises InvalidInput where another one has its name; a damaged file is
    told and counts as absent."""
    if not os.path.lexists(path):
        return False
    try:
        stored = _stored(path)
    except reading.Unreadable:
        raise
    except InvalidInput:
        print(f"{path} is damaged and is drawn again.")
        return False
    hint = f"empty {path.parent} or give --output"
    if stored is None:
        raise InvalidInput(f"{path} does not say what made it: {hint}.")
    # As it would be read again.
    wanted = json.loads(json.dumps(settings))
    names = [name for name in {**stored, **wanted} if name not in NOT_COMPARED]
    if other := [name for name in names if stored.get(name) != wanted.get(name)]:
        raise InvalidInput(f"{path} was made with another {', '.join(other[:5])}: {hint}.")
    return True


def check_no_more(folder: Path, count: int) -> None:
    """Raises InvalidInput where the folder holds images of a larger set."""
    there = [path for path in sorted((folder / IMAGES).glob("*.png")) if path.stem.isdecimal()]
    if more := [path for path in there if int(path.stem) >= count]:
        raise InvalidInput(
            f"{folder / IMAGES} holds {len(there)} images of another call, such as {more[0].name}: this one makes "
            f"{count}. Empty it or give --output."
        )


def write_overview(
    folder: Path, settings: Sequence[Mapping[str, Any]], measured: Mapping[str, Any], grid: bool = True
) -> None:
    """Writes the grid of the first images, and the JSON: what all settings share, `measured`, and each image's own."""
    first = settings[0]
    shared = {
        name: value
        for name, value in first.items()
        if name not in OF_AN_IMAGE and all(one.get(name) == value for one in settings)
    }
    images = [
        {"file": f"{IMAGES}/{image_path(folder, number).name}"}
        | {name: value for name, value in one.items() if name not in shared}
        for number, one in enumerate(settings)
    ]
    shown = [
        pixels.as_image(image_path(folder, number), channels=3) for number in range(min(len(settings), MOST_SHOWN))
    ]
    if grid and len({image.shape for image in shown}) == 1:
        pictures.save_grid(folder / GRID, np.stack(shown), math.ceil(math.sqrt(len(shown))))
    told = {**shared, "version": __version__, **measured, "images": images}
    write_whole(folder / GENERATED, json.dumps(told, indent=2) + "\n")
