"""AccVideo: students of 5 steps of an exact teacher in the plane, and of a small video transformer, on stored runs."""

from typing import Any

from diffusion_jax.baselines import clip_transformer
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

CLASSES, FEW = ("colour", "size"), 64


def shifted(steps: int) -> ConfigDict:
    """The published grid: every tenth time of 50 is the grid of 5."""
    return call("timesteps.shift", grid=call("timesteps.linspace", steps=steps), shift=7.0)


def adamw(rate: float, steps: int) -> ConfigDict:
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(20, steps // 2))
    return call("training.optimizers.adamw", learning_rate=schedule)


def correction(steps: int, width: int, keys: ConfigDict, batch_size: int = 512) -> ConfigDict:
    """How a student in the plane is trained; on what, a stage says."""
    config = defaults(steps=steps, batch_size=batch_size)
    config.update({"data": call("data.toys2d", name="gaussians"), "held_out": None, "few": keys})
    config.update({"process": call("processes.rectified_flow"), "objective": call("objectives.denoising")})
    config.update({"model": call("models.mlp", width=width, depth=2), "optimizer": adamw(3e-3, steps)})
    return config


def student(base: ConfigDict, steps: int, keys: ConfigDict, runs: int, **fields: Any) -> ConfigDict:
    """How a student of the transformer is trained, on the first `runs` runs; width: of the heads, 0 for none."""
    config = ConfigDict(base.to_dict())
    config.update({"few": keys, "runs": runs, "width": 0, "optimizer": adamw(1e-3, steps), **fields})
    config.train.steps = steps
    if config.width:
        parts = {"student": config.optimizer, "heads": call("training.optimizers.adamw", learning_rate=1e-3)}
        config.optimizer = call("training.optimizers.alternating", parts=parts)
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    many, keys = shifted(50), shifted(5)
    config.ring = {"count": 4096, "displaced": (0.0, 3.0), "student": correction(800, 64, keys)}
    config.ring.runs = {"grid": many, "every": 10, "count": 4096, "at_once": 4096}
    base = clip_transformer(2000, classes=CLASSES, width=128, depth=2)
    base.objective.update({"t_shape": 1, "cond_dropout": 0.1, "null": {"label": 12}})
    config.clips = {"base": base, "classes": CLASSES, "count": 240, "shown": 3}
    config.clips.runs = {"grid": many, "every": 10, "count": 2048, "at_once": 128, "guidance": 2.0, "seed": 0}
    config.clips.student, config.clips.few = (student(base, 600, keys, runs) for runs in (2048, FEW))
    config.clips.adversarial = student(base, 600, keys, FEW, width=64, weight=0.003, r1=1.0)
    config.clips.imitator = student(base, 600, keys, 0, guidance=2.0)
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Untrained networks, but for two updates of the adversarial student; two steps, each of them stored."""
    keys, size = shifted(2), {"width": 16, "depth": 1, "heads": 2, "scan": False}
    config.update({"seed_numbers": (0,), "ring": {"count": 8, "displaced": ()}, "clips": {"count": 12, "shown": 1}})
    for runs in (config.ring.runs, config.clips.runs):
        runs.update({"grid": keys, "every": 1, "count": 8})
    config.ring.student = correction(2, 8, keys, 8)
    base = clip_transformer(2, classes=CLASSES, clips=24, components=8, batch_size=4, **size)
    base.objective = config.clips.base.objective
    config.clips.base, config.clips.student = base, student(base, 2, keys, 8)
    config.clips.few = config.clips.student
    config.clips.imitator = student(base, 2, keys, 0, guidance=2.0)
    config.clips.adversarial = student(base, 2, keys, 8, width=4, weight=0.003, r1=0.0)
    for one in (base, config.clips.student, config.clips.imitator, config.ring.student):
        one.train.steps = 0
    return config


def paper() -> ConfigDict:
    """HunyuanVideo as a transformer on latents of 24 frames of 68 x 120: 110,000 runs with guidance 6, of which batches
    of 32 train the student in 1200 updates at 5e-6."""
    config = ConfigDict({"inputs": {"x0": (24, 68, 120, 16), "cond": {"context": (256, 4096)}}})
    size = {"patch": 2, "width": 3072, "depth": 60, "heads": 24, "attention": "joint", "qk_norm": True}
    config.model = call("models.video_dit", conditions=(call("models.context"),), **size)
    config.update({"process": call("processes.rectified_flow"), "many": shifted(50), "few": shifted(5)})
    return config
