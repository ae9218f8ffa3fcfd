"""A small video transformer of still scenes in 3-D, which fills in a clip between two given views.

It works on the principal components of frames, one token a frame, and is told both ends and where every camera is.
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.experiment import defaults


def scene_transformer(
    steps: int, world: ConfigDict, *, rate: float = 2e-3, batch_size: int = 32, components: int = 64, **fields: Any
) -> ConfigDict:
    """The config of a `video_dit` on `world` (`data.splat_scenes`): of v, with zero terminal signal.

    fields: of `video_dit` that differ. Clips become latents and conditions where it is trained: a channel and a frame
    of `objectives.end_frames`, and `rendering.camera_numbers`, in cond["concat"].
    """
    config = defaults(steps=steps, batch_size=batch_size)
    config.update({"data": world, "held_out": None, "components": components, "optimizer": warmed_adam(steps, rate)})
    size = {"width": 128, "depth": 3, "heads": 4, "qk_norm": True, **fields}
    time = {"attention": "joint", "temporal_positions": "rotary"}
    config.model = call("models.video_dit", preset="S/1", patch=1, **size, **time, conditions=(call("models.concat"),))
    config.process = call("processes.vp_scaled_linear", zero_terminal_snr=True)
    config.objective = call("objectives.denoising", draw=call("timesteps.uniform"))
    return config


def warmed_adam(steps: int, rate: float) -> ConfigDict:
    """AdamW whose rate rises for at most 20 steps and falls as a cosine."""
    schedule = {"peak": rate, "total_steps": max(steps, 1), "warmup_steps": min(20, steps // 4)}
    return call("training.optimizers.adamw", learning_rate=call("training.optimizers.cosine", **schedule))
