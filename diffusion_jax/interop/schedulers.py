"""Scheduler configs of diffusers as our parts: `read_scheduler` is the way in, `write_scheduler_config` the way out.

The classes are in `scheduler_classes`, `multistep_classes` and `continuous_classes`, the noise levels that their
options mean in `noise_levels` and `flow_levels`.
"""

import json
from pathlib import Path
from typing import Any

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.interop.continuous_classes import CONTINUOUS_CLASSES
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.multistep_classes import MULTISTEP_CLASSES
from diffusion_jax.interop.scheduler_classes import DISCRETE_CLASSES, Scheduler
from diffusion_jax.reading import read_json

__all__ = ["SCHEDULERS", "UNREAD", "Scheduler", "read_scheduler", "write_scheduler_config"]

FILE = "scheduler_config.json"

SCHEDULERS = dict(sorted({**DISCRETE_CLASSES, **MULTISTEP_CLASSES, **CONTINUOUS_CLASSES}.items()))
"""The classes that are read: functions of the fields of the config."""

INVERSION = "for the way from data to noise use sampling.invert with the scheduler of the way back"
TOKENS = "it is of tokens, not of images that were noised"
OTHER_MODELS = "no network of the models that it was made for can be loaded"
UNREAD = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CMStochasticIterativeScheduler": OTHER_MODELS,
    "ConsistencyDecoderScheduler": OTHER_MODELS,
    "DDIMInverseScheduler": INVERSION,
    "DDPMWuerstchenScheduler": OTHER_MODELS,
    "DPMSolverMultistepInverseScheduler": INVERSION,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": OTHER_MODELS,
    "HeliosDMDScheduler": OTHER_MODELS,
    "HeliosScheduler": OTHER_MODELS,
    "KarrasVeScheduler": OTHER_MODELS,
    "LTXEulerAncestralRFScheduler": OTHER_MODELS,
    "MiniMaxH3Scheduler": OTHER_MODELS,
    "PiflowScheduler": OTHER_MODELS,
    "RFD4ProteinaScheduler": OTHER_MODELS,
    "RePaintScheduler": "for inpainting use solvers.repainted",
    "SCMScheduler": OTHER_MODELS,
    "ScoreSdeVeScheduler": OTHER_MODELS,
    "ScoreSdeVpScheduler": OTHER_MODELS,
    "UnCLIPScheduler": OTHER_MODELS,
    "VQDiffusionScheduler": TOKENS,
}
"""The classes that diffusers has and that are not read, and why."""

OF_ETA = ("DDIMParallelScheduler", "DDIMScheduler", "TCDScheduler")


def read_scheduler(config: Any, eta: Any = None) -> Scheduler:
    """The scheduler of a `scheduler_config.json` as a dict, or of the folder that holds it (or a folder `scheduler`).

    eta: the noise of DDIM's steps (0 unless given) and TCD's gamma (0.3), which are not in the config.
    Raises InvalidInput for a class that is not read, and for a field whose value cannot be read, naming both.
    """
    if isinstance(config, str | Path):
        config = _from_folder(Path(config))
    if not isinstance(config, dict):
        raise invalid("config", config, "a dict, or the folder of a scheduler_config.json, is needed")
    name = config.get("_class_name")
    if name is None:
        raise InvalidInput(f"The config has no _class_name; it must be one of {', '.join(SCHEDULERS)}.")
    if not isinstance(name, str):
        raise invalid("_class_name", name, "the name of a class is needed")
    if name in UNREAD:
        raise InvalidInput(
            f"_class_name is {name!r}, a class of diffusers that is not read: {UNREAD[name]}. "
            f"Read are {', '.join(SCHEDULERS)}."
        )
    if name not in SCHEDULERS:
        raise unknown("_class_name", name, SCHEDULERS)
    if eta is not None:
        if name not in OF_ETA:
            raise InvalidInput(f"eta is {eta!r}, but {name} has none; it belongs to {', '.join(OF_ETA)}.")
        if isinstance(eta, bool) or not isinstance(eta, int | float):
            raise invalid("eta", eta, "a number is needed")
    fields = Fields(config, name)
    scheduler = SCHEDULERS[name](fields) if eta is None else SCHEDULERS[name](fields, eta)
    return scheduler._replace(config=dict(config))


def of_class(scheduler: Scheduler, name: str) -> Scheduler:
    """The scheduler of another class from the same config: `Class.from_config(scheduler.config)` in diffusers, where a
    config holds the values of all fields. Here those that are absent have the defaults of the first class."""
    fields = Fields(scheduler.config, scheduler.config["_class_name"])
    SCHEDULERS[fields.source](fields)
    return read_scheduler({**fields.read, **scheduler.config, "_class_name": name})


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
