"""DyDiT: heads and hidden groups of the digits transformer by the timestep, at half of the compute."""

from typing import Any

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call

SELECT = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")


def tuning(steps: int, rates: dict[str, float] | float, groups: int = 4, **fields: Any) -> ConfigDict:
    """Fine-tuning of the digits transformer; rates: the peak of each entry that learns, or of all. The complete model
    learns too for the first 15 % of the steps, and the budget falls from 1 to 1/2 within the first 35 %."""
    config = digit_transformer(steps, **fields)
    config.train.update({"clip_norm": None, "batch_size": 16})

    def adamw(peak):
        rate = call("training.optimizers.cosine", peak=peak, total_steps=steps, warmup_steps=steps // 20)
        return call("training.optimizers.adamw", learning_rate=rate)

    if isinstance(rates, dict):
        parts = {name: adamw(rate) for name, rate in rates.items()}
        learned = call("training.optimizers.alternating", parts=parts)
    else:
        learned = adamw(rates)
    config.optimizer = call("training.optimizers.below_norm", optimizer=learned, norm=15.0)
    lengths = {"complete_steps": 3 * steps // 20, "full_steps": steps // 20, "warmup_steps": 3 * steps // 10}
    config.routed = call("adapters.routed", groups=groups, bias=5.0)
    config.update({"budget": call("objectives.budgeted", target=0.5, **lengths), "kept": groups // 2})
    return config


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102), "target": 0.5})
    config.base = digit_transformer()
    config.dynamic, config.uniform = tuning(300, {"params": 1e-3, "routers": 1e-2}), tuning(300, 1e-3)
    config.tuning = tuning(80, 1e-2)
    # Numbers in each block, routers of the mixture included: 13 080 for rank 4 with four experts, 13 062 for rank 11.
    ranks = {"mixed": (4, 4), "plain": (4, 1), "equal": (11, 1)}
    config.factors = {
        name: call("adapters.time_lora", rank=rank, experts=experts, select=SELECT)
        for name, (rank, experts) in ranks.items()
    }
    config.update({"solver": call("solvers.ddim"), "grid": call("timesteps.linspace", steps=20)})
    # Times and repeats of held-out losses; samples; seeds whose weights are cut, and in how many buckets.
    config.update({"times": 200, "repeats": 4, "samples": 256, "cut": 3, "buckets": 4})
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """One block, and widths as they begin, without samples and factors."""
    size = {"width": 24, "depth": 1, "heads": 2}
    config.base = tiny_digit_transformer(steps=0, **size)
    config.dynamic, config.uniform = tuning(2, {"params": 1e-3, "routers": 1e-2}, 2, **size), tuning(2, 1e-3, 2, **size)
    for part in (config.dynamic, config.uniform):
        part.update({"mesh": config.base.mesh, "ema": {}})
        part.train.steps = 0
    config.update({"seed_numbers": (0,), "times": 16, "repeats": 1, "samples": 0})
    config.factors = {}
    return config


def paper() -> ConfigDict:
    """DiT-XL/2 at 256 pixels: half of the compute in 150 000 steps of batch 256, 30 000 with the complete model, at
    rate 1e-4; biases 15 and 35, gradients above norm 200 skipped, 250 steps of DDPM with guidance 1.5."""
    conditions = (call("models.label", num_classes=1000),)
    config = ConfigDict({"inputs": {"x0": (32, 32, 4), "cond": {"label": ("int",)}}})
    config.model = call("models.dit", preset="XL/2", conditions=conditions, learn_sigma=True)
    config.routed = call("adapters.routed", groups=16, tokens=True)
    config.budget = call("objectives.budgeted", target=0.5)
    return config
