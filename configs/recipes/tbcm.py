"""TBCM: students of one and two steps, from runs of their teacher without data, beside the same loss on data.

On a ring of eight Gaussians the teacher is exact and students are trained for every seed; on digits a transformer of a
linear flow is the teacher, and the scale of its guidance is drawn and told to the student.
"""

import math
from typing import Any

from diffusion_jax.baselines import digit_transformer, on_garments
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

KNOTS = 15
"""Pairs of one run of the teacher; a batch of data holds as many as all runs of a batch of noise."""

SHIFT = 2.5
"""Of the knots, as published: they are even steps of a linear flow, shifted towards noise."""

SIGMA_DATA = 0.5
RADIUS, SPREAD = (SIGMA_DATA / math.sqrt(0.5 + 0.1**2) * size for size in (1.0, 0.1))
"""Of the ring, whose coordinates have the standard deviation `SIGMA_DATA`."""


def ring_data(turned: float = 0.0) -> ConfigDict:
    """Eight Gaussians on a circle; turned: by this share of the way to the next one."""
    angles = [2 * math.pi * (i + turned) / 8 for i in range(8)]
    means = tuple((RADIUS * math.cos(angle), RADIUS * math.sin(angle)) for angle in angles)
    return call("data.gaussian_blobs", weights=(0.125,) * 8, means=means, stds=SPREAD)


def angles(knots: int) -> ConfigDict:
    """The knots as times of TrigFlow: of a linear flow of unit data, tan(a) = u / (1 - u)."""
    shares = [1 - i / knots for i in range(knots + 1)]
    flow = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in shares]
    return call("timesteps.from_array", values=tuple(2 / math.pi * math.atan2(u, 1 - u) for u in flow))


def trained(config: ConfigDict, steps: int, size: int, rate: float, grid: ConfigDict | None, **loss: Any) -> ConfigDict:
    """How a student learns: on runs through a grid, as many as `size`, or on as many data as these have pairs."""
    ramp = call("objectives.tangent_ramp", warmup=max(steps // 5, 1))
    if grid is None:
        config.objective = call("objectives.continuous_consistency", ramp=ramp, **loss)
    else:
        config.objective = call("objectives.trajectory_backward", grid=grid, ramp=ramp, **loss)
    warmup, total = min(50, steps // 2), max(steps, 1)
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=total, warmup_steps=warmup)
    config.optimizer, config.ema = call("training.optimizers.adamw", learning_rate=schedule), {}
    batch_size = size * KNOTS if grid is None else size
    config.train.update({"steps": steps, "batch_size": batch_size, "validate_every": 0})
    return config


def ring_student(grid: ConfigDict | None, turned: float = 0.0, steps: int = 800, size: int = 16, **mlp) -> ConfigDict:
    config = defaults(steps=steps, batch_size=size)
    config.data, config.held_out, config.mixture = ring_data(turned), None, ring_data()
    config.model = call("models.mlp", **{"width": 128, "depth": 3, **mlp})
    config.process = call("processes.trig_flow", sigma_data=SIGMA_DATA, time="t")
    return trained(config, steps, size, 1e-3, grid)


def digit_student(base: ConfigDict, grid: ConfigDict | None, steps: int = 300, rate: float = 5e-4) -> ConfigDict:
    """As its teacher, and told the scale of guidance."""
    config = base.copy_and_resolve_references()
    config.model.conditions = (*config.model.conditions, call("models.guidance_scale", features=32).to_dict())
    return trained(config, steps, 8, rate, grid, scales=(1.5, 2.0, 2.5), sigma_data=SIGMA_DATA)


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    # reference: steps of the teacher whose endpoints stand for those of its flow.
    config.ring = {"count": 2000, "reference": 200}
    if variant == "smoke":
        # Students of the ring alone, as they begin.
        config.seed_numbers, config.ring = (0,), {"count": 32, "reference": 4}
        small = {"steps": 0, "size": 2, "width": 8, "depth": 1}
        runs, data = ring_student(angles(3), **small), ring_student(None, **small)
        config.ring.students = {"TBCM": runs, "sCM": data, "sCM, other data": data}
        return config
    arms = {"TBCM": (angles(KNOTS), 0.5), "sCM": (None, 0.0), "sCM, other data": (None, 0.5)}
    config.ring.students = {name: ring_student(*arm) for name, arm in arms.items()}
    config.digits = {"count": 400, "guidance": 2.0, "reference": 50, "world": "digits"}
    base = config.digits.base = digit_transformer(1200, width=48, depth=4)
    base.process = call("processes.rectified_flow", time="t")
    shifted = call("timesteps.shift", grid=call("timesteps.linspace", steps=KNOTS), shift=SHIFT)
    config.digits.students = {"TBCM": digit_student(base, shifted), "sCM": digit_student(base, None)}
    if variant == "fashion":
        config.digits.world = "fashion_mnist"
        return on_garments(config)
    return config


def paper() -> ConfigDict:
    """Sana-Sprint 0.6B on latents of 1024 x 1024 pixels: 16 evaluations a run, guidance 4, 4.5 or 5; r rises for 4000
    losses and from loss 15,000 on falls to 0.75 within 2000. A transformer of about that size stands for Sana."""
    config = ConfigDict({"inputs": {"x0": (32, 32, 32), "cond": {"context": (300, 2304), "guidance_scale": ()}}})
    conditions = (call("models.context", channels=2304), call("models.guidance_scale", features=256))
    config.model = call("models.dit", preset="L/1", in_channels=32, conditions=conditions)
    config.process = call("processes.trig_flow", sigma_data=SIGMA_DATA)
    ramp = call("objectives.tangent_ramp", warmup=4000, calm_from=15_000, calm_steps=2000, final=0.75)
    loss = {"ramp": ramp, "scales": (4.0, 4.5, 5.0), "log_variance": True}
    config.objective = call("objectives.trajectory_backward", grid=angles(KNOTS), **loss)
    config.grid = call("timesteps.from_array", values=(1.0, 2 / math.pi, 0.0))
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-5)
    return config
