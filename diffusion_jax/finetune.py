"""`diffusion-jax finetune`: trains a published checkpoint on a folder of your pictures, whole or by LoRA.

The folder has captions (NAME.txt beside NAME.png, metadata.jsonl or captions.csv), or a subfolder for each class where
the checkpoint knows classes (DiT). What learns is the denoising network, or low-rank factors beside it (--lora-rank);
the autoencoder and the text encoders stay as they are.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import distributed, interop, pictures, report, summary, training
from diffusion_jax.adapters import Lora
from diffusion_jax.command import cache_compilations, leave, parse_config, run_command
from diffusion_jax.commands.finetune_config import config_of, parser, set_flags
from diffusion_jax.config import build
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.experiment import Experiment, check_training, fit, prepare
from diffusion_jax.interop.files import local_folder
from diffusion_jax.interop.generation import pixel_step
from diffusion_jax.interop.pipeline_folders import new_class_names
from diffusion_jax.interop.requests import checked_size
from diffusion_jax.places import part_of
from diffusion_jax.train import sampled_params, show_run
from diffusion_jax.typing import Objective

LORA_FILE, FOLDER = "pytorch_lora_weights.safetensors", "pipeline"
"""What a run leaves in its workdir: of LoRA, as diffusers calls it; else the folder of a whole pipeline."""


def run(
    config: ConfigDict, workdir: Path | str | None, progress: bool = True, command: Sequence[str] = ("finetune",)
) -> training.TrainState:
    """Fine-tunes as `config` says (`fine_tuning_config`) in `workdir`, resuming what is there, and writes what learned
    in the layout of diffusers; returns the last state.

    Raises InvalidInput for pictures, captions or parts that do not fit the checkpoint, and for another base than that
    of the run in `workdir`, before anything is compiled or written. command: the command line, for the report.
    """
    config = config.copy_and_resolve_references()
    whole, given = config.lora is None, config.pretrained
    _check_base(config, workdir)
    if whole and local_folder(given.folder).is_file():
        raise InvalidInput(
            f"{given.folder} is a single file, but whole pipelines are written as folders: give --lora-rank=8, or "
            "take the same checkpoint as a folder with model_index.json."
        )
    mesh = part_of("mesh", config)
    half = "float32" if whole else given.dtype
    pipeline = interop.load_pipeline(
        given.folder, mesh=mesh, variant=given.variant, vae=given.vae, tokenizer=given.tokenizer,
        prediction_type=given.prediction_type, dtype=given.dtype, remat=given.remat, param_dtype=half,
    )  # fmt: skip
    size = _sizes(config, pipeline)
    source = part_of("data", config)
    if len(getattr(source, "sizes", (size,))) > 1:
        raise invalid("config.data.buckets", config.data.buckets, "one size is fine-tuned: leave it at None")
    # Every picture is read once: a damaged one is named now.
    source.check()
    names, pictures_in_step = getattr(source, "class_names", None), _encodes_in_step(config)
    _say(f"{len(source)} pictures of {size[0]} x {size[1]} in {config.data.folder}")
    once = "captions are" if pictures_in_step else "captions and pictures (nothing changes them while it trains) are"
    _say(f"{once} encoded once, before training ...")
    source = interop.prompted(source, pipeline, size)
    numbers = interop.class_numbers(pipeline, names) if interop.reads_classes(pipeline) and names else {}
    if numbers:
        _say("classes: " + ", ".join(f"{name} is {number}" for name, number in numbers.items()))
    source = source if pictures_in_step else interop.latent_examples(source, pipeline)

    adapter = None if whole else _adapter(config, pipeline)
    objective = partial(_objective, config)
    tuned = interop.fine_tuning(
        pipeline, objective, size, adapter=adapter, pictures=pictures_in_step, guidance=config.teacher_guidance
    )
    experiment = prepare(
        config, source=source, network=tuned.network, process=tuned.process, objective=tuned.objective, begin=tuned.init
    )
    check_training(experiment)
    callbacks = _validation(experiment, tuned, size) if config.validation.prompts else []
    learned = jax.eval_shape(tuned.init, jax.random.key(0))
    rows = summary.training_rows(experiment, workdir, learned)
    what = "all weights" if whole else f"factors of rank {config.lora.rank} beside the weights"
    rows["model"] = f"{what} of the {pipeline.network.family} of {given.folder}: {rows['model']}, in {given.dtype}"
    scheduler = pipeline.scheduler
    rows["process"] = f"{scheduler.config.get('_class_name')}, the network predicts {scheduler.process.prediction}"
    _say(summary.as_block("Fine-tuning", rows))
    if workdir is None:
        return fit(experiment, None, callbacks, progress=progress)
    record = summary.RunRecord(workdir, rows, command)
    state = fit(experiment, workdir, callbacks, progress=progress, writer=record)
    if int(state.step):
        _write(config, tuned, experiment, state, Path(workdir), numbers)
    return state


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _check_base(config: ConfigDict, workdir: Path | str | None) -> None:
    """Fills in what tells the base from others; raises InvalidInput where a run that goes on had another."""
    with config.ignore_type():
        config.pretrained.digest = interop.base_digest(config.pretrained.folder, config.pretrained.variant)
    if workdir is None or not (Path(workdir) / "config.json").is_file():
        return
    before = training.read_config(workdir).get("pretrained")
    if not isinstance(before, dict):
        raise InvalidInput(f"{workdir} holds a run of another kind: give another --workdir.")
    if before.get("digest") != config.pretrained.digest:
        raise InvalidInput(
            f"The run in {workdir} began from {before.get('folder')}, whose weights are not those of "
            f"{config.pretrained.folder}: give that one again, or another --workdir."
        )


def _sizes(config: ConfigDict, pipeline: interop.Pipeline) -> tuple[int, int]:
    """The size that is trained, filled in where it was left to the checkpoint."""
    found = config.size or (None if pipeline.size is None else min(pipeline.size))
    if found is None:
        raise InvalidInput(f"{config.pretrained.folder} names no size of pictures: give --size, such as --size=512.")
    size = checked_size((found, found), pixel_step(pipeline))
    with config.ignore_type():
        config.size = found
        config.data.size = found if config.data.size is None else config.data.size
    crop = config.train.transforms.get("crop")
    if crop is not None:
        with crop.ignore_type():
            crop.size = found
        if isinstance(config.data.size, int) and config.data.size < found:
            raise invalid("--random-crop", config.data.size, f"squares of --size={found} do not fit into it")
        if "time_ids" in pipeline.prompter.framed(np.zeros((1, 2)), np.zeros((1, 2)), size):
            raise InvalidInput(
                "This network is told where its pictures were cropped, which random crops do not say: leave "
                "--random-crop out."
            )
    return size


ENCODINGS = ("auto", "once", "on the fly")


def _encodes_in_step(config: ConfigDict) -> bool:
    """Whether pictures are encoded by the training step, and not once."""
    if config.encode not in ENCODINGS:
        raise unknown("config.encode", config.encode, ENCODINGS)
    if config.encode == "once" and config.train.transforms:
        raise invalid("config.encode", "once", "config.train.transforms change the pictures from step to step")
    return config.encode == "on the fly" or bool(config.train.transforms)


def _adapter(config: ConfigDict, pipeline: interop.Pipeline) -> Any:
    entry = ConfigDict(config.lora.to_dict())
    entry.select = interop.adapted_layers(pipeline.network, config.lora.select)
    return lambda network: build(entry, Lora, "config.lora", network=network)


def _objective(config: ConfigDict, **context: Any) -> Objective:
    return build(config.objective, Objective, "config.objective", **context)


def _validation(experiment: Experiment, tuned: interop.FineTuning, size: tuple[int, int]) -> list[training.Callback]:
    """Pictures of the prompts of `config.validation`, from the same noise each time."""
    config, mesh = experiment.config, experiment.mesh
    asked, every = config.validation, config.train.sample_every
    if not every:
        return []
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.images_per_prompt)]
    # As many as divide over the mesh; those beyond are not shown.
    shards = distributed.batch_shards(mesh)
    filled = [prompts[i % len(prompts)] for i in range(-(-len(prompts) // shards) * shards)]

    def shown(params):
        pipeline = tuned.pipeline_of(params)
        return interop.with_scheduler(pipeline, asked.scheduler) if asked.scheduler else pipeline

    def draw(params):
        made = interop.generate(
            shown(params), jax.random.key(config.seed), filled, negative=asked.negative, size=size,
            num_steps=asked.num_steps, scale=asked.scale,
        )  # fmt: skip
        return np.asarray(distributed.replicated(made, mesh))[: len(prompts)]

    def function(state, writer):
        images = draw(sampled_params(experiment, state))
        writer.image(int(state.step), "validation", pictures.grid(images, asked.images_per_prompt, zoom=None))

    def check(state):
        shown(sampled_params(experiment, state)).prompter.main(filled, size)

    return [training.Callback(every, function, True, check, name="validation pictures")]


def _write(config, tuned, experiment, state, workdir: Path, numbers: dict[str, int]) -> None:
    """What learned, as diffusers reads it; a file or folder of an earlier step is replaced in one go."""
    learned = distributed.replicated(sampled_params(experiment, state), experiment.mesh)
    if jax.process_index() != 0:
        return
    if config.lora is not None:
        draft = workdir / f"draft_{LORA_FILE}"
        tuned.save(draft, learned)
        draft.replace(workdir / LORA_FILE)
        return
    info = new_class_names(config.pretrained.folder, numbers) if numbers else {}
    interop.save_pipeline(workdir / FOLDER, tuned.pipeline_of(learned), config.pretrained.folder, **info)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, config = parse_config(parser(__doc__), argv, base=config_of, set_fields=set_flags)
    distributed.initialize()
    cache_compilations()
    try:
        state = run(config, arguments.workdir, not arguments.no_progress, ["finetune", *argv])
    except training.Diverged as error:
        raise SystemExit(f"error: {error}") from None
    if jax.process_index() != 0:
        return
    show_run(arguments.workdir)
    done = int(state.step)
    if done < config.train.steps:
        _say(f"Stopped after step {done} of {config.train.steps}; the same command goes on from there.")
    if not done:
        return
    lora = config.lora is not None
    result = arguments.workdir / (LORA_FILE if lora else FOLDER)
    given = (f"--pretrained={config.pretrained.folder}", f"--lora={result}") if lora else (f"--pretrained={result}",)
    _say(f"Wrote {result}. Report: {arguments.workdir / report.REPORT}")
    shown = config.validation
    given += () if shown.scheduler is None else (f"--scheduler={shown.scheduler}", "--steps=4", "--scale=1")
    _say(f'Sample it: diffusion-jax sample {shlex.join(given)} --prompt="..."')


if __name__ == "__main__":
    leave(run_command(main))
