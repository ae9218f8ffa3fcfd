"""`sample --pretrained=FOLDER`: images from a published checkpoint, with the fields of `config.sampling` applied to it.

The folder is in the Hugging Face layout, as `interop.load_pipeline` takes it. Images that an earlier call has written
are kept; `image_files` says what is written.
"""

import argparse
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from diffusion_jax import distributed, interop, pixels, summary
from diffusion_jax.clock import as_grid
from diffusion_jax.command import size_in_pixels
from diffusion_jax.commands.image_files import check_no_more, image_path, is_there, write_image, write_overview
from diffusion_jax.commands.sample_flags import (
    NOT_OF_AN_IMAGE,
    Request,
    SampleParser,
    batches,
    call_text,
    given_flags,
    set_steps,
)
from diffusion_jax.config import ConfigDict, build, call
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.generation import pixel_step
from diffusion_jax.interop.image_inputs import fitted_masks, read_masks
from diffusion_jax.interop.pipelines import Pipeline, adapted_network
from diffusion_jax.interop.requests import checked_size, next_smaller
from diffusion_jax.models.conditions import Label
from diffusion_jax.places import entries_of
from diffusion_jax.typing import Denoiser, Grid, Solver

DEFAULT_OUTPUT = Path("out/generated")

PER_DEVICE = 4
"""Images drawn at once on a device, unless a number is given."""

RESOLVED = ("steps", "solver", "scale", "size", "negative", "config")
"""Flags whose values stand among an image's settings as they come to be, defaults included."""


def checkpoint_config() -> ConfigDict:
    """What `--config.sampling` can set of a checkpoint. None: as the checkpoint's scheduler says."""
    group = {"solver": None, "grid": None, "acceleration": call("acceleration.accelerated", preset="plain")}
    return ConfigDict({"sampling": {**group, "transformations": {}}}, convert_dict=True)


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


def starting_picture(arguments: argparse.Namespace, size: tuple[int, int] | None, step: int) -> dict[str, Any]:
    """What `interop.generate` is given of --image, --mask and --size; how they are made to fit is told."""
    if arguments.image is None:
        return {"size": size}
    height, width = given = read_image(arguments.image, background=arguments.background).shape[:2]
    wanted = size or next_smaller(given, step)
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


def check_asked(pipeline: Pipeline, arguments: argparse.Namespace) -> None:
    """Raises InvalidInput where a model of classes is asked by texts, or the other way round."""
    streams = getattr(getattr(pipeline.network.network, "module", None), "conditions", ())
    of_classes = any(isinstance(stream, Label) for stream in streams)
    if of_classes and arguments.prompt:
        raise InvalidInput(
            f"{arguments.pretrained} was trained on classes: use --class=NAME or a number, not --prompt."
        )
    if not of_classes and arguments.classes:
        raise InvalidInput(f"{arguments.pretrained} was trained on texts: use --prompt, not --class.")


def load_pipelines(arguments: argparse.Namespace, mesh: Any) -> list[Pipeline]:
    """The pipeline, and the refiner where there is one, with what is attached to them."""
    options = {"mesh": mesh, "variant": arguments.variant, "dtype": arguments.dtype}
    single = {"vae": arguments.vae, "tokenizer": arguments.tokenizer, "prediction_type": arguments.prediction_type}
    loras = [parse_lora(text) for text in arguments.lora]
    pipelines = [interop.load_pipeline(arguments.pretrained, loras=loras, **single, **options)]
    pipelines += [interop.load_pipeline(arguments.refiner, **options)] if arguments.refiner else []
    if arguments.scheduler:
        pipelines[0] = interop.with_scheduler(pipelines[0], arguments.scheduler)
    for path in arguments.embedding:
        pipelines = [interop.with_embeddings(one, path) for one in pipelines]
    return pipelines


