"""diffusion_jax: diffusion models in JAX, composed along the timestep.

    import diffusion_jax as dj

    sampler = dj.make_sampler(dj.denoiser(network, process), dj.solvers.ddim(), shape=(32, 32, 3))

The packages (`dj.processes`, `dj.timesteps`, `dj.models`, `dj.denoisers`, `dj.solvers`, ...) and a few names of
theirs are imported when they are first used, so that importing this one costs nothing. The loop is
`dj.sampling.sample`. (`dj.sample`, `dj.train` and `dj.evaluate` are the commands, as Python modules.)

Importing has one side effect: the C library keeps freed memory (`diffusion_jax.malloc` says why, and how to avoid it).
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffusion_jax.malloc import keep_freed_memory

if TYPE_CHECKING:
    from diffusion_jax import acceleration as acceleration
    from diffusion_jax import adapters as adapters
    from diffusion_jax import baselines as baselines
    from diffusion_jax import config as config
    from diffusion_jax import control as control
    from diffusion_jax import data as data
    from diffusion_jax import denoisers as denoisers
    from diffusion_jax import distributed as distributed
    from diffusion_jax import errors as errors
    from diffusion_jax import experiment as experiment
    from diffusion_jax import interop as interop
    from diffusion_jax import measuring as measuring
    from diffusion_jax import metrics as metrics
    from diffusion_jax import models as models
    from diffusion_jax import objectives as objectives
    from diffusion_jax import pictures as pictures
    from diffusion_jax import processes as processes
    from diffusion_jax import quantization as quantization
    from diffusion_jax import rendering as rendering
    from diffusion_jax import sampling as sampling
    from diffusion_jax import solvers as solvers
    from diffusion_jax import streaming as streaming
    from diffusion_jax import students as students
    from diffusion_jax import timesteps as timesteps
    from diffusion_jax import training as training
    from diffusion_jax import typing as typing
    from diffusion_jax.config import build as build
    from diffusion_jax.config import call as call
    from diffusion_jax.config.overrides import apply_overrides as apply_overrides
    from diffusion_jax.denoisers import denoiser as denoiser
    from diffusion_jax.denoisers import guided as guided
    from diffusion_jax.errors import InvalidInput as InvalidInput
    from diffusion_jax.experiment import compiled_sampler as compiled_sampler
    from diffusion_jax.experiment import fit as fit
    from diffusion_jax.experiment import prepare as prepare
    from diffusion_jax.experiment import prepare_sampling as prepare_sampling
    from diffusion_jax.interop import load_lora as load_lora
    from diffusion_jax.interop import load_pipeline as load_pipeline
    from diffusion_jax.interop import load_pretrained as load_pretrained
    from diffusion_jax.sampling import invert as invert
    from diffusion_jax.sampling import make_sampler as make_sampler
    from diffusion_jax.typing import Denoiser as Denoiser
    from diffusion_jax.typing import Solver as Solver

__version__ = "0.1.0"

_MODULES = (
    *("acceleration", "adapters", "baselines", "config", "control", "data", "denoisers", "distributed", "errors"),
    *("experiment", "interop", "measuring", "metrics", "models", "objectives", "pictures", "processes", "quantization"),
    *("rendering", "sampling", "solvers", "streaming", "students", "timesteps", "training", "typing"),
)

_NAMES = {
    "config": ("build", "call"),
    "denoisers": ("denoiser", "guided"),
    "errors": ("InvalidInput",),
    "experiment": ("compiled_sampler", "fit", "prepare", "prepare_sampling"),
    "interop": ("load_lora", "load_pipeline", "load_pretrained"),
    "config.overrides": ("apply_overrides",),
    "sampling": ("invert", "make_sampler"),
    "typing": ("Denoiser", "Solver"),
}
"""Names that are given here, by the module that they come from; the imports above tell type checkers the same."""

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # so that a misspelt name is an error for them, too

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_MODULE_OF})


keep_freed_memory()
