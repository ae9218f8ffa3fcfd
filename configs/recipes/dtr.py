"""DTR: a small class-conditional transformer on digits, whose blocks see the channels of their timestep."""

from typing import Any

from diffusion_jax.baselines import digit_transformer
from diffusion_jax.config import ConfigDict, call

CLUSTERS = 8
"""Intervals of equal length whose losses are weighed by learned uncertainties, as published."""


def network(steps: int, mask: ConfigDict | None, weight: str = "", **size: Any) -> ConfigDict:
    """The training of an arm. mask: its channels, None for all; weight: "", "Min-SNR" or "UW"."""
    config = digit_transformer(max(steps, 2), **{"preset": "S/4", "depth": 4, "qk_norm": False, **size})
    config.train.steps = steps
    if mask is not None:
        config.model = call("models.task_routed", network=config.model, span=(0.0, 999.0), mask=mask)
    if weight == "Min-SNR":
        config.objective.weight = call("timesteps.min_snr_weight", gamma=5.0)
    if weight == "UW":
        edges = tuple(i / CLUSTERS for i in range(CLUSTERS + 1))
        config.objective.draw = call("timesteps.by_cluster", edges=edges)
        config.objective = call("objectives.uncertainty_weighted", objective=config.objective, edges=edges)
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    window = call("models.channel_window", ratio=0.8, exponent=4.0)
    arms = {
        "all channels": (None,),
        "DTR": (window,),
        "random": (call("models.random_channels", ratio=0.8),),
        "DTR, even": (call("models.channel_window", ratio=0.8, exponent=1.0),),
        "DTR, narrow": (call("models.channel_window", ratio=0.4),),
        "Min-SNR": (None, "Min-SNR"),
        "DTR, Min-SNR": (window, "Min-SNR"),
        "UW": (None, "UW"),
        "DTR, UW": (window, "UW"),
    }
    config.arms = {name: network(1000, *arm) for name, arm in arms.items()}
    # Copies and times of held-out digits; times, and examples, at which gradients are compared.
    config.update({"repeats": 4, "bins": 16, "affinity": {"times": (0.55, 0.7, 0.85, 1.0), "examples": 300}})
    config.update({"guidance": 1.5, "grid": call("timesteps.linspace", steps=25), "count": 500})
    if variant == "smoke":
        config.update({"seed_numbers": (0,), "repeats": 1, "bins": 2, "count": 8})
        config.affinity.update({"times": (0.5, 1.0), "examples": 4})
        config.grid.steps = 2
        # One network, as it begins, stands for all arms.
        one = network(0, window, width=16, depth=1, heads=2, scan=False)
        one.ema, one.mesh = {}, call("distributed.make_mesh", devices=1)
        one.optimizer = call("training.optimizers.sgd")
        config.arms = dict.fromkeys(arms, one)
    return config


def paper() -> ConfigDict:
    """DiT-L/2 on latents of ImageNet of 256 pixels: 400,000 updates of AdamW at 1e-4 in batches of 256, EMA 0.9999."""
    conditions = (call("models.label", num_classes=1000),)
    inner = call("models.dit", preset="L/2", conditions=conditions, learn_sigma=True)
    config = network(400_000, None)
    config.model = call("models.task_routed", network=inner, span=(0.0, 999.0), mask=call("models.channel_window"))
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4, weight_decay=0.0)
    config.ema = {"average": call("training.ema.fixed", decay=0.9999)}
    config.grid = call("timesteps.leading", steps=250)
    config.inputs = {"x0": (32, 32, 4), "cond": {"label": ("int",)}}
    return config
