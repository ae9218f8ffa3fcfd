"""Parameters and configuration of a run for those who do not train: loading, exporting, post-hoc averages."""

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from diffusion_jax.distributed import Rules
from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.training import ema as averages
from diffusion_jax.training.storage import (
    FORMAT,
    Damaged,
    described,
    folder,
    load_item,
    made_folder,
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
    """The run's configuration. Raises InvalidInput if there is none or it is not JSON."""
    path = folder(workdir) / "config.json"
    if not path.is_file():
        raise InvalidInput(f"{path} does not exist: workdir must be the folder of a run.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON ({error}).") from None


def load_params(
    workdir: str | os.PathLike,
    ema: str | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Any:
    """Parameters for sampling, without optimiser or objective: nested dicts of arrays, laid out on `mesh`.

    ema: name of an average, None for the raw parameters. step: the newest undamaged checkpoint when absent.

    Raises InvalidInput if there is no checkpoint, no such step, no such average, or the checkpoint is damaged.
    """
    root = folder(workdir)
    manager = readable(root / "checkpoints")
    name = "params" if ema is None else f"ema_{ema}"
    with manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None:
            if step not in steps:
                raise unknown("step", step, map(str, steps))
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
    raise InvalidInput(f"no undamaged checkpoint was found in {root}.")


def export_params(
    workdir: str | os.PathLike, destination: str | os.PathLike, ema: str | None = None, step: int | None = None
) -> None:
    """Copies parameters (an average when `ema` names one) and the configuration to a workdir of their own.

    `load_params(destination)` gives them back. Raises InvalidInput as `load_params` does.
    """
    params = load_params(workdir, ema, step)
    has_config = (folder(workdir) / "config.json").is_file()
    save_params(destination, params, read_config(workdir) if has_config else None)


def save_params(destination: str | os.PathLike, params: Params, config: Any = None, step: int = 0) -> None:
    """Writes parameters alone (and the configuration) in the layout that `load_params` reads."""
    root = made_folder(destination)
    stored = plain(params)
    with writable(root / "checkpoints", None) as manager:
        meta = {"format": FORMAT, "items": {"params": described(stored)}}
        args = ocp.args.Composite(params=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(meta))
        manager.save(step, args=args, force=True)
        manager.wait_until_finished()
    if config is not None:
        write_config(root, config)


def reconstruct_ema(workdir: str | os.PathLike, sigma_rel: float, step: int | None = None) -> Any:
    """The power-function average of any width from a run's snapshots; see `ema.reconstruct`.

    Raises InvalidInput if the run kept no snapshots, or one of them is damaged.
    """
    root = folder(workdir)
    if not (root / "snapshots").is_dir():
        raise InvalidInput(f"{root} has no EMA snapshots; train with snapshot_every and power-function tracks.")
    with readable(root / "snapshots") as manager:
        try:
            metas = {at: read_meta(manager, at) for at in sorted(manager.all_steps())}
            snapshots = [
                (at, width, _loader(manager, at, f"ema_{name}", meta))
                for at, meta in metas.items()
                for name, width in meta["sigma_rel"].items()
            ]
            return averages.reconstruct(snapshots, sigma_rel, step)
        except Damaged as problem:
            raise InvalidInput(f"an EMA snapshot in {root} is damaged ({problem}).") from problem


def _loader(manager: ocp.CheckpointManager, step: int, name: str, meta: Mapping[str, Any]):
    return lambda: load_item(manager, step, name, meta, None, None)
