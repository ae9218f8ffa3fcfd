"""`python -m diffusion_jax.sample`: draws samples from a trained model, shard by shard, and shows them.

Shards that are there are kept, so an interrupted run goes on; sample i is the same whatever the batch size, the number
of devices or of hosts. Each host draws shards of its own. With `--pretrained=FOLDER` images come from a published
checkpoint instead (`generate`).
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import data, denoisers, distributed, generate, pictures, training
from diffusion_jax.command import cache_compilations, leave, parse_config, run_command
from diffusion_jax.config import to_json
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
from diffusion_jax.places import sampled_average
from diffusion_jax.sampling import sample
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
from diffusion_jax.training.storage import described
from diffusion_jax.trust import source_digests
from diffusion_jax.typing import Params

SHOWN = ("batch_size", "decoder", "picture_columns", "picture_zoom")
"""Fields of `config.sampling` that do not change the samples."""

EXPORT = "samples.array_record"
"""The same samples as one file, beside the shards."""

PICTURES, SHOWN_SET = ("samples.png", "samples.txt", "denoising.png", "predictions.png"), "shown.json"
"""Pictures in the workdir, and the identity of the set that they show."""


def provenance(experiment: Experiment, params: Any, seed: int) -> dict[str, Any]:
    """What decides the samples, as plain values: seed, parameters, and how they are drawn."""
    leaves = described(params)
    digest = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]
    config = json.loads(to_json(experiment.config))
    drawn = {name: value for name, value in config["sampling"].items() if name not in SHOWN}
    shape = json.loads(json.dumps(experiment.shape))
    read = {"sampling": drawn} | {name: config[name] for name in ("model", "process")}
    code = source_digests(read)
    return {"seed": seed, "parameters": digest, "shape": shape, **read} | ({"code": code} if code else {})


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
    """Draws any range of sample indices in batches of one size, each a call of one compiled program."""

    def __init__(self, experiment: Experiment, sampling: Sampling, params: Params, seed: int):
        self.sampling, self.params, self.key = sampling, params, jax.random.key(seed)
        self.conditions = experiment.conditions
        self.batch_size = experiment.config.sampling.batch_size
        self.run = compiled_sampler(experiment, sampling)

    def batch(self, start: int) -> tuple[Any, Mapping[str, np.ndarray] | None]:
        """The samples `start .. start + batch_size - 1`, still on the device, and their conditions."""
        cond, index = self._inputs(start)
        return self.run(self.key, self.params, self.sampling.grid, cond, index), cond

    def check(self) -> None:
        """Raises InvalidInput where the parts of the sampler do not fit together, before anything is compiled."""
        cond, index = self._inputs(0)
        run = partial(self.run, grid=self.sampling.grid, cond=cond, index=index)
        abstractly("config.sampling on the network", lambda params: run(self.key, params), self.params)

    def _inputs(self, start: int) -> tuple[Mapping[str, np.ndarray] | None, jax.Array]:
        index = np.arange(start, start + self.batch_size, dtype=np.int32)
        cond = self.sampling.conditions(index) if self.sampling.conditions else None
        check_values(self.conditions, cond)
        return cond, jnp.asarray(index)

    def shard(self, start: int, size: int) -> dict[str, np.ndarray]:
        """Samples `start .. start + size - 1` with their indices, as a shard stores them."""
        parts = []
        for first in range(start, start + size, self.batch_size):
            result, cond = self.batch(first)
            parts.append(flat(jax.device_get(result.x), cond))
        arrays = {name: np.concatenate([part[name] for part in parts])[:size] for name in parts[0]}
        return {**arrays, "index": np.arange(start, start + size, dtype=np.int32)}


def show(experiment: Experiment, samples: Mapping[str, np.ndarray], workdir: Path) -> Path | None:
    """Writes the first samples as a person would look at them: a grid, a scatter plot, or text."""
    x = samples.get("x")
    group = experiment.config.sampling
    if x is None:
        return None
    if group.get("decoder"):
        x = decoded(experiment, x[: group.picture_columns**2])
    if x.ndim == 4 and x.shape[-1] in (1, 3):
        path = workdir / "samples.png"
        pictures.save_grid(path, x[: group.picture_columns**2], group.picture_columns, zoom=group.picture_zoom)
        return path
    if x.ndim == 2 and x.shape[1] == 2:
        path = workdir / "samples.png"
        count = min(len(x), len(experiment.held_out))
        real = np.stack([experiment.held_out[i]["x0"] for i in range(count)])
        pictures.save_scatter(path, {"held-out data": real, "samples": x})
        return path
    tokenizer = getattr(experiment.source, "tokenizer", None)
    if np.issubdtype(x.dtype, np.integer) and tokenizer is not None:
        path = workdir / "samples.txt"
        path.write_text("\n\n".join(tokenizer.decode(row) for row in x[:20]) + "\n", encoding="utf-8")
        return path
    return None


def along_the_run(
    experiment: Experiment, sampling: Sampling, params: Params, seed: int, rows: int = 10
) -> dict[str, np.ndarray] | None:
    """The first samples at ten moments of their run, `[10, rows, H, W, C]`; None where there is no picture of them.

    "denoising": x on its way from noise to sample. "predictions": the sample as the denoiser predicted it at that
    moment (`denoisers.recorded`), from which one sees when the composition is decided.
    """
    if not (isinstance(experiment.shape, tuple) and len(experiment.shape) == 3 and experiment.shape[-1] in (1, 3)):
        return None
    steps = sampling.grid.shape[0] - 1
    every = max(1, steps // 10)
    denoiser = denoisers.recorded(sampling.denoiser, steps)
    index = np.arange(rows, dtype=np.int32)
    cond = sampling.conditions(index) if sampling.conditions else None
    result = jax.jit(
        lambda key, params, cond: sample(
            key, denoiser, params, sampling.solver, sampling.grid,
            shape=(rows, *experiment.shape), cond=cond, save_every=every,
        )
    )(jax.random.key(seed), params, cond)  # fmt: skip
    return {
        "denoising": np.asarray(result.trace),
        "predictions": np.asarray(result.run.carry.values[every - 1 :: every]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] == "--pretrained" for argument in argv):
        generate.main(argv)
        return
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.sample",
        description=__doc__,
        epilog="example: python -m diffusion_jax.sample --workdir=out/digits --num-samples=1000 "
        "--config.sampling.transformations.guidance.scale=2.0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training run; its config is used")
    parser.add_argument("--num-samples", type=int, default=1000, help="default 1000")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples a file (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--step", type=int, help="the checkpoint to use (default: the newest)")
    parser.add_argument("--output", type=Path, help="where the shards go (default WORKDIR/samples)")
    parser.add_argument("--format", choices=("npz", "arrayrecord"), default="npz", help="default npz")
    parser.add_argument("--save-trajectory", action="store_true", help="also write denoising.png, noise to sample")
    parser.add_argument(
        "--save-predictions", action="store_true", help="also write predictions.png, the sample as predicted over time"
    )
    arguments, config = parse_config(parser, argv, stored="config.json")
    for name in ("num_samples", "shard_size"):
        if getattr(arguments, name) < 1:
            raise invalid("--" + name.replace("_", "-"), getattr(arguments, name), "it must be at least 1")
    folder = arguments.output or arguments.workdir / "samples"
    if not 0 <= arguments.seed < 2**32:
        raise invalid("--seed", arguments.seed, "a whole number from 0 to 2^32 - 1 is needed")
    distributed.initialize()
    cache_compilations()
    experiment = prepare(config)
    shards = shard_paths(folder, arguments.num_samples, arguments.shard_size)
    if jax.process_count() > 1:
        experiment = experiment._replace(mesh=distributed.make_mesh(devices=jax.local_devices()))
    sampling = prepare_sampling(experiment)
    params = training.load_params(arguments.workdir, sampled_average(config), arguments.step, experiment.mesh)
    check_params(experiment, params)
    sampler = BatchSampler(experiment, sampling, params, arguments.seed)

    stale = [p for p in folder.glob("samples-*.npz") if p not in {path for path, _, _ in shards}]
    if stale:
        raise InvalidInput(f"{folder} holds another set of samples ({stale[0].name}); empty it or give --output.")
    mine = shards[jax.process_index() :: jax.process_count()]
    who = provenance(experiment, params, arguments.seed)
    todo = missing(mine, who)
    if jax.process_index() == 0:
        drop_stale(arguments.workdir, folder, who, anew=bool(todo))
    if todo:
        sampler.check()
        first = time.perf_counter()
        warm, _ = sampler.batch(todo[0][1])
        jax.block_until_ready(warm.x)
        begun = time.perf_counter()
        for path, start, size in todo:
            write_shard(path, identified(sampler.shard(start, size), who, start))
        seconds = time.perf_counter() - begun
        drawn = sum(-(-size // sampler.batch_size) * sampler.batch_size for _, _, size in todo)
        cost = {
            "nfe": float(warm.cost.evaluations),
            "compute": float(warm.cost.compute),
            "images_per_second": drawn / seconds,
            "first_call_seconds": begun - first,
            "num_samples": arguments.num_samples,
            "seed": arguments.seed,
            "devices": jax.device_count(),
            "platform": jax.default_backend(),
            "identity": who,
        }
        if jax.process_index() == 0:
            write_whole(folder / COST, json.dumps(cost, indent=2) + "\n")
    print(f"{len(todo)} of {len(mine)} shards drawn, {len(mine) - len(todo)} were there: {folder}")
    distributed.wait_for_all("samples")
    if jax.process_index() != 0:
        return
    missing(shards, who)
    if arguments.format == "arrayrecord":
        draft = folder / f"samples.{os.getpid()}.partial"
        data.write_array_record(draft, examples(read_samples(folder)))
        draft.replace(folder / EXPORT)
    first_shard = read_shard(shards[0][0])
    picture = first_shard and show(experiment, first_shard, arguments.workdir)
    if picture:
        print(f"Wrote {picture}")
    wanted = {"denoising": arguments.save_trajectory, "predictions": arguments.save_predictions}
    moments = along_the_run(experiment, sampling, params, arguments.seed) if any(wanted.values()) else None
    for name, images in (moments or {}).items():
        if wanted[name]:
            path = arguments.workdir / f"{name}.png"
            strip = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
            pictures.save_grid(path, strip, len(images), zoom=config.sampling.picture_zoom)
            print(f"Wrote {path}")
    write_whole(arguments.workdir / SHOWN_SET, json.dumps(who) + "\n")


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


def drop_stale(workdir: Path, folder: Path, who: Mapping[str, Any], anew: bool) -> None:
    """Removes what shows or measures other samples than those of `who`: pictures of the workdir, and, where any shard
    is drawn `anew`, the export of the folder and what an earlier set cost."""
    if read_identity(workdir / SHOWN_SET) != who:
        for name in (*PICTURES, SHOWN_SET):
            (workdir / name).unlink(missing_ok=True)
    if anew:
        (folder / EXPORT).unlink(missing_ok=True)
        (folder / COST).unlink(missing_ok=True)


if __name__ == "__main__":
    leave(run_command(main))
