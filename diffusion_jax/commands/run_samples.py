"""`sample --workdir=RUN`: samples of a trained model in shards, a few of them as PNG files, and pictures of them.

Shards that are there are kept, so an interrupted run goes on; sample i of a seed is the same whatever the batch size,
the number of devices or of hosts. Each host draws shards of its own.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax import data, distributed, pictures, summary, training
from diffusion_jax.commands.image_files import (
    check_no_more,
    image_path,
    is_there,
    write_image,
    write_overview,
)
from diffusion_jax.commands.run_conditions import conditioned_on
from diffusion_jax.commands.sample_flags import NOT_OF_AN_IMAGE, Request, SampleParser, call_text, given_flags
from diffusion_jax.commands.sample_pictures import along_the_run, show
from diffusion_jax.config import ConfigDict, to_json
from diffusion_jax.config.trust import source_digests
from diffusion_jax.distributed import batch_shards
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.experiment import (
    Experiment,
    Sampling,
    abstractly,
    check_params,
    compiled_sampler,
    decoded,
    prepare,
    prepare_sampling,
)
from diffusion_jax.models import check_values
from diffusion_jax.places import entries_of, sampled_average
from diffusion_jax.shards import (
    COST,
    check_identity,
    identified,
    identity_of,
    read_identity,
    read_samples,
    read_shard,
    shard_paths,
    write_shard,
    write_whole,
)
from diffusion_jax.training.storage import params_digest
from diffusion_jax.typing import Params

SHOWN = ("batch_size", "decoder", "picture_columns", "picture_zoom")
"""Fields of `config.sampling` that do not change the samples."""

EXPORT = "samples.array_record"
"""The same samples as one file, beside the shards."""

PICTURES, SHOWN_SET = ("samples.png", "samples.txt", "denoising.png", "predictions.png"), "shown.json"
"""Pictures of the samples, and the identity of the set that they show."""

TITLES = {"denoising": "From noise to sample", "predictions": "The sample as predicted at each moment"}

DEFAULT_COUNT, FEW = 1000, 100
"""Samples where no number is given; up to how many samples are written as PNG files unless told otherwise."""

NOT_OF_A_SAMPLE = (*NOT_OF_AN_IMAGE, "png", "shard_size", "format", "save_trajectory", "save_predictions")
"""Flags that say which samples are drawn, or where they go, not what a sample is."""


def provenance(experiment: Experiment, params: Any, request: Request) -> dict[str, Any]:
    """What decides the samples, as plain values: seed, parameters, what is asked for, and how they are drawn."""
    config = json.loads(to_json(experiment.config))
    drawn = {name: value for name, value in config["sampling"].items() if name not in SHOWN}
    shape = json.loads(json.dumps(experiment.shape))
    seed = request.seeds[0] if len(request.seeds) == 1 else list(request.seeds)
    read = {"sampling": drawn} | {name: config[name] for name in ("model", "process")}
    who = {"seed": seed, "parameters": params_digest(params), "shape": shape, **read}
    who |= {"code": code} if (code := source_digests(read)) else {}
    if len(request.seeds) > 1:
        who["of_each_seed"] = request.count
    if request.prompts:
        who |= {"asked": list(request.prompts), "of_each": request.of_each}
    return who


def flat(x: Any, cond: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """Samples and conditions under the names that a shard stores them by: `x` or `x.NAME`, and `cond.NAME`."""
    arrays = {f"x.{name}": value for name, value in x.items()} if isinstance(x, Mapping) else {"x": x}
    return arrays | {f"cond.{name}": value for name, value in (cond or {}).items()}


def examples(samples: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Samples one by one, as a source would give them."""
    for i in range(len(samples["index"])):
        cond = {name.removeprefix("cond."): values[i] for name, values in samples.items() if name.startswith("cond.")}
        yield {"x0": samples["x"][i], "cond": cond}


