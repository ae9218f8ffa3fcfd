"""What `benchmarks.fuzz` tries: configs with values, types and calls changed, and files of every reader damaged."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax import acceleration, adapters, data, interop, shards, training
from diffusion_jax.config import load, parts
from diffusion_jax.experiment import Experiment, check_training, prepare, prepare_sampling

CONFIGS = ("digits_dit", "digits_unet", "toy2d", "prose_masked", "shapes_text_dit", "faces_dit", "imagenet_dit")

FORBIDDEN = (
    "data.write_array_record",
    "training.logging.JsonLines",
    "training.train",
    "interop.save_pretrained",
    "os.x",
    "os:system",
    "builtins:eval",
    "my_package.parts:thing",
    "diffusion_jax.training:train",
)

EXTREMES = (-1, 0, 1, 2, 3, 7, 10**6, 2**31, 10**13, 2**63, 10**400, -(2**31), 0.5, -0.0, 1e-300, 1e300)

STRINGS = ("", "x", "../../etc/passwd", "/dev/zero", "None", "nan", "\ud800", "a\0b", "{}", "💥" * 50, "0" * 5000)


def deep(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = {"a": [value]}
    return value


def calls() -> st.SearchStrategy:
    names = [
        f"{place}.{name}"
        for place in parts.CONFIGURABLE
        for name in parts.public_names(__import__(f"diffusion_jax.{place}", fromlist=["x"]))
    ]
    return st.sampled_from([*names, *FORBIDDEN]).map(lambda name: {"call": name})


def values() -> st.SearchStrategy:
    """What stands in the place of a right value."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(EXTREMES),
        st.integers(-9, 300),
        st.floats(),
        st.sampled_from(STRINGS),
        st.text(max_size=8),
    )
    nested = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
    )
    return st.one_of(plain, nested, calls(), st.just(deep(70)), st.lists(st.integers(0, 4), max_size=4))


def changes() -> st.SearchStrategy:
    """One to three changes of a tree: where, what is done there, and with what."""
    kinds = st.sampled_from(("near", "near", "near", "near", "replace", "replace", "delete", "add", "move", "within"))
    return st.lists(st.tuples(st.integers(0, 2**16), kinds, values(), st.integers(0, 2**16)), min_size=1, max_size=3)


