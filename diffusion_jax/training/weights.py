"""Parameters and configuration of a run for those who do not train: loading, exporting, post-hoc averages."""

import json
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.training import ema as averages
from diffusion_jax.training.damage import Damaged, reading
from diffusion_jax.training.storage import (
    folder,
    load_item,
    made_folder,
    meta_of,
    plain,
    read_meta,
    readable,
    writable,
)
from diffusion_jax.typing import Params


def write_config(workdir: str | os.PathLike, config: Any) -> None:
    """Writes `config` (plain values, or anything with `to_json`) as `config.json`; replaced in one go."""
    if jax.process_index() != 0:
        return
    root = made_folder(workdir)
    text = config.to_json(indent=2) if hasattr(config, "to_json") else json.dumps(config, indent=2)
    draft = root / "config.json.tmp"
    draft.write_text(text + "\n")
    draft.replace(root / "config.json")


def read_config(workdir: str | os.PathLike) -> Any:
    """The run's configuration. Raises InvalidInput if there is none, or it is not JSON or cannot be read now."""
    path = folder(workdir) / "config.json"
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist: workdir must be the folder of a run.")
    try:
        with reading(str(path)):
            return json.loads(path.read_text())
    except Damaged as problem:
        raise InvalidInput(f"{path} is not JSON ({problem}).") from None


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the finished checkpoints in a folder, oldest first; none where there is no run."""
    checkpoints = folder(workdir) / "checkpoints"
    return (
        sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()) if checkpoints.is_dir() else []
    )


def load_params(
    workdir: str | os.PathLike,
    ema: str | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Any:
    """Parameters for sampling, without optimiser or objective: nested dicts of arrays, laid out on `mesh`.

    ema: name of an average, None for the raw parameters. step: the newest undamaged checkpoint when absent.

    Raises InvalidInput if there is no checkpoint, no such step, no such average, or the checkpoint is damaged or cannot
    be read now.
    """
    root = folder(workdir)
    manager = readable(root / "checkpoints")
    name = "params" if ema is None else f"ema_{ema}"
    with manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None:
            if step not in steps:
                raise unknown("checkpoint step", step, map(str, steps))
            steps = [step]
        for candidate in steps:
            try:
                meta = read_meta(manager, candidate)
                if name not in meta["items"]:
                    tracks = [n.removeprefix("ema_") for n in meta["items"] if n.startswith("ema_")]
                    raise unknown("ema", ema, tracks)
                return load_item(manager, candidate, name, meta, mesh, rules)
            except Damaged as problem:
                warnings.warn(f"Checkpoint {candidate} in {root} is damaged ({problem}).", stacklevel=2)
    if not steps:
        raise InvalidInput(
            f"{root} has no checkpoint yet: one is written while `diffusion-jax train` runs, and at its end."
        )
    raise InvalidInput(f"no undamaged checkpoint was found in {root}.")


def export_params(
    workdir: str | os.PathLike, destination: str | os.PathLike, ema: str | None = None, step: int | None = None
) -> None:
    """Copies parameters (an average when `ema` names one) and the configuration to a workdir of their own.

    `load_params(destination)` gives them back. Raises InvalidInput as `load_params` does, and if there is a checkpoint
    in `destination` already.
    """
    params = load_params(workdir, ema, step)
    has_config = (folder(workdir) / "config.json").is_file()
    save_params(destination, params, read_config(workdir) if has_config else None)


def save_params(destination: str | os.PathLike, params: Params, config: Any = None, step: int = 0) -> None:
    """Writes parameters alone (and the configuration) in the layout that `load_params` reads.

    Raises InvalidInput if there is such a checkpoint already.
    """
    root = made_folder(destination)
    stored = plain(params)
    with writable(root / "checkpoints", None) as manager:
        if step in manager.all_steps():
            raise InvalidInput(f"{root} holds a checkpoint {step} already; give another destination, or remove it.")
        meta = meta_of({"params": stored})
        args = ocp.args.Composite(params=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(meta))
        manager.save(step, args=args, force=True)
        manager.wait_until_finished()
    if config is not None:
        write_config(root, config)


def reconstruct_ema(workdir: str | os.PathLike, sigma_rel: float, step: int | None = None) -> Any:
    """The power-function average of any width from a run's snapshots; see `ema.reconstruct`.

    Raises InvalidInput if the run kept no snapshots, or one of them is damaged or cannot be read now: an average of
    the others would be another one.
    """
    root = folder(workdir)
    if not (root / "snapshots").is_dir():
        raise InvalidInput(f"{root} has no EMA snapshots; train with snapshot_every and power-function tracks.")
    with readable(root / "snapshots") as manager:
        snapshots = [
            (at, width, load) for at in sorted(manager.all_steps()) for width, load in _snapshots_at(manager, at)
        ]
        return averages.reconstruct(snapshots, sigma_rel, step)


def _snapshots_at(manager: ocp.CheckpointManager, step: int) -> list[tuple[float, Callable[[], Any]]]:
    """The width of each track that was kept at `step`, and what loads it."""
    meta = _whole(manager, step, lambda: read_meta(manager, step))
    widths = meta.get("sigma_rel")
    if not isinstance(widths, dict) or not all(
        f"ema_{name}" in meta["items"] and isinstance(width, float) for name, width in widths.items()
    ):
        raise InvalidInput(f"snapshot {step} in {manager.directory} is damaged (its meta file has no widths).")

    def loader(name):
        return lambda: _whole(manager, step, lambda: load_item(manager, step, f"ema_{name}", meta, None, None))

    return [(width, loader(name)) for name, width in widths.items()]


def _whole(manager: ocp.CheckpointManager, step: int, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Damaged as problem:
        raise InvalidInput(
            f"snapshot {step} in {manager.directory} is damaged ({problem}); move it elsewhere to go on without it."
        ) from problem
