"""Scheduler configs of diffusers as our parts: `read_scheduler` is the way in, `write_scheduler_config` the way out.

The classes are in `scheduler_classes`, the noise levels that their options mean in `noise_levels`.
"""

import json
from pathlib import Path
from typing import Any

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.interop.scheduler_classes import SCHEDULERS, Scheduler
from diffusion_jax.reading import read_json

__all__ = ["SCHEDULERS", "Scheduler", "read_scheduler", "write_scheduler_config"]

FILE = "scheduler_config.json"


def read_scheduler(config: dict[str, Any] | str | Path, eta: float | None = None) -> Scheduler:
    """The scheduler of a `scheduler_config.json`, or of the folder that holds it (or holds a folder `scheduler`).

    eta: the noise of DDIM's steps (0 unless given) and TCD's gamma (0.3), which are not in the config.
    Raises InvalidInput for a class or an option's value that we do not have, naming both.
    """
    if not isinstance(config, dict):
        config = _from_folder(Path(config))
    name = config.get("_class_name")
    if name is None:
        raise InvalidInput(f"The config has no _class_name; it must be one of {', '.join(sorted(SCHEDULERS))}.")
    if name not in SCHEDULERS:
        raise unknown("_class_name", name, SCHEDULERS)
    if eta is not None and name not in ("DDIMScheduler", "TCDScheduler"):
        raise InvalidInput(f"eta is {eta!r}, but {name} has none; it belongs to DDIMScheduler and TCDScheduler.")
    reader = SCHEDULERS[name]
    scheduler = reader(config) if eta is None else reader(config, eta)
    return scheduler._replace(config=dict(config))


def write_scheduler_config(folder: str | Path, scheduler: Scheduler) -> Path:
    """Writes the config that `scheduler` was read from as `folder/scheduler_config.json`."""
    if not scheduler.config:
        raise InvalidInput("scheduler.config is empty: only a scheduler that was read from a config can be written.")
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scheduler.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _from_folder(folder: Path) -> dict[str, Any]:
    for path in (folder, folder / FILE, folder / "scheduler" / FILE):
        if path.is_file():
            return read_json(path)
    raise InvalidInput(f"{folder} holds no {FILE}, nor does its folder scheduler.")