def configured(pipeline: Pipeline, config: ConfigDict) -> Pipeline:
    """The pipeline with what `config.sampling` says in the place of its own parts.

    Transformations stand around the guided denoiser and what the scheduler makes of it (clipping, thresholding).
    Raises InvalidInput for a part that does not fit its place.
    """
    scheduler, group, field = pipeline.scheduler, config.sampling, "config.sampling"
    context = {"process": scheduler.process}
    if group.solver is not None:
        solver = build(group.solver, Solver, f"{field}.solver", **context)
        scheduler = scheduler._replace(solver=solver)
    if group.grid is not None:
        grid = as_grid(build(group.grid, Grid, f"{field}.grid", **context))
        scheduler = scheduler._replace(grid=lambda num_steps, **_: grid)
    for name, entry in entries_of("sampling.transformations", config).items():
        where = f"{field}.transformations.{name}"
        if "null" in entry:
            raise invalid(where, entry.get("call"), "guidance of a checkpoint is set by --scale and --rescale")
        own = scheduler.transform

        def transform(denoiser, own=own, entry=entry, where=where):
            return build(entry, Denoiser, where, denoiser=own(denoiser), **context)

        scheduler = scheduler._replace(transform=transform)
    pipeline = pipeline._replace(scheduler=scheduler)
    if group.acceleration not in (None, call("acceleration.accelerated", preset="plain")):
        made = build(
            group.acceleration, Denoiser, f"{field}.acceleration", network=adapted_network(pipeline), **context
        )
        pipeline = pipeline._replace(denoiser=made)
    return pipeline


def solver_name(pipeline: Pipeline, group: ConfigDict) -> str:
    """What settings call the solver: the class of the checkpoint's scheduler unless another is given."""
    own = pipeline.scheduler.config.get("_class_name", "the checkpoint's")
    return own if group.solver is None else call_text(group.solver)


def run(
    parser: SampleParser, arguments: argparse.Namespace, config: ConfigDict, request: Request, changed: Sequence[str]
) -> None:
    """Draws the images of `request` that are not there yet. changed: the fields of `config` that were given."""
    if arguments.mask is not None and arguments.image is None:
        raise InvalidInput("--mask says what of a picture is painted anew, but --image was not given.")
    size = None if arguments.size is None else size_in_pixels(arguments.size)
    parse_chunks(arguments.chunks)
    for text in arguments.lora:
        parse_lora(text)
    for path, background in ((arguments.image, arguments.background), (arguments.mask, "black")):
        if path is not None:
            read_image(path, background=background)
    # A field that is given has the last word.
    if config.sampling.grid is not None and not any("steps" in one for one in changed if "sampling.grid" in one):
        set_steps(arguments, config)
    folder = arguments.output or DEFAULT_OUTPUT
    check_no_more(folder, request.total)

    several = jax.process_count() > 1
    parts = batches(request, arguments.batch_size or PER_DEVICE * jax.local_device_count())
    each = len(parts[0])
    # A batch that the devices do not divide runs on one of them.
    divides = each % jax.local_device_count() == 0
    mesh = distributed.make_mesh(devices=jax.local_devices()) if divides else None
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        pipelines = [configured(one, config) for one in load_pipelines(arguments, mesh)]
        pipeline = pipelines[0]
        check_asked(pipeline, arguments)
        picture = starting_picture(arguments, size, pixel_step(pipeline))
        settings = settings_of(parser, arguments, config, request, changed, pipeline, picture["size"])
        todo = [
            part
            for part in parts[jax.process_index() :: jax.process_count()]
            if False in {is_there(image_path(folder, number), settings[number]) for number in part}
        ]
        drawn = sum(map(len, todo))
        if not several or jax.process_index() == 0:
            rows = summary_of_checkpoint(
                arguments, pipelines, request, settings[0], each, request.total if several else drawn
            )
            print(summary.as_block("Sampling", rows), flush=True)
        seconds = _draw(arguments, pipelines, picture, request, todo, each, folder, settings)
    distributed.wait_for_all("images")
    if jax.process_index() == 0:
        measured = {"seconds": seconds, "devices": jax.device_count(), "platform": jax.default_backend()}
        write_overview(folder, settings, measured)
        where = folder / "images"
        if several:
            print(f"{request.total} images are in {where}, after {seconds:.1f} s of this process")
        else:
            kept = f", {request.total - drawn} were there" if drawn < request.total else ""
            print(
                f"Wrote {drawn} {'image' if drawn == 1 else 'images'} to {where} in {seconds:.1f} s, "
                f"compilation included{kept}"
            )