class BatchSampler:
    """Draws any samples of a request in batches of one size, each a call of one compiled program."""

    def __init__(self, experiment: Experiment, sampling: Sampling, params: Params, request: Request):
        self.sampling, self.params, self.request = sampling, params, request
        self.conditions = experiment.conditions
        parts = batch_shards(experiment.mesh)
        # No larger than what is asked for.
        needed = -(-len(request.index) // parts) * parts
        self.batch_size = min(experiment.config.sampling.batch_size, needed)
        self.run = compiled_sampler(experiment, sampling)

    def batch(self, seed: int, index: Sequence[int] | np.ndarray) -> tuple[Any, Mapping[str, np.ndarray] | None]:
        """Samples of a seed, up to `batch_size`; the batch is filled up with the last one. Still on the device."""
        cond, rows = self._inputs(index)
        return self.run(jax.random.key(seed), self.params, self.sampling.grid, cond, rows), cond

    def check(self) -> None:
        """Raises InvalidInput where the parts of the sampler do not fit together, before anything is compiled."""
        cond, index = self._inputs([0])
        run = partial(self.run, grid=self.sampling.grid, cond=cond, index=index)
        key = jax.random.key(0)
        abstractly("config.sampling on the network", lambda params: run(key, params), self.params)

    def _inputs(self, index: Any) -> tuple[Mapping[str, np.ndarray] | None, jax.Array]:
        index = np.asarray(index, np.int32)
        index = np.pad(index, (0, self.batch_size - len(index)), mode="edge")
        cond = self.sampling.conditions(index) if self.sampling.conditions else None
        check_values(self.conditions, cond)
        return cond, jnp.asarray(index)

    def samples(self, positions: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """The samples at these places of the request, batch by batch, as a shard stores them."""
        positions = list(positions)
        while positions:
            seed = self.request.at(positions[0])[0]
            of_seed = [p for p in positions[: self.batch_size] if self.request.at(p)[0] == seed]
            result, cond = self.batch(seed, [self.request.at(p)[1] for p in of_seed])
            arrays = flat(jax.device_get(result.x), cond)
            yield {name: value[: len(of_seed)] for name, value in arrays.items()}
            positions = positions[len(of_seed) :]


class RunSamples(NamedTuple):
    """What a call works on. who: what decides the samples (`provenance`)."""

    experiment: Experiment
    sampler: BatchSampler
    who: dict[str, Any]
    arguments: argparse.Namespace
    request: Request

    @property
    def folder(self) -> Path:
        return self.arguments.output or self.arguments.workdir / "samples"

    @property
    def pictures(self) -> Path:
        """Where pictures of the samples go: into the workdir only where no folder is given."""
        return self.arguments.output or self.arguments.workdir

    def bar(self, total: int) -> Any:
        disable = True if self.arguments.no_progress else None
        return tqdm(total=total, unit="sample", desc="sampling", disable=disable)


def run(
    parser: SampleParser, arguments: argparse.Namespace, config: ConfigDict, request: Request, changed: Sequence[str]
) -> None:
    """Draws the samples of `request`. changed: the fields of `config` that were given."""
    experiment = prepare(config)
    if jax.process_count() > 1:
        experiment = experiment._replace(mesh=distributed.make_mesh(devices=jax.local_devices()))
    sampling = prepare_sampling(experiment)
    if request.asked:
        sampling = conditioned_on(experiment, sampling, request, by_class=bool(arguments.classes))
    params = training.load_params(arguments.workdir, sampled_average(config), arguments.step, experiment.mesh)
    check_params(experiment, params)
    sampler = BatchSampler(experiment, sampling, params, request)
    drawn = RunSamples(experiment, sampler, provenance(experiment, params, request), arguments, request)
    images = wants_images(drawn)
    settings = image_settings(parser, drawn, changed) if images else []
    todo = [] if request.single else shards_to_draw(drawn)
    if images:
        check_no_more(drawn.folder, request.total)
        for number, one in enumerate(settings):
            is_there(image_path(drawn.folder, number), one)
    if jax.process_index() == 0:
        print(summary.as_block("Sampling", summary_of(drawn)), flush=True)
    first = None if request.single else draw_shards(drawn, todo)
    if jax.process_index() != 0:
        return
    if first is not None:
        show_samples(drawn, sampling, first)
    if images:
        write_images(drawn, settings)


def summary_of(drawn: RunSamples) -> dict[str, str]:
    """What is drawn, by what, on what, and where it goes."""
    experiment, sampler, total = drawn.experiment, drawn.sampler, drawn.request.total
    steps = jax.tree.leaves(sampler.sampling.grid)[0].shape[0] - 1
    by = f"{steps} steps of {call_text(experiment.config.sampling.solver)}"
    rows = summary.sampling_rows(experiment, sampler.params, total, by)
    rows["model"] += f", of step {drawn.arguments.step:,}" if drawn.arguments.step is not None else ""
    shape = summary.shape_in_words(experiment.shape)
    rows["samples"] = f"{total:,} of {shape}, {sampler.batch_size:,} at once"
    return {**rows, "output": str(drawn.folder)}


def shards_of(drawn: RunSamples) -> list[tuple[Path, int, int]]:
    """All shards of the set, as `shard_paths` gives them."""
    return shard_paths(drawn.folder, drawn.request.total, drawn.arguments.shard_size)


def shards_to_draw(drawn: RunSamples) -> list[tuple[Path, int, int]]:
    """The shards of this process that are not there. Raises InvalidInput where the folder holds another set."""
    folder, shards = drawn.folder, shards_of(drawn)
    stale = [p for p in folder.glob("samples-*.npz") if p not in {path for path, _, _ in shards}]
    if stale:
        raise InvalidInput(f"{folder} holds another set of samples ({stale[0].name}); empty it or give --output.")
    return missing(shards[jax.process_index() :: jax.process_count()], drawn.who)


def draw_shards(drawn: RunSamples, todo: Sequence[tuple[Path, int, int]]) -> dict[str, np.ndarray] | None:
    """Draws the shards of `todo`, and the export where it is asked for; returns the first shard of the set."""
    folder, sampler, who, arguments = drawn.folder, drawn.sampler, drawn.who, drawn.arguments
    shards = shards_of(drawn)
    mine = shards[jax.process_index() :: jax.process_count()]
    if jax.process_index() == 0:
        drop_stale(drawn.pictures, folder, who, anew=bool(todo))
    if todo:
        sampler.check()
        print("Compiling ...", flush=True)
        first = time.perf_counter()
        seed, index, _ = drawn.request.at(todo[0][1])
        warm, _ = sampler.batch(seed, [index])
        jax.block_until_ready(warm.x)
        begun = time.perf_counter()
        print(f"Compiled, and drew the first batch, in {begun - first:.1f} s", flush=True)
        calls = 0
        with drawn.bar(sum(size for _, _, size in todo)) as bar:
            for path, start, size in todo:
                parts = []
                for part in sampler.samples(range(start, start + size)):
                    parts.append(part)
                    calls += 1
                    bar.update(len(next(iter(part.values()))))
                arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                arrays["index"] = np.arange(start, start + size, dtype=np.int32)
                write_shard(path, identified(arrays, who, start))
        seconds = time.perf_counter() - begun
        cost = {
            "nfe": float(warm.cost.evaluations),
            "compute": float(warm.cost.compute),
            "images_per_second": calls * sampler.batch_size / seconds,
            "first_call_seconds": begun - first,
            "num_samples": drawn.request.total,
            "seed": who["seed"],
            "devices": jax.device_count(),
            "platform": jax.default_backend(),
            "identity": who,
        }
        if jax.process_index() == 0:
            write_whole(folder / COST, json.dumps(cost, indent=2) + "\n")
    whose = " of this process" if jax.process_count() > 1 else ""
    print(f"{len(todo)} of {len(mine)} shards{whose} drawn, {len(mine) - len(todo)} were there: {folder}")
    distributed.wait_for_all("samples")
    if jax.process_index() != 0:
        return None
    missing(shards, who)
    if arguments.format == "arrayrecord":
        draft = folder / f"samples.{os.getpid()}.partial"
        data.write_array_record(draft, examples(read_samples(folder)))
        draft.replace(folder / EXPORT)
    return read_shard(shards[0][0])


def show_samples(drawn: RunSamples, sampling: Sampling, first: Mapping[str, np.ndarray]) -> None:
    """Writes what a person looks at: the first samples, and, where asked for, how they came about."""
    arguments, where = drawn.arguments, drawn.pictures
    if picture := show(drawn.experiment, first, where):
        print(f"Wrote {picture}")
    wanted = {"denoising": arguments.save_trajectory, "predictions": arguments.save_predictions}
    moments = None
    if any(wanted.values()):
        moments = along_the_run(drawn.experiment, sampling, drawn.sampler.params, drawn.request.seeds[0])
    for name, images in (moments or {}).items():
        if wanted[name]:
            path = where / f"{name}.png"
            zoom = drawn.experiment.config.sampling.picture_zoom or None
            pictures.save_strips(
                path, {"": images.swapaxes(0, 1)}, title=TITLES[name], along="steps of the run", zoom=zoom
            )
            print(f"Wrote {path}")
    write_whole(where / SHOWN_SET, json.dumps(drawn.who) + "\n")


def wants_images(drawn: RunSamples) -> bool:
    """Whether samples are written as PNG files. Raises InvalidInput where they were asked for and are no images."""
    shape, asked = drawn.experiment.shape, drawn.arguments.png
    decoder = drawn.experiment.config.sampling.get("decoder")
    possible = isinstance(shape, tuple) and len(shape) == 3 and (shape[-1] in (1, 3) or decoder is not None)
    if (asked or drawn.request.single) and not possible:
        flag = "--png" if asked else "--index"
        raise invalid(flag, True, f"samples of shape {shape} are no images: they are written as shards only")
    few = drawn.request.total <= FEW if asked is None else asked
    return possible and (few or drawn.request.single)


def image_settings(parser: SampleParser, drawn: RunSamples, changed: Sequence[str]) -> list[dict[str, Any]]:
    """The settings of each image, which its file carries."""
    config, request, sampler = drawn.experiment.config, drawn.request, drawn.sampler
    flags = given_flags(parser, drawn.arguments, NOT_OF_A_SAMPLE)
    flags |= {f"config.{field}": text for field, _, text in (one.partition("=") for one in changed)}
    shared: dict[str, Any] = {
        "model": Path(drawn.arguments.workdir).resolve().name,
        "parameters": drawn.who["parameters"],
        "steps": jax.tree.leaves(sampler.sampling.grid)[0].shape[0] - 1,
        "solver": call_text(config.sampling.solver),
        **({} if config.sampling.get("decoder") else {"size": list(drawn.experiment.shape[:2])}),
    }
    guides = entries_of("sampling.transformations", config).values()
    scales = [entry.scale for entry in guides if "scale" in entry]
    shared |= {"scale": scales[0]} if scales and isinstance(scales[0], float | int) else {}
    shared |= {"config": list(changed)} if changed else {}
    labels, names = None, getattr(drawn.experiment.source, "class_names", None)
    if not request.asked and sampler.sampling.conditions and request.total:
        labels = sampler.sampling.conditions(np.asarray(request.index, np.int32)).get("label")
    kind = "class" if drawn.arguments.classes else "prompt"
    found = []
    for position in range(request.total):
        seed, index, asked = request.at(position)
        told = {} if asked is None else {kind: asked}
        if labels is not None and np.ndim(labels) == 1:
            number = int(labels[position % len(request.index)])
            told = {"class": names[number] if names and number < len(names) else str(number)}
        found.append({**shared, **told, "seed": seed, "index": index, "flags": flags})
    return found


def write_images(drawn: RunSamples, settings: Sequence[Mapping[str, Any]]) -> None:
    """Writes each sample as a PNG file, from the shards, or drawn where `--index` picked it."""
    folder, total = drawn.folder, drawn.request.total
    if drawn.request.single:
        todo = [n for n in range(total) if not is_there(image_path(folder, n), settings[n])]
        source = drawn.sampler.samples(todo)
    else:
        todo = list(range(total))
        source = (read_shard(path) or {} for path, _, _ in shards_of(drawn))
    numbers = iter(todo)
    for arrays in source:
        for image in decoded(drawn.experiment, arrays["x"]):
            number = next(numbers)
            if not is_there(image_path(folder, number), settings[number]):
                write_image(image_path(folder, number), image, settings[number])
    write_overview(folder, settings, {"platform": jax.default_backend()}, grid=drawn.request.single)
    print(f"Wrote {total} {'image' if total == 1 else 'images'} to {folder / 'images'}")


def missing(shards: Sequence[tuple[Path, int, int]], who: Mapping[str, Any]) -> list[tuple[Path, int, int]]:
    """The shards that are still to be drawn; damaged ones are told.

    Raises InvalidInput for a shard of other samples: of another checkpoint, seed, way of sampling or range.
    """
    todo = []
    for path, start, size in shards:
        stored = read_shard(path)
        if stored is not None:
            check_identity(path, identity_of(stored), {**who, "index": [start, start + size]})
            continue
        todo.append((path, start, size))
        if os.path.lexists(path):
            print(f"{path} is damaged and is drawn again.")
    return todo


def drop_stale(pictures_in: Path, folder: Path, who: Mapping[str, Any], anew: bool) -> None:
    """Removes what shows or measures other samples than those of `who`: pictures of an earlier set, and, where any
    shard is drawn `anew`, the export of the folder and what an earlier set cost."""
    if read_identity(pictures_in / SHOWN_SET) != who:
        for name in (*PICTURES, SHOWN_SET):
            (pictures_in / name).unlink(missing_ok=True)
    if anew:
        (folder / EXPORT).unlink(missing_ok=True)
        (folder / COST).unlink(missing_ok=True)
