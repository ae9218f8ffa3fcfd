"""Pusa: a label-to-video model of moving shapes becomes an image-to-video model by times for each frame.

    python -m diffusion_jax.recipes pusa

Variants: `smoke`, a few steps; `paper`, the published settings as entries, which no run here uses.
"""

from diffusion_jax import baselines
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

CLASSES = ("shape", "colour")
NULL = {"label": 24}
ATTENTION = ("q", "k", "v", "out")
FEED_FORWARD = ("feed_forward/up", "feed_forward/down")


def base(steps: int, length: int = 30_000, **model) -> ConfigDict:
    """The label-to-video model: one time a clip, joint attention over the clip as in Wan, a token a frame."""
    config = defaults(steps=steps, batch_size=64)
    config.data = call("data.moving_shapes", length=length, classes=CLASSES)
    config.held_out = call("data.moving_shapes", split="test", classes=CLASSES)
    fields = {"patch": 1, "width": 96, "depth": 4, "heads": 4, "qk_norm": True, "attention": "joint"}
    label = (call("models.label", num_classes=NULL["label"]),)
    config.model = call("models.video_dit", **{**fields, "conditions": label, **model})
    config.process = call("processes.rectified_flow", prediction="x0")
    draw = baselines.frame_times()
    config.objective = call("objectives.denoising", draw=draw, t_shape="batch", cond_dropout=0.1, null=NULL)
    rate = call("training.optimizers.cosine", peak=0.015, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call("training.optimizers.muon", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.sampling.update(solver=call("solvers.flow_euler"), grid=baselines.clip_grid())
    return config


def adapter(config: ConfigDict, draw: ConfigDict | None, steps: int, rate: float, rank: int) -> ConfigDict:
    """How an adaptation of the experiment `config` is trained; draw None: one time a clip, as the base."""
    config = config.copy_and_resolve_references()
    config.train.steps = steps
    config.optimizer = call(
        "training.optimizers.adamw",
        learning_rate=call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=steps // 10),
        weight_decay=0.0,
    )
    config.ema = {}
    # The label alone says what a clip shows: what is learned from given frames is learned without it.
    config.objective.cond_dropout = 0.5
    config.lora = call("adapters.lora", rank=rank, select=(*ATTENTION, *FEED_FORWARD))
    if draw is None:
        config.model.conditions = (*config.model.conditions, call("models.concat").to_dict())
        config.lora.select = (*config.lora.select, "patch_embed")
    else:
        config.objective.draw = draw
        with config.ignore_type():
            config.objective.t_shape = 2
    return config


def paper() -> ConfigDict:
    """The sizes of Wan2.1 14B in our network; rank 512, 900 updates of 8 of 3,860 own clips, times on a grid shifted by
    5, 10 steps, the adapter at 1.4 (Liu et al. 2025)."""
    config = get_config()
    text = {"conditions": (call("models.context"),), "positions": "rotary", "temporal_positions": "rotary"}
    config.base = base(1, **text, patch=2, width=5120, depth=40, heads=40, mlp_ratio=2.7, dtype="bfloat16")
    config.base.process = call("processes.rectified_flow")
    config.base.objective = call("objectives.denoising")
    times = call("timesteps.shift", grid=call("timesteps.linspace", steps=1000), shift=5.0)
    draw = call("timesteps.independent", draw=call("timesteps.on_grid", grid=times))
    config.arms = {"vta": adapter(config.base, draw, 900, 1e-5, 512)}
    config.arms.vta.objective.cond_dropout = 0.0
    config.arms.vta.optimizer.learning_rate = call("training.optimizers.constant", value=1e-5)
    config.arms.vta.train.batch_size = 8
    config.own_samples, config.null = 3860, {"context_mask": False}
    config.grid = call("timesteps.shift", grid=call("timesteps.linspace", steps=10), shift=5.0)
    config.scale, config.guidance = 1.4, 3.0
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    steps = 20 if smoke else 1600
    model = {"width": 16, "depth": 1, "heads": 2} if smoke else {}
    times = call("timesteps.on_grid", grid=call("timesteps.linspace", steps=1000))
    each, common = call("timesteps.independent", draw=times), call("timesteps.shared", draw=times)
    draws = {
        "vta": each,
        "ptss": call("timesteps.mixture", first=each, second=common, probability=0.2),
        "first_frame": call("timesteps.pinned", draw=common, entries=1, value=0.0),
        "concat": None,
    }
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3})
    config.base = base(steps, 256 if smoke else 30_000, **model)
    config.coded, config.components = (32, 16) if smoke else (500, 96)
    config.arms = {
        name: adapter(config.base, draw, max(2, steps // 20), 5e-3, 4 if smoke else 16) for name, draw in draws.items()
    }
    config.own_samples = 64 if smoke else 1920
    config.clips = 8 if smoke else 96
    config.guidance, config.null = 1.5, NULL
    config.grid, config.solver = baselines.clip_grid(2 if smoke else 10), call("solvers.flow_euler")
    config.scale, config.scales = 1.0, (1.0, 2.0) if smoke else (0.5, 1.0, 1.5, 2.0)
    if smoke:
        # One adaptation, of a base as it begins.
        config.base.train.steps, config.own_samples, config.arms = 0, 16, {"vta": config.arms.vta}
        config.arms.vta.train.batch_size = 8
    return config
