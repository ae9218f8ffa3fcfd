"""Pusa: a label-to-video model of moving shapes becomes an image-to-video model by times for each frame."""

from typing import Any

from diffusion_jax.baselines import clip_grid, clip_transformer, frame_times
from diffusion_jax.config import ConfigDict, call

SELECT = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")
EACH, COMMON = (call(f"timesteps.{name}", draw=frame_times()) for name in ("independent", "shared"))
DRAWS = {
    "VTA": EACH,
    "mixed": call("timesteps.mixture", first=EACH, second=COMMON, probability=0.2),
    "first frames": call("timesteps.pinned", draw=COMMON, entries=1, value=0.0),
    "mask-and-concat": COMMON,
}
"""Of the arms: independent times, those of FVDM, given first frames, and given frames as channels at one time."""


def clips(steps: int, draw: ConfigDict, **sizes: Any) -> ConfigDict:
    """A model from a label, a clip's shape, to video."""
    config = clip_transformer(steps, classes=("shape",), **sizes)
    null = {"label": 4}
    config.objective = call("objectives.denoising", draw=draw, t_shape=2, cond_dropout=0.1, null=null)
    return config


def adapter(name: str, steps: int, rank: int, **sizes: Any) -> ConfigDict:
    """How the factors of an arm are trained."""
    config = clips(steps, DRAWS[name], **sizes)
    config.ema, config.optimizer.weight_decay, config.optimizer.learning_rate.peak = {}, 0.0, 2e-3
    config.lora = call("adapters.lora", rank=rank, select=SELECT)
    if name == "mask-and-concat":
        config.model.conditions = (*config.model.conditions, call("models.concat").to_dict())
        config.lora.select = (*SELECT, "patch_embed")
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (0, 1, 2, 100, 101, 102), "grid": clip_grid(10)})
    size: dict[str, Any] = {"width": 128, "depth": 2}
    config.base = clips(2000, COMMON, **size)
    config.arms = {name: adapter(name, 300, 16, **size) for name in DRAWS}
    config.update({"own": {"count": 1920, "grid": clip_grid(32)}, "clips": 96, "scale": 1.0})
    config.scales = (0.5, 1.0, 1.5, 2.0)
    if variant == "smoke":
        # One adaptation, of a base as it begins.
        size = {"width": 16, "depth": 1, "heads": 2, "scan": False, "clips": 16, "components": 8, "batch_size": 4}
        config.base, config.arms = clips(2, COMMON, **size), {"VTA": adapter("VTA", 2, 4, **size)}
        config.base.train.steps, config.grid, config.own = 0, clip_grid(2), {"count": 8, "grid": clip_grid(2)}
        config.update({"seed_numbers": (0,), "clips": 4, "scales": (1.0, 2.0)})
    return config


def paper() -> ConfigDict:
    """The sizes of Wan2.1 14B in our network; rank 512, 900 updates of 8 of 3,860 own clips at 1e-5, times on a grid
    shifted by 5, 10 steps, guidance 3, the adapter at 1.4 (Liu et al. 2025)."""
    size = {"width": 5120, "depth": 40, "heads": 40, "mlp_ratio": 2.7, "qk_norm": True, "dtype": "bfloat16"}
    text = {"conditions": (call("models.context"),), "positions": "rotary", "temporal_positions": "rotary"}
    model = call("models.video_dit", preset="XL/2", attention="joint", **size, **text)
    config = ConfigDict({"model": model, "scale": 1.4, "guidance": 3.0, "updates": 900, "own": {"count": 3860}})
    config.inputs = {"x0": (21, 60, 104, 16), "cond": {"context": (512, 4096)}, "t": (21,)}
    times = call("timesteps.shift", grid=call("timesteps.linspace", steps=1000), shift=5.0)
    draw = call("timesteps.independent", draw=call("timesteps.on_grid", grid=times))
    config.process, config.lora = call("processes.rectified_flow"), call("adapters.lora", rank=512, select=SELECT)
    config.objective = call("objectives.denoising", draw=draw, t_shape=2)
    config.grid = call("timesteps.shift", grid=call("timesteps.linspace", steps=10), shift=5.0)
    return config
