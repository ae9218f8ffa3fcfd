"""The flags of `sample`, for training runs and for pretrained checkpoints alike, and what they ask for."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.command_parser import CommandParser
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.image_inputs import FITS
from diffusion_jax.interop.prompt_weights import WEIGHTINGS

DESCRIPTION = """Draws samples, from a model that was trained here or from a published checkpoint.

  --workdir=RUN        a training run: samples are stored in shards (NPZ files), which `evaluate` reads, and a few of
                       them are also written as PNG files.
  --pretrained=FOLDER  a checkpoint in the Hugging Face layout, or one safetensors file: images are written as
                       PNG files.

Every PNG file carries the settings that made it. What an earlier call of the same settings has finished is kept, so an
interrupted call can be repeated. Files of other settings are never overwritten."""

EXAMPLES = """examples:
  diffusion-jax sample --workdir=out/digits --num-samples=1000
  diffusion-jax sample --workdir=out/digits --class=3,7 --num-samples=16 --steps=50 --output=out/threes
  diffusion-jax sample --pretrained=checkpoints/sd15 --prompt="a red cube" --steps=30 --seeds=1,2,3
  diffusion-jax sample --pretrained=checkpoints/sd15 --prompt="a red cube" --solver=dpm_solver_pp \\
      --config.sampling.acceleration.preset=taylorseer"""

RUN, PRETRAINED = "a training run (--workdir)", "a pretrained checkpoint (--pretrained)"

HINTS = {
    "size": "a run takes --config.sampling.size, where its network can draw other sizes than those of its data",
    "negative": "guidance of a run compares with the null condition of its training",
    "lora": "attach it with diffusion_jax.adapters and save the parameters as a run of its own",
    "shard_size": "images of a checkpoint are PNG files, not shards",
    "format": "images of a checkpoint are PNG files, not shards",
    "png": "images of a checkpoint are always PNG files",
    "config": "what can be set of a checkpoint is --config.sampling.FIELD=VALUE",
    "trust": "no stored config is read for a checkpoint",
}
"""Why a flag does not apply, where there is more to say than that."""

MOST_SEEDS = 10_000

NOT_OF_AN_IMAGE = ("help", "like", "output", "no_progress", "prompt", "classes", "images_per_prompt", "num_samples")
NOT_OF_AN_IMAGE += ("seed", "seeds", "index", "batch_size")
"""Flags that say which images are drawn, or where they go, not what an image is."""


class SampleParser(CommandParser):
    """The parser, and which flags are for one kind of source alone: `only[dest]`."""

    def __init__(self) -> None:
        super().__init__(
            "sample",
            usage="%(prog)s (--workdir=RUN | --pretrained=FOLDER) [options]",
            description=DESCRIPTION,
            epilog=EXAMPLES,
        )
        self.only: dict[str, str] = {"config": RUN, "trust": RUN}


def sample_parser() -> SampleParser:
    parser = SampleParser()

    def group(title: str, only: str | None = None):
        made = parser.add_argument_group(title if only is None else f"{title}, for {only}")

        def add(*names: str, **options: Any) -> None:
            action = made.add_argument(*names, **options)
            if only is not None:
                parser.only[action.dest] = only

        return add

    add = group("what to sample from (one of the two)")
    add("--workdir", type=Path, metavar="RUN", help="the folder of a training run; its config is used")
    add(
        "--pretrained",
        metavar="FOLDER",
        help="a folder with model_index.json, one safetensors file, or the id of a repo",
    )

    add = group("what to sample")
    add("--class", dest="classes", action="append", default=[], metavar="NAMES", help="names or numbers of classes")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a text; repeat the flag for several")
    add("--images-per-prompt", type=int, metavar="N", help="images of each prompt or class (default 1)")
    add(
        "--num-samples",
        type=int,
        metavar="N",
        help="samples of each seed; prompts or classes take turns (default for a run without them: 1000)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the noise (default 0); image i of a seed is the same whatever else is drawn",
    )
    add("--seeds", metavar="N,N,...", help="several, such as 1,2,3: the images that --seed would draw for each of them")
    add(
        "--like",
        type=Path,
        metavar="PNG",
        help="take all settings that are not given from a PNG file written by sample",
    )
    add("--index", metavar="N,N,...", help="draw only these images of the set, such as 3 or 3,7; no shards are written")

    add = group("what to sample", PRETRAINED)
    add("--negative", metavar="TEXT", help="what the images should not show")
    add("--size", metavar="SIZE", help="side, or HEIGHTxWIDTH, in pixels (default: what the network was made for)")
    add("--image", type=Path, metavar="FILE", help="a picture to start from")
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="a picture that is white where --image is painted anew; grey changes less",
    )
    add("--strength", type=float, help="how much of --image is redone, in (0, 1]")
    add("--fit", choices=FITS, default="crop", help="how --image is brought to the size (default crop)")
    add("--background", metavar="COLOUR", help="a colour, seen where --image is transparent")

    add = group("how to sample (default: as the run's config or the checkpoint says)")
    add("--steps", type=int, metavar="N", help="number of steps of the solver")
    add("--solver", metavar="NAME", help="such as dpm_solver_pp, euler or 'ddim(eta=0.5)'")
    add("--scale", type=float, help="of guidance; 1 is none")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images drawn at once (default: the run's; 4 a device for a checkpoint)",
    )
    add(
        "--config.sampling.FIELD",
        metavar="VALUE",
        dest="_sampling_help",
        help="any field of the sampling config: solver.order=3, grid.steps=20, acceleration.preset=taylorseer",
    )

    add = group("how to sample", PRETRAINED)
    add("--rescale", type=float, default=0.0, help="of guided answers, from 0 (default) to 1")
    add("--chunks", default="1", help="chunks of 75 tokens that a prompt may fill, or auto (default 1)")
    add("--weighting", choices=sorted(WEIGHTINGS), help="read (word:1.3), and let it weigh as that program does")
    add("--clip-skip", type=int, default=0, help="layers of CLIP left out (default 0)")
    add("--dtype", default="float32", help="of the network's arithmetic: float32 (default) or bfloat16")

    add = group("parts", PRETRAINED)
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="repeatable")
    add(
        "--scheduler", metavar="CLASS", help="of diffusers, e.g. LCMScheduler for a student (default: the checkpoint's)"
    )
    add("--embedding", action="append", default=[], metavar="FILE", help="a word with vectors of its own; repeatable")
    add("--vae", metavar="FOLDER", help="a folder or file with another autoencoder")
    add("--refiner", metavar="FOLDER", help="a second checkpoint, whose network goes on from --handover")
    add("--handover", type=float, default=0.2, help="the time, from 1 (noise) to 0 (default 0.2)")
    add("--variant", help='such as "fp16", for files with that in their names')
    add("--tokenizer", metavar="FOLDER", help="for a single file: the folder of CLIP's tokenizer")
    add("--prediction-type", metavar="NAME", help="for a single file of Stable Diffusion 2: epsilon or v_prediction")

    add = group("parts", RUN)
    add("--step", type=int, metavar="N", help="the checkpoint of that training step (default: the newest)")

    add = group("where it goes")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="a folder for everything that is written (default: WORKDIR/samples for shards and images, WORKDIR for "
        "pictures of them; out/generated for a checkpoint)",
    )
    add("--no-progress", action="store_true", help="no progress bar")

    add = group("where it goes", RUN)
    add(
        "--png",
        action=argparse.BooleanOptionalAction,
        help="write each sample as images/NUMBER.png too (default: up to 100 samples are)",
    )
    add("--shard-size", type=int, default=1000, metavar="N", help="samples a file (default 1000)")
    add("--format", choices=("npz", "arrayrecord"), default="npz", help="default npz")
    add("--save-trajectory", action="store_true", help="also write denoising.png, noise to sample")
    add("--save-predictions", action="store_true", help="also write predictions.png, the sample as predicted over time")
    return parser


def check_applies(parser: SampleParser, argv: Sequence[str], source: str) -> None:
    """Raises InvalidInput for a flag of `argv` that is not for this kind of source."""
    given = {argument.split("=")[0] for argument in argv}
    for action in parser._actions:
        only = parser.only.get(action.dest)
        for name in action.option_strings:
            if name in given and only not in (None, source):
                why = HINTS.get(action.dest)
                raise InvalidInput(
                    f"{name} is for {only}, but the samples come from {source}" + (f": {why}." if why else ".")
                )


class Request(NamedTuple):
    """Which images are asked for, of every seed.

    asked: the prompt or class of each image, as it was written; empty where none was given. count: images of a seed.
    index: those of them that are drawn. single: whether `--index` picked them. prompts: as they were given, and
    of_each: images of each; None where they take turns.
    """

    seeds: tuple[int, ...]
    asked: tuple[str, ...]
    count: int
    index: tuple[int, ...]
    single: bool
    prompts: tuple[str, ...]
    of_each: int | None

    @property
    def total(self) -> int:
        return len(self.seeds) * len(self.index)

    def at(self, position: int) -> tuple[int, int, str | None]:
        """Seed, index within the seed, and what was asked, of the image with this number among all that are drawn."""
        index = self.index[position % len(self.index)]
        return self.seeds[position // len(self.index)], index, self.asked[index] if self.asked else None


def parse_request(arguments: argparse.Namespace, default_count: int | None) -> Request:
    """default_count: of images where neither prompts nor a number are given; None where a prompt or class is needed."""
    for name in ("num_samples", "images_per_prompt", "shard_size", "batch_size", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise invalid("--" + name.replace("_", "-"), value, "it must be at least 1")
    if arguments.prompt and arguments.classes:
        raise InvalidInput("--prompt and --class were both given: a model is asked by texts or by classes.")
    prompts = list(arguments.prompt) or [name for text in arguments.classes for name in text.split(",")]
    if any(not name.strip() for name in prompts) and arguments.classes:
        raise invalid("--class", ",".join(arguments.classes), "names or numbers with commas between are needed")
    if arguments.images_per_prompt is not None and arguments.num_samples is not None:
        raise InvalidInput("--images-per-prompt and --num-samples were both given: leave one of them out.")
    if not prompts and default_count is None:
        raise InvalidInput("--prompt is missing (or --class): say what the images should show, once or several times.")
    if not prompts and arguments.images_per_prompt is not None:
        raise InvalidInput("--images-per-prompt was given without --prompt or --class: give --num-samples.")
    if arguments.num_samples is not None:
        asked = tuple(prompts[i % len(prompts)] for i in range(arguments.num_samples)) if prompts else ()
        count = arguments.num_samples
    else:
        asked = tuple(prompt for prompt in prompts for _ in range(arguments.images_per_prompt or 1))
        count = len(asked) or default_count or 0
    index = tuple(range(count)) if arguments.index is None else _numbers("--index", arguments.index, count - 1)
    of_each = None if arguments.num_samples is not None else arguments.images_per_prompt or 1
    seeds, single = parse_seeds(arguments), arguments.index is not None
    return Request(seeds, asked, count, index, single, tuple(prompts), of_each)


def parse_seeds(arguments: argparse.Namespace) -> tuple[int, ...]:
    if arguments.seeds is None:
        if not 0 <= arguments.seed < 2**32:
            raise invalid("--seed", arguments.seed, "a whole number from 0 to 2^32 - 1 is needed")
        return (arguments.seed,)
    return _numbers("--seeds", arguments.seeds, 2**32 - 1)


def _numbers(flag: str, text: str, most: int) -> tuple[int, ...]:
    numbers = tuple(int(one) for one in text.split(",")) if re.fullmatch(r"\d{1,10}(,\d{1,10})*", text) else ()
    if not numbers or max(numbers) > most or len(set(numbers)) < len(numbers) or len(numbers) > MOST_SEEDS:
        raise invalid(flag, text, f"different whole numbers from 0 to {most} with commas between are needed")
    return numbers


def batches(request: Request, size: int) -> list[tuple[int, ...]]:
    """The positions of all images, cut into batches of equal size as far as they go; each is of one seed."""
    each = len(request.index)
    parts = math.ceil(each / size)
    size = math.ceil(each / parts)
    return [
        tuple(range(seed * each + start, seed * each + min(start + size, each)))
        for seed in range(len(request.seeds))
        for start in range(0, each, size)
    ]


def given_flags(parser: SampleParser, arguments: argparse.Namespace, leave_out: Sequence[str]) -> dict[str, Any]:
    """The flags that differ from their defaults, as JSON holds them; `flag_list` writes them as arguments again."""
    found = {}
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest not in leave_out and not action.dest.startswith("_") and value != action.default:
            named = action.option_strings[0].removeprefix("--")
            found[named] = str(value) if isinstance(value, Path) else value
    return found


def flag_list(flags: dict[str, Any]) -> list[str]:
    """`{"steps": 30, "lora": ["a", "b"]}` as arguments of a command line."""
    pairs = [(name, each) for name, value in flags.items() for each in (value if isinstance(value, list) else [value])]
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in pairs]


def call_text(entry: Any) -> str:
    """`call("solvers.dpm_solver_pp", order=3)` as "dpm_solver_pp(order=3)": what differs from the defaults."""
    usual, name = call(entry["call"]), entry["call"].rpartition(".")[2]
    shown = [f"{field}={value}" for field, value in entry.items() if field not in usual or usual[field] != value]
    return f"{name}({', '.join(shown)})" if shown else name


def set_solver(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Writes --solver into `config.sampling`, before fields are overridden: a name, with arguments or without."""
    if arguments.solver is None:
        return
    empty = ConfigDict({"sampling": {"solver": None}})
    named = f"solvers.{arguments.solver}"
    made = apply_overrides(empty, [f"sampling.solver={named}"]).sampling.solver if "(" in named else call(named)
    with config.sampling.ignore_type():
        config.sampling.solver = made


