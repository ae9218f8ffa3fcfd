"""Diversity distillation: a few-step student of the digits transformer, and runs that begin with the base.

    python -m diffusion_jax.recipes diversity_distillation

The student's grid begins where the signal-to-noise ratio is about that of Stable Diffusion's last index (abar = 0.007
against 0.005), and its second time is late enough for a digit of 64 pixels to be decided before it. Grid and rates
follow trials of other grids on seeds from 100 on; the sliders' strength was not tuned. Variants: `smoke`, a few steps;
`paper`, the published settings for SDXL and DMD2 as entries, which no run here uses.
"""

from typing import Any

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call

NOXATTN = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")
"""Where sliders are: all layers but cross-attention and the embeddings."""

TAUS = (0.7, 0.12, 0.06, 0.03, 0.0)


def adamw(rate: float, steps: int) -> ConfigDict:
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(10, steps // 2))
    return call("training.optimizers.adamw", learning_rate=schedule)


def student(steps: int, every: int, rate: float, **fields: Any) -> ConfigDict:
    """How the student and its fake score are trained; the student moves in every `every`-th step."""
    config = digit_transformer(steps, **fields)
    config.train.batch_size = 64
    config.ema = {}
    # The fake follows the student at a constant rate.
    parts = {"student": adamw(rate, steps // every), "fake": call("training.optimizers.adamw", learning_rate=2 * rate)}
    config.optimizer = call("training.optimizers.alternating", parts=parts, every={"student": every})
    return config


def slider(steps: int, **fields: Any) -> ConfigDict:
    """How the factors of a slider are trained, whoever it is attached to."""
    config = digit_transformer(steps, **fields)
    config.train.batch_size = 64
    config.ema = {}
    config.optimizer = adamw(2e-3, steps)
    config.lora = call("adapters.lora", rank=4, alpha=1, select=NOXATTN)
    config.draw = call("timesteps.uniform", low=0.02, high=0.7)
    config.strength = 40.0
    return config


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed": 0, "seeds": 3})
    # Samples of each class that are measured; the class that is shown.
    config.update({"each": 50, "shown": 2})
    config.base = digit_transformer()
    config.student = student(750, every=2, rate=3e-4)
    config.compared = call("timesteps.uniform", low=0.02, high=0.6)
    config.first = 0.5
    config.grid = call("timesteps.from_array", values=TAUS)
    config.long = call("timesteps.linspace", steps=40)
    # Grids of the base before the student takes over; the released command has 20 steps.
    config.own = {"short": call("timesteps.quadratic", steps=6), "long": call("timesteps.linspace", steps=20)}
    config.solver, config.base_solver = call("solvers.lcm"), call("solvers.ddim")
    config.slider = slider(150)
    config.sliding = {"each": 8, "strengths": (-1.0, -0.5, 0.0, 0.5, 1.0)}
    solvers = ("DDIM", "fresh noise")
    config.patterns = {"size": 1000, "dimensions": 256, "patterns": 8, "base_steps": 60, "solvers": solvers}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The base alone is trained, for a few steps; student and sliders are as they begin. One solver in four steps."""
    config.seeds, config.each, config.base = 1, 4, tiny_digit_transformer()
    config.student, config.slider = student(4, every=2, rate=3e-4), slider(4)
    for part in (config.student, config.slider):
        part.model, part.mesh, part.train.steps = config.base.model, config.base.mesh, 0
    config.long.steps, config.own, config.base_solver = len(TAUS) - 1, {}, config.solver
    config.sliding = {"each": 4, "strengths": (-1.0, 0.0, 1.0)}
    config.patterns = {"size": 16, "dimensions": 16, "patterns": 4, "base_steps": 4, "solvers": ("DDIM",)}
    return config


def paper() -> ConfigDict:
    """What is published: SDXL and DMD2 on four indices, one base step, no guidance; the released command's grid.

    A diffusion transformer stands for SDXL's U-Net, at the size of its latents.
    """
    config = get_config()
    config.base.model = call(
        "models.dit", preset="XL/2", conditions=(call("models.context", channels=2048),), in_channels=4
    )
    config.base.process = call("processes.vp_scaled_linear")
    config.grid = call("timesteps.from_indices", indices=(999, 749, 499, 249))
    config.own = {"long": call("timesteps.trailing", steps=20, num_train_steps=1000)}
    config.long = call("timesteps.trailing", steps=50, num_train_steps=1000)
    config.slider.lora = call("adapters.lora", rank=4, alpha=1, select=NOXATTN[:4])
    return config
