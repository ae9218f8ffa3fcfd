"""What `finetune` is set to: its config with the default settings, and the flags that set the fields of it."""

import argparse
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import interop
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.config import call
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import defaults
from diffusion_jax.interop.fine_tuning import ATTENTION
from diffusion_jax.interop.pipelines import KINDS

SCHEDULES = ("constant", "cosine", "linear")

LCM_STEPS, LCM_SHOWN = 50, {"scheduler": "LCMScheduler", "num_steps": 4, "scale": 1.0}
"""Steps of the teacher whose neighbours a student of few steps makes equal, and how the student is shown."""

RATES = {"lora": 1e-4, "full": 1e-5}
"""Learning rates unless told: factors begin at no change, and a whole network forgets at their rate."""


def fine_tuning_config(pretrained: str, folder: str, classes: bool = False, lora_rank: int | None = None) -> ConfigDict:
    """The config of a run with the default settings, see `--help`; every field is one to set.

    pretrained: a folder of a pipeline, the id of a repo, or one safetensors file. folder: of the pictures. classes:
    whether the checkpoint knows classes in the place of texts (`interop.reads_classes`). lora_rank: None trains the
    whole network.
    """
    config = defaults(steps=1000, batch_size=4)
    config.pretrained = {
        "folder": pretrained,
        "variant": None,
        "vae": None,
        "tokenizer": None,
        "prediction_type": None,
        "dtype": "float32",
        "remat": "none",
        "digest": None,
    }
    config.size = None
    config.data = call("data.image_folder" if classes else "data.captioned_folder", folder=folder, size=None)
    config.encode = "auto"
    config.held_out = config.model = config.process = None
    config.lora = None if lora_rank is None else call("adapters.lora", rank=lora_rank, select=ATTENTION)
    config.objective = call("objectives.denoising", cond_dropout=0.1)
    config.teacher_guidance = None
    rate = call("training.optimizers.constant", value=RATES["full" if lora_rank is None else "lora"])
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01, decayed=".*")
    config.train.update(checkpoint_every=250, validate_every=None)
    shown = {"prompts": (), "negative": None, "images_per_prompt": 1}
    config.validation = {**shown, "scheduler": None, "num_steps": None, "scale": None}
    return config


def config_of(arguments: argparse.Namespace) -> ConfigDict:
    """The config with the default settings for the checkpoint and the folder that the flags name."""
    for flag in ("pretrained", "data"):
        if getattr(arguments, flag) is None:
            raise InvalidInput(f"--{flag} is missing, such as --pretrained=checkpoints/sd15 --data=photos.")
    kind = KINDS[interop.pipeline_class(arguments.pretrained, arguments.prediction_type)]
    return fine_tuning_config(arguments.pretrained, arguments.data, kind.classes, arguments.lora_rank)


