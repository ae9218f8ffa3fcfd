"""A small world model of a tabletop: a transformer of actions and of the frame that follows, each at its own time."""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.experiment import defaults


def world_transformer(
    source: ConfigDict, draw: Any, steps: int = 1600, batch_size: int = 32, **network: Any
) -> ConfigDict:
    """The config of the network, trained in about a minute of one core; what it sees are pictures.

    source: of windows, a call; where their futures are latents (`data.principal_futures`) the network has both
        modalities, else actions alone. A batch is twice as large where half of it are windows without actions, so that
        an update sees as many with them. Actions count ten times as much as frames, which otherwise take the network
        for themselves. draw: of times, for each modality. network: fields of
        `models.joint_transformer` that differ.
    """
    joint = source.call == "data.principal_futures"
    config = defaults(steps=steps, batch_size=batch_size * (2 if joint and source.source.share else 1))
    config.data, config.held_out = source, None
    size = {"preset": "uwm", "registers": 2, "width": 64, "depth": 3, "heads": 4, **network}
    modalities = {"action": (2,), "future": (1, 1)} if joint else (2,)
    trunk = call("models.joint_transformer", modalities=modalities, conditions=(call("models.pooled"),), **size)
    config.model = call("models.watching", network=trunk)
    # Of 128 components most are noise at most times: the network tells what is clean.
    flow = call("processes.rectified_flow", prediction="x0")
    config.process = call("processes.JointProcess", processes={"action": flow, "future": flow}) if joint else flow
    weights = {"modality_weights": {"action": 10.0}} if joint else {}
    config.objective = call("objectives.denoising", draw=draw, **weights)
    rate = call("training.optimizers.cosine", peak=3e-3, total_steps=steps, warmup_steps=min(100, steps // 3))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def often_at_the_ends(draw: ConfigDict, ignored: float, given: float = 0.15) -> ConfigDict:
    """Times of `draw`, of which more than their share stand at 0 or at 1: a short training asks for it."""
    known = call("timesteps.pinned", draw=draw, value=0.0, probability=given, weight=1.0)
    return call("timesteps.pinned", draw=known, value=1.0, probability=ignored, weight=1.0)
