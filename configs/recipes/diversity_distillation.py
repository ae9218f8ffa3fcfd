"""Diversity distillation: a few-step student of the digits transformer, and runs that begin with the base.

The student's grid begins where half of the variance of a digit's strongest direction shows in the noise, and its second
time is early enough for the base's one step from there to leave it room: in 64 dimensions little is decided before.
"""

from typing import Any

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call

NOXATTN = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")
"""Where sliders are: all layers but cross-attention and the embeddings."""

GRID = call("timesteps.from_array", values=(0.6, 0.3, 0.12, 0.05, 0.0))


def adamw(rate: float, steps: int) -> ConfigDict:
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(10, steps // 2))
    return call("training.optimizers.adamw", learning_rate=schedule)


def student(steps: int, rate: float = 5e-4, every: int = 2, **fields: Any) -> ConfigDict:
    """How the student and its fake score are trained; the student moves in every `every`-th step."""
    config = digit_transformer(steps, **fields)
    config.train.batch_size = 32
    config.update(
        {
            "ema": {},
            "grid": GRID,
            "first": 0.7,
            "guidance": 2.0,
            "compared": call("timesteps.uniform", low=0.02, high=0.6),
        }
    )
    # The fake follows the student at a constant rate.
    parts = {"student": adamw(rate, steps // every), "fake": call("training.optimizers.adamw", learning_rate=2 * rate)}
    config.optimizer = call("training.optimizers.alternating", parts=parts, every={"student": every})
    return config


def slider(steps: int, **fields: Any) -> ConfigDict:
    """How the factors of a slider are trained, whoever it is attached to. strength: of the gradient of ink."""
    config = digit_transformer(steps, **fields)
    config.train.batch_size = 32
    config.update({"ema": {}, "optimizer": adamw(2e-3, steps), "strength": 40.0})
    config.lora = call("adapters.lora", rank=4, alpha=1, select=NOXATTN)
    config.draw = call("timesteps.uniform", low=0.02, high=0.7)
    return config


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102)})
    config.update({"base": digit_transformer(), "student": student(250), "slider": slider(80), "each": 20})
    config.update(
        {"grid": GRID, "long": call("timesteps.linspace", steps=40), "own": call("timesteps.linspace", steps=20)}
    )
    config.update({"short": config.own, "solver": call("solvers.lcm"), "base_solver": call("solvers.ddim")})
    config.strengths = (-1.0, -0.5, 0.0, 0.5, 1.0)
    config.patterns = {"samples": 1000, "dimensions": 256, "patterns": 8, "base_steps": 60}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """A base, a student and sliders as they begin, and few patterns; digits are not judged."""
    config.base = tiny_digit_transformer(steps=0)
    config.update({"student": student(4), "slider": slider(4), "seed_numbers": (0,), "each": 0})
    for part in (config.student, config.slider):
        part.update({"model": config.base.model, "mesh": config.base.mesh})
        part.train.steps = 0
    config.short, config.strengths = config.grid, (-1.0, 0.0, 1.0)
    config.patterns = {"samples": 16, "dimensions": 16, "patterns": 4, "base_steps": 4}
    return config


def paper() -> ConfigDict:
    """SDXL and DMD2 on four indices, one base step, no guidance; sliders of rank 4 in the attention. A diffusion
    transformer stands for SDXL's U-Net, at the size of its latents."""
    config = ConfigDict({"inputs": {"x0": (128, 128, 4), "cond": {"context": (77, 2048)}}})
    config.model = call("models.dit", preset="XL/2", conditions=(call("models.context", channels=2048),), in_channels=4)
    config.process = call("processes.vp_scaled_linear")
    config.grid = call("timesteps.from_indices", indices=(999, 749, 499, 249))
    config.lora = call("adapters.lora", rank=4, alpha=1, select=NOXATTN[:4])
    return config
