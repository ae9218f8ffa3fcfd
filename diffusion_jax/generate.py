"""`python -m diffusion_jax.sample --pretrained=FOLDER --prompt="..."`: images from a published checkpoint.

The folder is in the Hugging Face layout, as `interop.load_pipeline` takes it. Images are written as PNG, one a file,
with what made them beside them.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as imageio
import jax
import numpy as np

from diffusion_jax import distributed, interop, pictures
from diffusion_jax.command import cache_compilations
from diffusion_jax.config import build, call
from diffusion_jax.errors import InvalidInput, invalid


def parse_size(text: str) -> tuple[int, int]:
    """`"512x768"` as height and width."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise invalid("--size", text, "HEIGHTxWIDTH is needed, such as 512x768")
    return int(parts[0]), int(parts[1])


def parse_lora(text: str) -> tuple[str, float]:
    """`"file.safetensors:0.8"` as file and weight; the weight is 1 unless given."""
    path, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0


def read_image(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """A picture as `[H, W, 3]` in [-1, 1], scaled to `size` if that is given."""
    from PIL import Image

    if not path.is_file():
        raise InvalidInput(f"{path} does not exist.")
    with Image.open(path) as image:
        image = image.convert("RGB")
        if size is not None:
            image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return np.asarray(image, np.float32) / 127.5 - 1.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.sample",
        description=__doc__,
        epilog='example: python -m diffusion_jax.sample --pretrained=checkpoints/sd15 --prompt="a red cube" '
        "--num-steps=30 --scale=7.5 --output=out/cubes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--pretrained", required=True, help="a folder with model_index.json, or the id of a repo")
    parser.add_argument("--prompt", action="append", default=[], help="text, or number or name of a class; repeatable")
    parser.add_argument("--negative", help="what the images should not show")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="default 1")
    parser.add_argument("--num-steps", type=int, help="default: that of the family")
    parser.add_argument("--scale", type=float, help="of guidance; 1 is none (default: that of the family)")
    parser.add_argument(
        "--size", type=parse_size, help="HEIGHTxWIDTH in pixels (default: what the network is made for)"
    )
    parser.add_argument("--solver", help="such as dpm_solver_pp or euler (default: the checkpoint's)")
    parser.add_argument("--image", type=Path, help="a picture to start from")
    parser.add_argument("--mask", type=Path, help="a picture that is white where --image is to be painted anew")
    parser.add_argument("--strength", type=float, help="how much of --image is redone, in (0, 1]")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="repeatable")
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

    cache_compilations()
    prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.images_per_prompt)]
    # A batch that the devices do not divide runs on one of them.
    mesh = distributed.make_mesh() if len(prompts) % jax.device_count() == 0 else None
    pipeline = interop.load_pipeline(
        arguments.pretrained,
        mesh=mesh,
        variant=arguments.variant,
        loras=[parse_lora(text) for text in arguments.lora],
        dtype=arguments.dtype,
    )
    if arguments.solver:
        solver = build(call(f"solvers.{arguments.solver}"))
        pipeline = pipeline._replace(scheduler=pipeline.scheduler._replace(solver=solver))
    size = arguments.size
    image = read_image(arguments.image, size) if arguments.image else None
    mask = None
    if arguments.mask:
        mask = read_image(arguments.mask, size if image is None else image.shape[:2]).mean(-1) > 0
    begun = time.perf_counter()
    images = interop.generate(
        pipeline,
        jax.random.key(arguments.seed),
        prompts,
        negative=arguments.negative,
        num_steps=arguments.num_steps,
        scale=arguments.scale,
        size=size,
        image=image,
        mask=mask,
        strength=arguments.strength,
    )
    images = np.asarray(images)
    seconds = time.perf_counter() - begun
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures.to_uint8(images)):
        imageio.imwrite(arguments.output / f"{number:05d}.png", picture)
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    told |= {"seconds": seconds, "devices": jax.device_count(), "platform": jax.default_backend()}
    (arguments.output / "generated.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {len(images)} images to {arguments.output} in {seconds:.1f} s, compilation included")
