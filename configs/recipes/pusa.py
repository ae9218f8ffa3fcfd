"""Pusa: a label-to-video model of moving shapes becomes an image-to-video model by times for each frame."""

from typing import Any

from diffusion_jax.baselines import clip_grid, clip_transformer, frame_times
from diffusion_jax.config import ConfigDict, call

NULL = {"label": 4}
SELECT = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")


def base(steps: int, **sizes: Any) -> ConfigDict:
    """The label-to-video model: one time a clip, joint attention over the clip as in Wan, a token a frame."""
    config = clip_transformer(steps, classes=("shape",), **sizes)
    config.objective = call("objectives.denoising", draw=frame_times(), t_shape="batch", cond_dropout=0.1, null=NULL)
    return config


def adapter(config: ConfigDict, draw: ConfigDict | None, steps: int, rate: float, rank: int) -> ConfigDict:
    """How an adaptation of the experiment `config` is trained; draw None: one time a clip, given frames as channels."""
    config = config.copy_and_resolve_references()
    config.train.steps, config.ema = steps, {}
    rates = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=steps // 10)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rates, weight_decay=0.0)
    config.lora = call("adapters.lora", rank=rank, select=SELECT)
    shape = {"draw": frame_times(), "t_shape": "batch"} if draw is None else {"draw": draw, "t_shape": 2}
    config.objective = call("objectives.denoising", cond_dropout=0.1, null=NULL, **shape)
    if draw is None:
        config.model.conditions = (*config.model.conditions, call("models.concat").to_dict())
        config.lora.select = (*SELECT, "patch_embed")
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (0, 1, 2, 100, 101, 102)})
    smoke = variant == "smoke"
    size: dict[str, Any] = {"width": 128, "depth": 2, "components": 128}
    if smoke:
        size = {"width": 16, "depth": 1, "heads": 2, "scan": False, "clips": 16, "components": 8, "batch_size": 4}
    config.base = base(2 if smoke else 2000, **size)
    times = frame_times()
    each, common = call("timesteps.independent", draw=times), call("timesteps.shared", draw=times)
    draws = {
        "VTA": each,
        "mixed": call("timesteps.mixture", first=each, second=common, probability=0.2),
        "first frames": call("timesteps.pinned", draw=common, entries=1, value=0.0),
        "mask-and-concat": None,
    }
    steps, rank = (2, 4) if smoke else (300, 16)
    config.arms = {name: adapter(config.base, draw, steps, 5e-3, rank) for name, draw in draws.items()}
    config.grid = clip_grid(2 if smoke else 10)
    config.own = {"count": 8 if smoke else 1920, "labels": 4, "grid": config.grid}
    config.update({"clips": 4 if smoke else 96, "scale": 1.0, "scales": (1.0, 2.0) if smoke else (0.5, 1.0, 1.5, 2.0)})
    if smoke:
        # One adaptation, of a base as it begins.
        config.seed_numbers, config.arms, config.base.train.steps = (0,), {"VTA": config.arms["VTA"]}, 0
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
    config.process = call("processes.rectified_flow")
    config.objective = call("objectives.denoising", draw=draw, t_shape=2)
    config.lora = call("adapters.lora", rank=512, select=SELECT)
    config.grid = call("timesteps.shift", grid=call("timesteps.linspace", steps=10), shift=5.0)
    return config