def settings_of(parser, arguments, config, request, changed, pipeline, size) -> list[dict[str, Any]]:
    """The settings of each image, which its file carries."""
    flags = given_flags(parser, arguments, NOT_OF_AN_IMAGE)
    size = checked_size(size or pipeline.size, pixel_step(pipeline))
    group = config.sampling
    steps = arguments.steps or pipeline.num_steps
    if group.grid is not None:
        steps = len(pipeline.scheduler.grid(steps)) - 1
    shared = {name: value for name, value in flags.items() if name.replace("-", "_") not in RESOLVED}
    shared["model"] = Path(shared.pop("pretrained")).name
    shared |= {
        "steps": steps,
        "solver": solver_name(pipeline, group),
        "scale": pipeline.scale if arguments.scale is None else arguments.scale,
        "size": list(size),
    }
    if arguments.negative is not None:
        shared["negative"] = arguments.negative
    if changed:
        shared["config"] = list(changed)
    flags |= {f"config.{field}": text for field, _, text in (one.partition("=") for one in changed)}
    kind = "class" if arguments.classes else "prompt"
    found = []
    for position in range(request.total):
        seed, index, asked = request.at(position)
        found.append({**shared, kind: asked, "seed": seed, "index": index, "flags": flags})
    return found


def summary_of_checkpoint(
    arguments: argparse.Namespace,
    pipelines: Sequence[Pipeline],
    request: Request,
    settings: dict[str, Any],
    each: int,
    drawn: int,
) -> dict[str, str]:
    """What is drawn, by what, on what, and where it goes."""
    height, width = settings["size"]
    params = tuple(one.params for one in pipelines)
    return {
        "model": f"{settings['model']}: {summary.parameters_in_words(params)}, computes in {arguments.dtype}",
        "sampler": f"{settings['steps']} steps of {settings['solver']}, guidance scale {settings['scale']:g}",
        "images": f"{request.total:,} of {height} x {width}, {drawn:,} to draw, {each:,} at once",
        "devices": summary.on_what() + (f", {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "output": str(arguments.output or DEFAULT_OUTPUT),
    }


def _draw(arguments, pipelines, picture, request, todo, each, folder, settings) -> float:
    """Draws and writes the images of `todo`; returns the seconds that it took."""
    begun = time.perf_counter()
    total = sum(map(len, todo))
    if todo:
        print("Compiling, then drawing the first images ...", flush=True)
    with tqdm(total=total, unit="image", desc="sampling", disable=True if arguments.no_progress else None) as bar:
        for done, part in enumerate(todo):
            # The last one is filled up, so that all batches are of one shape and compile once.
            rows = [request.at(number) for number in (*part, *part[-1:] * (each - len(part)))]
            images = interop.generate(
                pipelines[0],
                jax.random.key(rows[0][0]),
                [asked for _, _, asked in rows],
                negative=arguments.negative,
                num_steps=arguments.steps,
                scale=arguments.scale,
                rescale=arguments.rescale,
                strength=arguments.strength,
                refiner=pipelines[1] if arguments.refiner else None,
                handover=arguments.handover,
                chunks=parse_chunks(arguments.chunks),
                weighting=arguments.weighting,
                clip_skip=arguments.clip_skip,
                index=np.asarray([index for _, index, _ in rows], np.int32),
                **picture,
            )
            for number, image in zip(part, np.asarray(images)):
                if not is_there(image_path(folder, number), settings[number]):
                    write_image(image_path(folder, number), image, settings[number])
            if not done:
                print(
                    f"The first {len(part)} took {time.perf_counter() - begun:.1f} s, compilation included", flush=True
                )
                bar.unpause()
            bar.update(len(part))
    return time.perf_counter() - begun