def places(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of all nodes but the root."""
    named = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in named:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(tree: Any, what: list) -> Any:
    """A copy of a JSON tree with the changes of `changes`."""
    tree = json.loads(json.dumps(tree))
    for number, kind, value, other in what:
        paths = list(places(tree))
        if not paths:
            return value
        value = copy.deepcopy(value)
        *way, last = paths[number % len(paths)]
        node = tree
        for key in way:
            node = node[key]
        if kind == "delete":
            del node[last]
        elif kind == "add" and isinstance(node, dict):
            node[f"{last}x"] = value
        elif kind == "move":
            *way, key = paths[other % len(paths)]
            taken = tree
            for step in (*way, key):
                taken = taken[step] if not isinstance(taken, list) or step < len(taken) else None
            node[last] = json.loads(json.dumps(taken))
        elif kind == "near":
            node[last] = near(node[last], other)
        elif kind == "within":
            node[last] = [node[last]] if other % 2 else {"call": node[last]}
        else:
            node[last] = value
    return tree


def near(value: Any, number: int) -> Any:
    """A value of the same type, or another constructor of the same package: most of these are right."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return (value + number % 7 - 3, value * 2, number % 40)[number % 3]
    if isinstance(value, float):
        return (value * (number % 7) / 3, -value, number % 10 / 10)[number % 3]
    if isinstance(value, list):
        return value[::-1] if number % 2 else value[1:]
    if isinstance(value, str):
        package = value.rpartition(".")[0]
        if package not in parts.CONFIGURABLE:
            return value[1:]
        public = parts.public_names(__import__(f"diffusion_jax.{package}", fromlist=["x"]))
        return f"{package}.{public[number % len(public)]}"
    if isinstance(value, dict) and "call" in value:
        return {"call": near(value["call"], number)}
    return value


class Case(NamedTuple):
    """One attempt. kind: what it is counted under. about: what was changed, in words. run: (scratch folder) -> None."""

    kind: str
    about: str
    run: Callable[[Path], Any]


def drawn(strategy: st.SearchStrategy, count: int, number: int) -> list:
    """`count` examples of a strategy, the same for the same number."""
    found = []
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

    @seed(number)
    @settings(max_examples=count, phases=(Phase.generate,), **quiet)
    @given(strategy)
    def each(example):
        found.append(example)

    while len(found) < count:
        number += 1
        each()
    return found[:count]


def stored_configs(names: tuple[str, ...] = CONFIGS) -> dict[str, Any]:
    """The shipped configs as a run stores them."""
    return {name: json.loads(json.dumps(load(f"configs/{name}.py").to_dict())) for name in names}


def traced(experiment: Experiment) -> None:
    """What a run would call, called without computing: parameters, loss and sampler."""
    check_training(experiment)
    if "solver" in experiment.config.sampling:
        prepare_sampling(experiment)


def config_cases(count: int, number: int, names: tuple[str, ...] = CONFIGS, trace: bool = True) -> Iterator[Case]:
    """Stored configs, each with a few changes, read and prepared as `train` and `sample` do it."""
    stored = stored_configs(names)

    def attempt(tree: Any, folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(tree))
        experiment = prepare(load(str(path)))
        traced(experiment) if trace else prepare_sampling(experiment)

    for name, what in drawn(st.tuples(st.sampled_from(names), changes()), count, number):
        tree = changed(stored[name], what)
        yield Case(f"config {name}", repr(what)[:300], lambda folder, tree=tree: attempt(tree, folder))


class Reader(NamedTuple):
    """A kind of files: `make(folder)` writes whole ones, `read(folder)` reads all that is in them."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _entries(source: Any) -> None:
    for i in range(len(source)):
        source[i]


def _arrays(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x0=rng.normal(size=(6, 4)).astype(np.float32), label=np.arange(6) % 3)
    np.save(folder / "data.npy", rng.normal(size=(6, 4)).astype(np.float32))


def _images(folder: Path) -> None:
    for i in range(4):
        at = folder / f"class{i % 2}"
        at.mkdir(exist_ok=True)
        values = np.random.default_rng(i).integers(0, 255, (12, 10, 3)).astype(np.uint8)
        Image.fromarray(values).save(at / f"{i}.{('png', 'jpg', 'webp', 'bmp')[i]}")


def _records(folder: Path) -> None:
    examples = [{"x0": np.full((4,), i, np.float32), "cond": {"label": np.int32(i)}} for i in range(5)]
    data.write_array_record(folder / "data.array_record", examples)


def _sample_set(folder: Path) -> None:
    for path, start, size in shards.shard_paths(folder, 5, 3):
        arrays = {"x": np.zeros((size, 2), np.float32), "index": np.arange(start, start + size, dtype=np.int32)}
        shards.write_shard(path, shards.identified(arrays, {"seed": 0}, start))


def _run(folder: Path) -> None:
    training.save_params(folder, {"dense": {"kernel": np.ones((3, 2), np.float32)}}, {"seed": 0}, step=3)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(4)))


def _read_run(folder: Path) -> None:
    training.read_config(folder)
    training.load_params(folder)
    training.logging.read_log(folder / "metrics.jsonl")


def _calibration(folder: Path) -> None:
    three = [0.0, 0.5, 0.25]
    fields = {"computed": [True, False, True], "fraction": three, "slope": three, "bias": three, "grid": [1.0, 0.5, 0]}
    (folder / "calibration.json").write_text(json.dumps(fields | {"valid_for": {}}))


SCHEDULERS = (
    {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_karras_sigmas": False},
    {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "algorithm_type": "dpmsolver++"},
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False},
    {"_class_name": "UniPCMultistepScheduler", "solver_order": 2, "predict_x0": True},
)


def _schedulers(folder: Path) -> None:
    for i, fields in enumerate(SCHEDULERS):
        common = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
        common = {} if "Flow" in fields["_class_name"] else common
        (folder / f"{i}.json").write_text(json.dumps({**common, **fields}))


def _read_scheduler(path: Path) -> None:
    scheduler = interop.read_scheduler(path)
    grid = scheduler.grid(5)
    scheduler.process.alpha(grid)


def _preprocessor(folder: Path) -> None:
    fields = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


class Checkpoints:
    """Tiny checkpoints, made once: whole pipelines, and a LoRA file with the network that it belongs to."""

    def __init__(self, root: Path):
        from tests.interop.folders import dit_folder, sd_folder
        from tests.interop.vocabularies import t5_folder

        self.sd, self.dit = sd_folder(root / "sd"), dit_folder(root / "dit")
        self.t5 = t5_folder(root / "t5")
        self.unet = interop.load_pretrained(self.sd / "unet")

    def lora(self, folder: Path) -> None:
        made = adapters.lora(self.unet.network, rank=2, select=("q", "v"))
        x, cond = np.zeros((1, 8, 8, 4), np.float32), {"context": np.zeros((1, 3, 12), np.float32)}
        factors = made.init(jax.random.key(0), self.unet.params, x, np.zeros(1, np.float32), cond)
        interop.save_lora(folder / "lora.safetensors", self.unet, factors)

    def readers(self) -> dict[str, Reader]:
        def copied(folder):
            return lambda to: shutil.copytree(folder, to, dirs_exist_ok=True)

        def sharded(folder):
            interop.save_pretrained(folder, self.unet, max_shard_bytes=20_000)

        return {
            "unet": Reader(copied(self.sd / "unet"), interop.load_pretrained),
            "vae": Reader(copied(self.sd / "vae"), interop.load_pretrained),
            "clip": Reader(copied(self.sd / "text_encoder"), interop.load_pretrained),
            "dit": Reader(copied(self.dit / "transformer"), interop.load_pretrained),
            "shards and index": Reader(sharded, interop.load_pretrained),
            "lora": Reader(self.lora, lambda folder: interop.load_lora(folder / "lora.safetensors", self.unet)),
            "tokenizer": Reader(copied(self.sd / "tokenizer"), lambda at: interop.load_tokenizer(at)(["a cat"])),
            "sentencepiece": Reader(copied(self.t5), lambda at: interop.load_tokenizer(at)(["a cat"])),
            "pipeline": Reader(copied(self.sd), interop.load_pipeline),
        }


CHEAP = {
    "npz": Reader(_arrays, lambda folder: _entries(data.arrays(str(folder / "data.npz")))),
    "npy": Reader(_arrays, lambda folder: _entries(data.arrays(str(folder / "data.npy")))),
    "latents": Reader(
        lambda folder: data.write_latents(folder, "a", np.zeros((4, 2, 2, 1), np.float32), {"label": np.arange(4)}),
        lambda folder: _entries(data.latents(str(folder))),
    ),
    "array_record": Reader(_records, lambda folder: _entries(data.array_record(str(folder / "data.array_record")))),
    "images": Reader(_images, lambda folder: _entries(data.image_folder(str(folder), size=8))),
    "samples": Reader(_sample_set, shards.read_samples),
    "calibration": Reader(_calibration, lambda folder: acceleration.load_calibration(folder / "calibration.json")),
    "scheduler": Reader(_schedulers, lambda folder: [_read_scheduler(at) for at in sorted(folder.iterdir())]),
    "preprocessor": Reader(_preprocessor, interop.load_preprocessor),
}
"""Readers of which a case takes milliseconds."""

RUN = {"run": Reader(_run, _read_run)}

DAMAGE = (
    "flip",
    "flip",
    "cut",
    "insert",
    "json",
    "json",
    "json",
    "header",
    "empty",
    "fifo",
    "folder",
    "zero",
    "gone",
    "deep",
)


def damages() -> st.SearchStrategy:
    """Which file, how, where, and with what change where it is JSON."""
    numbers = st.lists(st.integers(0, 2**31), min_size=1, max_size=8)
    return st.tuples(st.integers(0, 2**16), st.sampled_from(DAMAGE), numbers, changes())


def damage(folder: Path, number: int, kind: str, numbers: list[int], what: list) -> str:
    """Damages one file of a folder; returns its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    json_files = [path for path in files if path.suffix == ".json"]
    chosen = json_files if kind in ("json", "deep") and json_files else files
    path = chosen[number % len(chosen)]
    content = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind != "gone":
        path.write_bytes(_damaged(content, kind, numbers, what))
    return path.name


def _damaged(content: bytes, kind: str, numbers: list[int], what: list) -> bytes:
    changed_bytes = bytearray(content)
    if kind == "empty" or not content:
        return b""
    if kind == "cut":
        return content[: numbers[0] % len(content)]
    if kind == "insert":
        at = numbers[0] % len(content)
        return content[:at] + bytes(number % 256 for number in numbers) + content[at:]
    if kind == "deep":
        return b"[" * 100_000
    if kind == "json" and (tree := _tree(content)) is not None:
        return _text(changed(tree, what))
    if kind == "header" and len(content) > 8:
        length = struct.unpack("<Q", content[:8])[0]
        if (tree := _tree(content[8 : 8 + length])) is not None:
            header = _text(changed(tree, what))
            return struct.pack("<Q", len(header)) + header + content[8 + length :]
    for number in numbers:
        # Half of the flips strike the first bytes, where headers are.
        at = number % (min(len(content), 200) if number % 2 else len(content))
        changed_bytes[at] ^= 1 << (number >> 8) % 8
    return bytes(changed_bytes)


def _tree(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _text(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def file_cases(count: int, number: int, readers: dict[str, Reader], root: Path) -> Iterator[Case]:
    """Folders of every reader, one file of each damaged."""
    whole = {}
    for name, reader in readers.items():
        whole[name] = root / "whole" / name.replace(" ", "_")
        whole[name].mkdir(parents=True)
        reader.make(whole[name])
        reader.read(whole[name])

    def attempt(name: str, what: tuple, folder: Path) -> None:
        at = folder / "files"
        shutil.copytree(whole[name], at)
        damage(at, *what)
        readers[name].read(at)

    for i, what in enumerate(drawn(damages(), count, number)):
        name = list(readers)[i % len(readers)]
        about = f"{what[1]} {what[0]} {what[2][:3]} {what[3]!r}"[:300]
        yield Case(f"files of {name}", about, lambda folder, name=name, what=what: attempt(name, what, folder))
