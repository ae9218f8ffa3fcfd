"""Training: the state, the jitted step, averages of the parameters, optimisers, checkpoints, logs and the loop.

Nothing here knows about diffusion; training only sees an `Objective`.
"""

from diffusion_jax.training import by_time, ema, logging, optimizers
from diffusion_jax.training.checkpoint import Checkpointer, Restored
from diffusion_jax.training.draws import train_on_draws
from diffusion_jax.training.frozen import complete_state, frozen_trees, without_frozen
from diffusion_jax.training.loop import Callback, Diverged, train
from diffusion_jax.training.state import TrainState, init_state, make_init
from diffusion_jax.training.step import TrainStep, make_train_step
from diffusion_jax.training.subspace import SubspaceState, still_directions, subspace_gradient
from diffusion_jax.training.weights import (
    export_params,
    load_params,
    read_config,
    reconstruct_ema,
    save_params,
    saved_steps,
    write_config,
)

__all__ = [
    "Callback",
    "Checkpointer",
    "Diverged",
    "Restored",
    "SubspaceState",
    "TrainState",
    "TrainStep",
    "by_time",
    "complete_state",
    "ema",
    "export_params",
    "frozen_trees",
    "init_state",
    "load_params",
    "logging",
    "make_init",
    "make_train_step",
    "optimizers",
    "read_config",
    "reconstruct_ema",
    "save_params",
    "saved_steps",
    "still_directions",
    "subspace_gradient",
    "train",
    "train_on_draws",
    "without_frozen",
    "write_config",
]
