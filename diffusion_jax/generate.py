"""`python -m diffusion_jax.sample --pretrained=FOLDER --prompt="..."`: images from a published checkpoint.

The folder is in the Hugging Face layout, as `interop.load_pipeline` takes it. Images are written as PNG, one a file,
with what made them beside them.
"""

import argparse
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import jax
import numpy as np
from jaxtyping import Float

from diffusion_jax import distributed, interop, pictures, pixels
from diffusion_jax.command import cache_compilations
from diffusion_jax.config import build, call
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.generation import pixel_step
from diffusion_jax.interop.image_inputs import FITS, fitted_masks, read_masks
from diffusion_jax.interop.prompt_weights import WEIGHTINGS
from diffusion_jax.interop.requests import next_smaller
from diffusion_jax.reading import read_json
from diffusion_jax.typing import Solver

MEASURED = ("seconds", "devices", "platform")
"""What generated.json says beside what was asked for."""


def parse_size(text: str) -> tuple[int, int]:
    """`"512x768"` as height and width."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not match:
        raise invalid("--size", text, "HEIGHTxWIDTH is needed, such as 512x768")
    return int(match[1]), int(match[2])


def parse_chunks(text: str) -> int | str:
    """`"auto"`, or a number."""
    if text != "auto" and not re.fullmatch(r"\d{1,5}", text):
        raise invalid("--chunks", text, "'auto' or a number is needed")
    return text if text == "auto" else int(text)


def parse_lora(text: str) -> tuple[str, float]:
    """`"file.safetensors:0.8"` as file and weight; the weight is 1 unless given."""
    path, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        return text, 1.0
    if not math.isfinite(number):
        raise invalid("--lora", text, "its weight must be a finite number")
    return path, number


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, background: str | None = None
) -> Float[np.ndarray, "H W 3"]:
    """A picture file as `[H, W, 3]` in [-1, 1], upright, stretched to `size` if that is given."""
    image = pixels.as_image(path, channels=3, background=background)
    return image if size is None else pixels.resize(image, size)


def starting_picture(arguments: argparse.Namespace, step: int) -> dict[str, Any]:
    """What `generate` is given of --image, --mask and --size; how they are made to fit is told."""
    if arguments.image is None:
        return {"size": arguments.size}
    height, width = given = read_image(arguments.image, background=arguments.background).shape[:2]
    wanted = arguments.size or next_smaller(given, step)
    if given != wanted:
        how = "cropped in the middle and resized" if arguments.fit == "crop" else "stretched"
        print(f"{arguments.image} is {height} x {width}; it is {how} to {wanted[0]} x {wanted[1]}")
    found = {"size": wanted, "image": arguments.image, "fit": arguments.fit, "background": arguments.background}
    if arguments.mask is None:
        return found
    own = read_image(arguments.mask, background="black").shape[:2]
    masks = read_masks(arguments.mask, own, str(arguments.mask))
    if own != given:
        print(
            f"{arguments.mask} is {own[0]} x {own[1]}; it is stretched to {height} x {width}, the size of the picture"
        )
        masks = fitted_masks(masks, given, "stretch")
    return {**found, "mask": masks[0]}


def check_output(folder: Path, asked: dict[str, Any]) -> None:
    """Raises InvalidInput where images of another call would be overwritten."""
    if not folder.is_dir():
        return
    there = sorted(path.name for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].png"))
    file = folder / "generated.json"
    stored = read_json(file) if file.is_file() else {}
    # As it would be read again.
    asked = json.loads(json.dumps(asked))
    other = [name for name in asked if stored.get(name) != asked[name]]
    if there and other:
        told = f"they were made with another {', '.join(other[:5])}" if stored else "nothing tells what made them"
        raise InvalidInput(f"{folder} holds {len(there)} images, and {told}: empty it or give --output.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.sample",
        description=__doc__,
        epilog='example: python -m diffusion_jax.sample --pretrained=checkpoints/sd15 --prompt="a red cube" '
        "--num-steps=30 --scale=7.5 --output=out/cubes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--pretrained", required=True, help="a folder with model_index.json, one safetensors file, or the id of a repo"
    )
    parser.add_argument("--prompt", action="append", default=[], help="text, or number or name of a class; repeatable")
    parser.add_argument("--negative", help="what the images should not show")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="default 1")
    parser.add_argument("--num-steps", type=int, help="default: that of the family")
    parser.add_argument("--scale", type=float, help="of guidance; 1 or less is none (default: that of the family)")
    parser.add_argument("--rescale", type=float, default=0.0, help="of guided answers, from 0 (default) to 1")
    parser.add_argument("--chunks", default="1", help="of 75 tokens, that prompts may fill, or auto (default 1)")
    parser.add_argument("--weighting", choices=sorted(WEIGHTINGS), help="read (word:1.3) and let it weigh so")
    parser.add_argument("--clip-skip", type=int, default=0, help="layers of CLIP left out (default 0)")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels (default: what the network is made for)")
    parser.add_argument("--solver", help="such as dpm_solver_pp or euler (default: the checkpoint's)")
    parser.add_argument("--image", type=Path, help="a picture to start from")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how --image is brought to the size (default crop)")
    parser.add_argument("--background", help="a colour, seen where --image is transparent")
    parser.add_argument(
        "--mask", type=Path, help="a picture that is white where --image is to be painted anew; grey changes less"
    )
    parser.add_argument("--strength", type=float, help="how much of --image is redone, in (0, 1]")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="repeatable")
    parser.add_argument("--vae", help="a folder or file with another autoencoder")
    parser.add_argument("--tokenizer", help="of a single file: the folder of CLIP's tokenizer")
    parser.add_argument("--prediction-type", help="of a single file of Stable Diffusion 2: epsilon or v_prediction")
    parser.add_argument(
        "--embedding", action="append", default=[], metavar="FILE", help="a word with vectors of its own; repeatable"
    )
    parser.add_argument("--refiner", help="a second folder, whose network goes on from --handover")
    parser.add_argument("--handover", type=float, default=0.2, help="the time, from 1 (noise) to 0 (default 0.2)")
    parser.add_argument("--variant", help='such as "fp16", for files with that in their names')
    parser.add_argument("--dtype", default="float32", help="of the network's arithmetic: float32 or bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--output", type=Path, default=Path("out/generated"), help="default out/generated")
    arguments = parser.parse_args(argv)
    if not arguments.prompt:
        raise InvalidInput("--prompt is missing: say what the images should show, once or several times.")
    if arguments.images_per_prompt < 1:
        raise invalid("--images-per-prompt", arguments.images_per_prompt, "it must be at least 1")
    if arguments.mask is not None and arguments.image is None:
        raise InvalidInput("--mask says what of a picture is painted anew, but --image was not given.")

    if not 0 <= arguments.seed < 2**32:
        raise invalid("--seed", arguments.seed, "a number in 0 .. 2^32 - 1 is needed")
    arguments.size = None if arguments.size is None else parse_size(arguments.size)
    arguments.chunks = parse_chunks(arguments.chunks)
    arguments.lora = [parse_lora(text) for text in arguments.lora]
    for path, background in ((arguments.image, arguments.background), (arguments.mask, "black")):
        if path is not None:
            read_image(path, background=background)
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    check_output(arguments.output, asked)

    cache_compilations()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        images, seconds = draw(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures.to_uint8(images)):
        imageio.imwrite(arguments.output / f"{number:05d}.png", picture)
    told = {**asked, **dict(zip(MEASURED, (seconds, jax.device_count(), jax.default_backend()), strict=True))}
    (arguments.output / "generated.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {len(images)} images to {arguments.output} in {seconds:.1f} s, compilation included")


def draw(arguments: argparse.Namespace) -> tuple[np.ndarray, float]:
    """The images that were asked for, and the seconds that it took."""
    count = len(arguments.prompt) * arguments.images_per_prompt
    # A batch that the devices do not divide runs on one of them.
    mesh = distributed.make_mesh() if count % jax.device_count() == 0 else None
    options = {"mesh": mesh, "variant": arguments.variant, "dtype": arguments.dtype}
    single = {"vae": arguments.vae, "tokenizer": arguments.tokenizer, "prediction_type": arguments.prediction_type}
    pipelines = [interop.load_pipeline(arguments.pretrained, loras=arguments.lora, **single, **options)]
    pipelines += [interop.load_pipeline(arguments.refiner, **options)] if arguments.refiner else []
    for path in arguments.embedding:
        pipelines = [interop.with_embeddings(one, path) for one in pipelines]
    if arguments.solver:
        solver = build(call(f"solvers.{arguments.solver}"))
        if not isinstance(solver, Solver):
            raise invalid("--solver", arguments.solver, "a solver such as dpm_solver_pp or euler is needed")
        pipelines = [one._replace(scheduler=one.scheduler._replace(solver=solver)) for one in pipelines]
    begun = time.perf_counter()
    images = interop.generate(
        pipelines[0],
        jax.random.key(arguments.seed),
        arguments.prompt,
        negative=arguments.negative,
        images_per_prompt=arguments.images_per_prompt,
        num_steps=arguments.num_steps,
        scale=arguments.scale,
        rescale=arguments.rescale,
        strength=arguments.strength,
        refiner=pipelines[1] if arguments.refiner else None,
        handover=arguments.handover,
        chunks=arguments.chunks,
        weighting=arguments.weighting,
        clip_skip=arguments.clip_skip,
        **starting_picture(arguments, pixel_step(pipelines[0])),
    )
    return np.asarray(images), time.perf_counter() - begun
