"""VideoScene: one step from a rendering of a scene that was reconstructed from two views, at a time that is chosen."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

TIMES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.6)
"""Times between which the policy chooses."""


def trained(steps: int, batch_size: int, rate: float, data: ConfigDict) -> ConfigDict:
    config = defaults(steps=steps, batch_size=batch_size)
    config.update({"data": data, "held_out": None, "process": call("processes.rectified_flow"), "model": None})
    config.objective = call("objectives.splat_rendering")
    config.optimizer = adam(steps, rate)
    return config


def adam(steps: int, rate: float) -> ConfigDict:
    schedule = {"peak": rate, "total_steps": max(steps, 1), "warmup_steps": min(20, steps // 4)}
    return call("training.optimizers.adamw", learning_rate=call("training.optimizers.cosine", **schedule))


def clips(steps: int, rate: float, world: ConfigDict, batch_size: int = 32, **size: int) -> ConfigDict:
    """A video transformer on principal components, a token a frame, that is told both ends and where cameras are."""
    config = trained(steps, batch_size, rate, world)
    fields = {"width": 128, "depth": 3, "heads": 4, "components": 96, **size}
    config.components = fields.pop("components")
    config.model = call(
        "models.video_dit", preset="S/1", **fields, patch=1, qk_norm=True, attention="joint",
        temporal_positions="rotary", conditions=(call("models.concat"),),
    )  # fmt: skip
    config.process = call("processes.vp_scaled_linear", zero_terminal_snr=True)
    config.objective = call("objectives.denoising", draw=call("timesteps.uniform"))
    return config


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    world = call("data.splat_scenes", length=2048, objects=8)
    test = call("data.splat_scenes", split="test", length=128, objects=8)
    config.reconstruction = trained(100, 8, 3e-3, world)
    config.reconstruction.reconstructor = call("models.pixel_reconstructor", near=1.6, far=4.4)
    config.rendered = ConfigDict({"data": world, "held_out": test, "batch": 64})
    config.teacher = clips(1500, 2e-3, world)
    config.teacher.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config
