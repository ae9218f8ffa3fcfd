"""`diffusion-jax evaluate`: measures images, or the samples of a run, against other images or held-out data.

Of a run (--workdir) it measures what its config says, or, where that names no metrics, its pictures against the data
that was held out. With --images it measures any pictures: Fréchet and kernel distance, precision, recall, density and
coverage in the features of a network, and how well they show their prompts. Features are kept, so that measuring again
is fast. docs/evaluate.md explains the numbers.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import metrics, training
from diffusion_jax.command import (
    add_trust_argument,
    cache_compilations,
    leave,
    parse_config,
    run_command,
    trusted_packages,
)
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.experiment_data import with_data
from diffusion_jax.measuring import image_sets, measures
from diffusion_jax.measuring.feature_extractors import (
    BEST_FIRST,
    OFFERED,
    RESIZINGS,
    FeatureExtractor,
    at_hand,
    kind_of_weights,
    published_extractor,
)
from diffusion_jax.measuring.trained_extractors import of_judge, trained_extractor
from diffusion_jax.metrics.statistics import check_new
from diffusion_jax.places import check_config, parts_in
from diffusion_jax.report import write_report
from diffusion_jax.shards import COST, read_identity, read_samples, set_identity, write_whole
from diffusion_jax.summary import as_block, on_what

EXAMPLES = """examples:
  diffusion-jax evaluate --workdir=out/digits                       a run, by the metrics of its config
  diffusion-jax evaluate --workdir=out/photos --features-from=models/dinov2
                                                                    a run on photos, in the features of DINOv2
  diffusion-jax evaluate --images=drawn --against=photos/test       two folders, in the best features at hand
  diffusion-jax evaluate --images=photos/test --features-from=inception.safetensors --write-statistics=test.npz
  diffusion-jax evaluate --images=drawn --against=test.npz --features-from=inception.safetensors
  diffusion-jax evaluate --images=out/generated --prompts --clip-from=models/clip"""

OF_PICTURES = ("against", "features", "features_from", "resize", "size", "num_images", "write_statistics", "prompts")
"""Flags that ask for the metrics of pictures, also of a run whose config names others."""

FEWEST_TO_JUDGE = 96
"""Examples that a judge is trained on at least."""

BESIDE = object()
"""What --prompts is without a value."""


def flags() -> CommandParser:
    parser = CommandParser(
        "evaluate",
        description=__doc__,
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--workdir", type=Path, help="the folder of a training run; its samples are measured")
    what.add_argument("--samples", type=Path, help="of a run: the folder of the shards (default WORKDIR/samples)")
    what.add_argument("--images", type=Path, help="a folder of pictures, an NPZ file, or the folder of a run")
    what.add_argument("--num-images", type=int, metavar="N", help="measure N random images of each side (default all)")
    what.add_argument(
        "--size", type=int, metavar="N", help="bring all images to N x N first, the middle kept (default: as they are)"
    )
    what.add_argument("--background", metavar="COLOUR", help="what is seen where a picture is transparent")
    what.add_argument(
        "--on-error", choices=image_sets.ON_ERROR, default="refuse", help="of a damaged picture (default refuse)"
    )
    other = parser.add_argument_group("what it is measured against")
    other.add_argument(
        "--against",
        type=Path,
        help="a folder of pictures, an NPZ file of images or statistics, or the samples of another run "
        "(default, of a run: the data that it held out)",
    )
    other.add_argument(
        "--prompts",
        nargs="?",
        const=BESIDE,
        metavar="FILE",
        help="what the images should show, for CLIP's score: generated.json, metadata.jsonl, captions.csv or a text "
        "file with a prompt a line (default: what lies beside the images)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--features",
        metavar="NETWORK",
        help="inception, dinov2, clip, pixels, run:WORKDIR (the network of a run) or judge:WORKDIR (a classifier "
        "trained on the classes of a run's data); default: that of --features-from, or the best one at hand",
    )
    how.add_argument("--features-from", type=Path, metavar="PATH", help="the folder or file of that network's weights")
    how.add_argument("--clip-from", type=Path, metavar="FOLDER", help="of CLIP, for --prompts")
    how.add_argument("--resize", choices=RESIZINGS, help="for Inception (default: as --against was made, or clean)")
    how.add_argument("--batch-size", type=int, default=32, help="of the feature network (default 32)")
    how.add_argument("--seed", type=int, default=0, help="of random choices of images (default 0)")
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--output", type=Path, help="the report as JSON (default WORKDIR/metrics.json, or IMAGES.metrics.json)"
    )
    out.add_argument("--write-statistics", type=Path, metavar="FILE", help="mean and covariance of the features as NPZ")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = flags()
    images, others = _images_named(argv)
    names = {argument.split("=")[0] for argument in others}
    if images is None and not names & {"--workdir", "--config", "-h", "--help"}:
        raise InvalidInput("Say what is measured: --workdir=RUN, or --images=FOLDER --against=FOLDER (see --help).")
    if images is not None and "--workdir" in names:
        raise InvalidInput("--workdir and --images both say what is measured: give one of them.")
    if images is None:
        arguments, config = parse_config(parser, argv, stored="config.json")
    elif image_sets.is_run(images.expanduser()):
        # The pictures of a run are measured as those of any folder, whatever metrics its config names.
        arguments, config = parse_config(parser, [*others, f"--workdir={images}"], stored="config.json")
        config.metrics = {}
    else:
        add_trust_argument(parser)
        arguments, config = parser.parse_args(argv), None
    _check(arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    cache_compilations()
    print(as_block("Measuring", what_is_measured(arguments, config)), flush=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        if config is None:
            report, notes = measure_images(arguments)
            # Statistics are a file of their own; a report of earlier on the same images stays.
            compared = arguments.against is not None or arguments.prompts is not None or "frechet_distance" in report
            path = arguments.output or (default_output(arguments.images) if compared else None)
        else:
            report, notes = measure_run(arguments, config)
            path = arguments.output or arguments.workdir / "metrics.json"
    if path is not None:
        write_whole(path, json.dumps(report, indent=2) + "\n")
    print("\n".join(measures.lines_of(report, notes)))
    written = [path, arguments.write_statistics]
    # A folder of samples alone has no run to report on, and elsewhere the page does not change.
    if config is not None and arguments.output is None and (arguments.workdir / "config.json").is_file():
        written.append(write_report(arguments.workdir))
    for file in written:
        if file is not None:
            print(f"Wrote {file}")


def what_is_measured(arguments: argparse.Namespace, config: ConfigDict | None) -> dict[str, str]:
    """The rows of the summary with which the command begins."""
    workdir: Path | None = None if config is None else arguments.workdir
    rows = {} if arguments.images is None else {"images": str(arguments.images)}
    if workdir is not None and arguments.images is None:
        rows["samples"] = str(arguments.samples or workdir / "samples")
    against = "nothing but the prompts" if workdir is None else "the data that the run held out"
    rows["against"] = str(arguments.against) if arguments.against is not None else against
    measures = ", ".join((config or {}).get("metrics", None) or ())
    rows["measures"] = measures or f"distances in the features of {arguments.features or 'the best network at hand'}"
    return {**rows, "devices": on_what()}


def _images_named(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """What `--images` names, and the other arguments."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--images", type=Path)
    known, others = only.parse_known_args(argv)
    return known.images, others