def set_steps(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Writes --steps into `config.sampling.grid`."""
    if arguments.steps is not None:
        place = _with_field(config.sampling.get("grid"), "steps")
        if place is None:
            raise invalid("--steps", arguments.steps, "config.sampling.grid has no number of steps: set its own fields")
        place.steps = arguments.steps


def set_fields(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Writes --solver, --steps, --scale and --batch-size into a run's config, before fields are overridden."""
    set_solver(arguments, config)
    set_steps(arguments, config)
    group = config.sampling
    if arguments.batch_size is not None:
        group.batch_size = arguments.batch_size
    if arguments.scale is not None:
        if not math.isfinite(arguments.scale):
            raise invalid("--scale", arguments.scale, "a finite number is needed")
        guides = [entry for entry in group.transformations.values() if entry is not None and "scale" in entry]
        if len(guides) > 1:
            raise invalid("--scale", arguments.scale, f"{len(guides)} transformations have one: set config.sampling's")
        null = config.objective.get("null") if "objective" in config else None
        if guides:
            with guides[0].ignore_type():
                guides[0].scale = float(arguments.scale)
        elif null is not None:
            group.transformations.guidance = call("denoisers.guided", scale=float(arguments.scale), null=null)
        else:
            raise invalid("--scale", arguments.scale, "this run was trained without a null condition to guide against")


def _with_field(entry: Any, name: str) -> ConfigDict | None:
    """The entry, or the first one within, that has the field."""
    if not isinstance(entry, ConfigDict):
        return None
    if name in entry:
        return entry
    return next((found for value in entry.values() if (found := _with_field(value, name)) is not None), None)