def set_flags(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Sets the fields of the flags that were given, also in the config of `--config`."""
    if "pretrained" not in config:
        raise InvalidInput(f"{arguments.config} is no config of finetune: it has no entry 'pretrained'.")
    _set(config.pretrained, folder=arguments.pretrained)
    _set(config.data, folder=arguments.data)
    if arguments.lora_rank is not None:
        if config.lora is None:
            config.lora = call("adapters.lora", rank=arguments.lora_rank, select=ATTENTION)
        _set(config.lora, rank=arguments.lora_rank)
    if arguments.full and arguments.lora_rank is not None:
        raise InvalidInput("--full trains the whole network and --lora-rank factors beside it: give one of them.")
    if config.lora is None or arguments.full:
        config.lora = None
        for flag in ("lora_alpha", "lora_targets"):
            if getattr(arguments, flag) is not None:
                raise InvalidInput(f"--{flag.replace('_', '-')} is of LoRA: give --lora-rank too, e.g. --lora-rank=8.")
    else:
        targets = arguments.lora_targets
        _set(config.lora, alpha=arguments.lora_alpha, select=None if targets is None else tuple(targets.split(",")))

    _set(config, seed=arguments.seed, size=arguments.size)
    _set(config.pretrained, **{name: getattr(arguments, name) for name in PRETRAINED})
    _set(config.train, steps=arguments.steps, batch_size=arguments.batch_size, accumulate=arguments.accumulate)
    _set(config.train, checkpoint_every=arguments.checkpoint_every)
    _set_objective(config, arguments)
    if arguments.min_snr is not None:
        config.objective.weight = call("timesteps.min_snr_weight", gamma=arguments.min_snr)
    if arguments.ema is not None:
        config.ema = {"average": call("training.ema.warmup", decay=arguments.ema)}
        config.sampling.ema = "average"
    _set_rate(config, arguments)
    if arguments.flip:
        config.train.transforms.flip = call("data.flip")
    if arguments.random_crop is not None:
        config.data.size = arguments.random_crop
        config.train.transforms.crop = call("data.random_crop", size=arguments.size)
    if arguments.on_the_fly:
        config.encode = "on the fly"
    if arguments.validation_prompt:
        config.validation.prompts = tuple(arguments.validation_prompt)
    if config.validation.prompts and config.train.sample_every is None:
        config.train.sample_every = max(1, config.train.steps // 5)
    _set(config.train, sample_every=arguments.validate_every)


PRETRAINED = ("variant", "vae", "tokenizer", "prediction_type", "dtype", "remat")
"""Flags that are fields of `config.pretrained`."""


def _set(group: Any, **values: Any) -> None:
    """Sets the values that were given."""
    with group.ignore_type():
        for name, value in values.items():
            if value is not None:
                group[name] = value


def _set_objective(config: ConfigDict, arguments: argparse.Namespace) -> None:
    if arguments.lcm is None:
        _set(config.objective, cond_dropout=arguments.caption_dropout)
        return
    for flag in ("caption_dropout", "min_snr"):
        if getattr(arguments, flag) is not None:
            raise InvalidInput(f"--{flag.replace('_', '-')} is of training by denoising: leave it out with --lcm.")
    grid = call("timesteps.trailing", steps=LCM_STEPS, num_train_steps=1000)
    earlier, draw = call("objectives.neighbour", grid=grid), call("timesteps.on_grid", grid=grid)
    distance = call("objectives.pseudo_huber", c=1e-3)
    config.objective = call("objectives.consistency", earlier=earlier, draw=draw, distance=distance)
    _set(config, teacher_guidance=arguments.lcm)
    config.validation.update(LCM_SHOWN)


def _set_rate(config: ConfigDict, arguments: argparse.Namespace) -> None:
    before = config.optimizer.learning_rate
    if (arguments.learning_rate, arguments.schedule, arguments.warmup_steps) == (None, None, None):
        return
    name = arguments.schedule or before.call.rpartition(".")[2]
    peak = before.get("value", before.get("peak")) if arguments.learning_rate is None else arguments.learning_rate
    warmup = before.warmup_steps if arguments.warmup_steps is None else arguments.warmup_steps
    spans = {"value": peak} if name == "constant" else {"peak": peak}
    config.optimizer.learning_rate = call(f"training.optimizers.{name}", warmup_steps=warmup, **spans)


EXAMPLE = """example:
  diffusion-jax finetune --pretrained=checkpoints/sd15 --data=photos --lora-rank=8 --dtype=bfloat16 \\
    --validation-prompt="a red cube" --workdir=out/style
  diffusion-jax sample --pretrained=checkpoints/sd15 --lora=out/style/pytorch_lora_weights.safetensors \\
    --prompt="a red cube"

The same command goes on where it stopped. What is not a flag here is a field of the config, such as
--config.optimizer.weight_decay=0, --config.mesh.fsdp=4 or --config.data.background=white. Exit codes: 0 trained or
stopped, 1 nothing finite to learn from, 2 refused, 3 halted by the system, 130 left at once."""


def parser(description: str | None) -> CommandParser:
    """The flags of the command, which `config_of` and `set_flags` read."""
    made = CommandParser(
        "finetune",
        description=description,
        epilog=EXAMPLE,
    )
    made.add_argument("--pretrained", metavar="FOLDER", help="a folder with model_index.json, one file, or a repo id")
    made.add_argument("--data", metavar="FOLDER", help="your pictures with captions, or with a subfolder a class")
    made.add_argument("--workdir", type=Path, required=True, help="checkpoints, logs, pictures and the result go there")
    what = made.add_argument_group("what learns")
    what.add_argument("--lora-rank", type=int, metavar="R", help="trains low-rank factors; without it, all weights")
    what.add_argument("--lora-alpha", type=float, metavar="A", help="scale of the factors, times R (default: R)")
    what.add_argument(
        "--lora-targets", metavar="NAMES", help="ends of the names of layers, here or in diffusers "
        "(default: to_q,to_k,to_v,to_out.0, the projections of attention)",
    )  # fmt: skip
    what.add_argument("--full", action="store_true", help="trains all weights, whatever --config says")
    what.add_argument("--ema", type=float, metavar="DECAY", help="averages what learns, e.g. 0.999, and saves that")
    how = made.add_argument_group("pictures")
    how.add_argument("--size", type=int, metavar="PIXELS", help="of the squares (default: the checkpoint's)")
    how.add_argument("--flip", action="store_true", help="mirrors half of the pictures, at random")
    how.add_argument(
        "--random-crop", type=int, metavar="PIXELS", help="squares of --size from anywhere in larger ones of PIXELS"
    )
    how.add_argument("--caption-dropout", type=float, metavar="SHARE", help="of captions left out (default 0.1)")
    how.add_argument("--on-the-fly", action="store_true", help="encodes pictures at each step, to save memory")
    loss = made.add_argument_group("training")
    loss.add_argument("--steps", type=int, help="default 1000")
    loss.add_argument("--batch-size", type=int, metavar="B", help="pictures a step, all devices together (default 4)")
    loss.add_argument("--accumulate", type=int, metavar="N", help="works through the batch in N parts (default 1)")
    loss.add_argument("--learning-rate", type=float, metavar="RATE", help="default 1e-4 of LoRA, 1e-5 of all weights")
    loss.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate (default constant)")
    loss.add_argument("--warmup-steps", type=int, metavar="N", help="of the learning rate (default 0)")
    loss.add_argument(
        "--lcm", type=float, metavar="GUIDANCE", help="distils into a student of 1 to 8 steps without guidance, from "
        "the checkpoint with so much of it, e.g. 7.5 (Luo et al. 2023; with --lora-rank an LCM-LoRA)",
    )  # fmt: skip
    loss.add_argument("--min-snr", type=float, metavar="GAMMA", help="weight of Hang et al. 2023, e.g. 5")
    loss.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic (default float32)")
    loss.add_argument("--remat", help="what is computed again to save memory: full, dots, ... (default none)")
    loss.add_argument("--checkpoint-every", type=int, metavar="N", help="steps (default 250)")
    loss.add_argument("--seed", type=int, help="default 0")
    loss.add_argument("--no-progress", action="store_true", help="no progress bar")
    shown = made.add_argument_group("pictures while it trains, in workdir/pictures")
    shown.add_argument("--validation-prompt", action="append", metavar="TEXT", help="repeatable")
    shown.add_argument("--validate-every", type=int, metavar="N", help="steps (default: five times in a run)")
    files = made.add_argument_group("files of the checkpoint")
    files.add_argument("--variant", help='such as "fp16", for files with that in their names')
    files.add_argument("--vae", help="a folder or file with another autoencoder")
    files.add_argument("--tokenizer", help="of a single file: the folder of CLIP's tokenizer")
    files.add_argument("--prediction-type", help="of a single file of Stable Diffusion 2: epsilon or v_prediction")
    return made