def default_output(images: Path) -> Path:
    """Where the report on images goes: beside the folder of pictures, or the file."""
    images = images.resolve()
    return images.with_name(f"{images.name}.metrics.json")


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("batch_size", 1), ("num_images", 2), ("size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise invalid("--" + name.replace("_", "-"), value, f"it must be at least {least}")
    if not 0 <= arguments.seed < 2**32:
        raise invalid("--seed", arguments.seed, "a whole number from 0 to 2^32 - 1 is needed")
    if arguments.images is not None and arguments.samples is not None:
        raise InvalidInput("--samples is of a run (--workdir); with --images name the folder there.")
    if arguments.write_statistics is not None:
        check_new(arguments.write_statistics)
    if arguments.clip_from is not None and arguments.prompts is None:
        raise InvalidInput("--clip-from is for --prompts, which says what the images should show.")


def measure_run(arguments: argparse.Namespace, config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """The report on the samples of a run, and notes for whoever reads it."""
    if arguments.workdir is None:
        raise InvalidInput("--workdir is missing: the folder of a training run, or --images=FOLDER for pictures.")
    check_config(config)
    folder = arguments.samples or arguments.workdir / "samples"
    samples = read_samples(folder)
    notes: list[str] = []
    if config.get("metrics") and not any(getattr(arguments, name) for name in OF_PICTURES):
        _, real, held_out = with_data(config)
        report: dict[str, Any] = {"num_samples": len(samples["index"])}
        for measure in parts_in("metrics", config).values():
            report |= measure(samples, real, held_out)
    else:
        images = image_sets.open_images(folder)
        report, notes = _report(arguments, images, config, captions_asked(samples, config))
    report |= _cost(folder, arguments.workdir)
    return report | {"samples": set_identity(folder)}, notes


def captions_asked(samples: Mapping[str, np.ndarray], config: ConfigDict) -> list[str] | None:
    """What the samples of a run on captions were asked to show; None of another run."""
    tokens, mask = (samples.get(f"cond.{name}") for name in ("tokens", "tokens_mask"))
    if tokens is None or mask is None:
        return None
    decode = getattr(getattr(with_data(config)[1], "tokenizer", None), "decode", None)
    return decode and [decode(row[shown]) for row, shown in zip(tokens, mask, strict=True)]


def _cost(folder: Path, workdir: Path) -> dict[str, float]:
    """What drawing the samples has cost, and how fast the run was trained, where that is known."""
    cost = read_identity(folder / COST) or {}
    values = {}
    # What another set cost says nothing of this one.
    if cost.get("identity") == set_identity(folder):
        told = {key: cost.get(key) for key in ("nfe", "compute", "images_per_second")}
        values |= {key: value for key, value in told.items() if isinstance(value, float)}
    log = workdir / "metrics.jsonl"
    if log.is_file():
        rates = [record.get("steps_per_second") for record in training.logging.read_log(log)]
        rates = [rate for rate in rates if isinstance(rate, float)]
        if rates:
            values["train_steps_per_second"] = sorted(rates)[len(rates) // 2]
    return values


def measure_images(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The report on any images, and notes for whoever reads it."""
    images = image_sets.open_images(arguments.images, arguments.background, arguments.on_error)
    return _report(arguments, images, None)


def _report(
    arguments: argparse.Namespace,
    images: image_sets.ImageSet,
    config: ConfigDict | None,
    asked: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The report on images. config: of the run that they are of, whose held-out data is what they are compared with
    unless something else is named. asked: what these should show, where the run itself tells."""
    options = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    held_out = with_data(config)[2] if config is not None else None
    reference = _reference(arguments, held_out)
    report: dict[str, Any] = {}
    notes: list[str] = []
    if reference is not None or arguments.write_statistics is not None:
        extractor, notes = _extractor(arguments, reference, config, held_out)
        if arguments.size is not None:
            extractor = measures.at_size(extractor, arguments.size)
        if reference is not None:
            report = measures.measure(extractor, images, reference, most=arguments.num_images, **options)
        if arguments.write_statistics is not None:
            indices = measures.chosen_indices(images.count, arguments.num_images, arguments.seed)
            found = measures.image_features(extractor, images, indices, batch_size=arguments.batch_size)
            metrics.write_statistics(arguments.write_statistics, measures.statistics_of(extractor, found))
            report = report or {
                "num_samples": found.count,
                "features": measures.features_told(extractor, found),
                "images": measures.images_told(images, found),
            }
    if arguments.prompts is not None:
        prompts = asked if arguments.prompts is BESIDE else None
        if prompts is None:
            prompts = image_sets.prompts_of(images, None if arguments.prompts is BESIDE else arguments.prompts)
        folder = _clip(arguments)
        report |= measures.measure_prompts(folder, images, prompts, most=arguments.num_images, **options)
    if not report:
        told = "The run held no data out" if config is not None else "Nothing says what to compare the images with"
        raise InvalidInput(f"{told}: give --against=FOLDER, --prompts or --write-statistics=FILE.")
    return report, notes


def _reference(arguments: argparse.Namespace, held_out: Any) -> measures.ReferenceSet | None:
    if arguments.against is None:
        if held_out is None:
            return None
        name = "the held-out data of the run"
        return measures.ReferenceSet(name, image_sets.source_images(held_out, name))
    path = arguments.against.expanduser()
    statistics = None
    if path.suffix == ".npz" and path.is_file():
        statistics = metrics.read_statistics(path)
        if statistics is not None and not image_sets.holds_images(path):
            return measures.ReferenceSet(str(path), None, statistics)
    return measures.ReferenceSet(
        str(path), image_sets.open_images(path, arguments.background, arguments.on_error), statistics
    )


def _extractor(
    arguments: argparse.Namespace, reference: measures.ReferenceSet | None, config: ConfigDict | None, held_out: Any
) -> tuple[FeatureExtractor, list[str]]:
    """The feature network that is asked for, or the best one at hand with a note on better ones."""
    statistics = reference.statistics if reference is not None else None
    made_by = {} if statistics is None else statistics.made_by
    name, resize = arguments.features, arguments.resize
    if name is None and arguments.features_from is not None:
        name = kind_of_weights(arguments.features_from)
    replaceable = reference is not None and reference.images is not None and at_hand("inception") is None
    if name is None and statistics is not None and not replaceable:
        name = str(made_by.get("features", "inception"))
    notes = []
    if name is None:
        name, notes = best_features(config)
    kind, _, where = name.partition(":")
    if kind in ("run", "judge") and where:
        if arguments.features_from is not None or resize is not None:
            raise InvalidInput(f"--features={name} says all of the network: leave --features-from and --resize out.")
        return trained_extractor(kind, where, trusted_packages(arguments)), notes
    if name == "judge" and config is not None:
        return of_judge(with_data(config)[1], held_out, str(arguments.workdir)), notes
    if kind == "inception" and resize is None and statistics is not None:
        resize = resizing_of(statistics)
    return published_extractor(name, arguments.features_from, resize), notes


def resizing_of(statistics: metrics.Statistics) -> str:
    """The way of `RESIZINGS` in which images of a statistics file were resized."""
    told = statistics.made_by.get("resizing")
    for name, words in RESIZINGS.items():
        if str(told).endswith(words):
            return name
    # The files of guided-diffusion's evaluator have spatial features, those of pytorch-fid have none.
    return "pytorch-fid" if statistics.spatial is None else "tensorflow"


def best_features(config: ConfigDict | None) -> tuple[str, list[str]]:
    """The best feature network at hand, and a note where none is published. config: of a run, whose data may be
    labelled."""
    for kind in BEST_FIRST:
        if at_hand(kind) is not None:
            return kind, []
    name = "judge" if config is not None and _can_judge(with_data(config)[1]) else "pixels"
    told = {
        "judge": "a small classifier trained on the run's own data",
        "pixels": "thumbnails of 8 x 8 pixels, which see colours and coarse layout alone",
    }[name]
    return name, [
        f"No published feature network is at hand, so this was measured by {told}. For numbers that can be compared "
        f"with those of others, get DINOv2: {OFFERED['dinov2']} in the same command. For the FID of papers: "
        f"{OFFERED['inception']}."
    ]


def _can_judge(source: Any) -> bool:
    label = source[0].get("cond", {}).get("label")
    classes = getattr(source, "num_classes", None) or 0
    return label is not None and classes > 1 and len(source) >= FEWEST_TO_JUDGE


def _clip(arguments: argparse.Namespace) -> Path:
    """The folder of the CLIP that prompts are measured by."""
    for path in (arguments.clip_from, arguments.features_from):
        if path is not None and (path is arguments.clip_from or kind_of_weights(path) == "clip"):
            return path.expanduser()
    found = at_hand("clip")
    if found is None:
        raise InvalidInput(
            "--prompts needs CLIP, and none is at hand: hf download openai/clip-vit-large-patch14 --local-dir "
            "models/clip, then --clip-from=models/clip."
        )
    return found


if __name__ == "__main__":
    leave(run_command(main))
