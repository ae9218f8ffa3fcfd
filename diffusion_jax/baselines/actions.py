"""A small diffusion policy on a tabletop: a transformer of actions whose chunks may stand at noise levels of their own.

A disc passes an obstacle on either side to reach a goal; the expert is disturbed, so that it is seen to recover.
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.experiment import defaults


def action_transformer(
    steps: int, share: float, h: int = 4, *, chunk: int = 4, num_steps: int = 32, **network: Any
) -> ConfigDict:
    """The config of the policy, trained in about half a minute of one core.

    A plan has h chunks; actions of one share a level, so a chunk is a token. share: of the examples whose levels are
    those that a stream of chunks visits on a grid of `num_steps` (Høeg et al. 2024); the others have one for all.
    network: fields of `models.joint_transformer` that differ.
    """
    config = defaults(steps=steps, batch_size=64)
    windows = {"task": "reach", "episodes": 500, "history": 1, "chunk": h * chunk, "noise": 0.4}
    config.data, config.held_out = call("data.tabletop_demonstrations", **windows), None
    size = {"width": 64, "depth": 3, "heads": 4, **network}
    tokens = {"modalities": (chunk,), "times": "joined", "conditions": (call("models.pooled"),)}
    config.model = call("models.observing", network=call("models.joint_transformer", **tokens, **size))
    config.process, grid = call("processes.rectified_flow"), call("timesteps.linspace", steps=num_steps)
    staircase = call("timesteps.chunk_staircase", grid=grid, entries=h * chunk, chunk=chunk)
    levels = {
        "first": call("timesteps.on_rows", plan=staircase),
        "second": call("timesteps.shared", draw=call("timesteps.on_grid", grid=grid)),
    }
    draw = call("timesteps.mixture", probability=share, **levels)
    config.objective = call("objectives.denoising", t_shape=2, draw=draw)
    rate = call("training.optimizers.cosine", peak=3e-3, total_steps=steps, warmup_steps=steps // 20)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=1e-4)
    config.ema.average = call("training.ema.power", sigma_rel=0.05)
    return config
