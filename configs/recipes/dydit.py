"""DyDiT: heads, hidden groups and tokens of the digits transformer by the timestep, at half of the compute.

    python -m diffusion_jax.recipes dydit

Variants: `smoke`, a few steps; `paper`, the published settings for DiT-XL/2, which no run here uses.
Tuned on seed 100: learning rates, biases of routers, weight and length of the warm-up of the budget.
"""

from diffusion_jax.baselines import digit_transformer
from diffusion_jax.config import ConfigDict, call


def tuning(
    steps: int, parts: dict[str, float] | float, batch_size: int = 16, norm: float = 15.0, **fields
) -> ConfigDict:
    """Fine-tuning of the digits transformer; parts: the peak learning rate of each entry that learns, or of all."""
    config = digit_transformer(steps, **{"remat": "none", **fields})
    config.train.batch_size = batch_size
    config.train.clip_norm = None
    config.train.checkpoint_every = steps

    def adamw(peak):
        rate = call("training.optimizers.cosine", peak=peak, total_steps=steps, warmup_steps=steps // 25)
        return call("training.optimizers.adamw", learning_rate=rate)

    if isinstance(parts, float):
        optimizer = adamw(parts)
    else:
        entries = {name: adamw(peak) for name, peak in parts.items()}
        optimizer = call("training.optimizers.alternating", parts=entries)
    config.optimizer = call("training.optimizers.below_norm", optimizer=optimizer, norm=norm)
    return config


def budget(steps: int, target: float) -> ConfigDict:
    """The complete model for the first 15 % of the steps, the limit from 1 to the target in the first 35 %."""
    lengths = {"complete_steps": 3 * steps // 20, "full_steps": steps // 20, "warmup_steps": 3 * steps // 10}
    return call("objectives.budgeted", target=target, **lengths)


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    size = {"width": 24, "depth": 1, "heads": 2, "remat": "none"} if smoke else {}
    steps, lora_steps = (4, 4) if smoke else (500, 150)
    heads = size.get("heads", 6)
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3, "target": 0.5})
    config.base = digit_transformer(steps=4, **size) if smoke else digit_transformer()
    config.routed = call("adapters.routed", groups=heads, bias=5.0)
    config.published = call("adapters.routed", groups=heads, tokens=True)
    config.budget = budget(steps, config.target)
    config.arms = {
        "dynamic": tuning(steps, {"params": 1e-3, "routers": 1e-2}, **size),
        "uniform": tuning(steps, 1e-3, **size),
    }
    # Numbers in each block, routers of the mixture included: 19608 for rank 4 with four experts, 19008 for rank 11.
    config.lora = {"seeds": 0 if smoke else 1, "experts": 4, "rank": 4, "equal_rank": 11}
    config.lora.select = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")
    config.lora.budget = budget(lora_steps, config.target)
    config.lora.tuning = tuning(lora_steps, 1e-2, **size)
    config.sampling = {"steps": 4 if smoke else 20, "samples": 16 if smoke else 256, "buckets": 1 if smoke else 4}
    config.timing = {"repeats": 1 if smoke else 3, "batch": 16 if smoke else 128}
    # reversed: whether the table of widths is also tried reversed in t.
    config.losses = {"times": 16 if smoke else 200, "repeats": 1 if smoke else 4, "reversed": True}
    # Thresholds of the routers moved after training: loss against compute.
    config.shifts = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
    if smoke:
        # One fine-tuning of a base as it begins; without samples, and without times of steps.
        config.arms.dynamic.ema = {}
        config.base.train.steps, config.published, config.shifts = 0, None, (0.0,)
        config.arms = {"dynamic": config.arms.dynamic}
        config.sampling.samples, config.timing.repeats, config.losses.reversed = 0, 0, False
    return config


def paper() -> ConfigDict:
    """DiT-XL/2 at 256 pixels, lambda 0.5: 150 000 steps of batch 256, of which 30 000 with the complete model, at rate
    1e-4; biases 15 and 35, gradients above norm 200 skipped, 250 steps of DDPM with guidance 1.5."""
    config = tuning(150_000, {"params": 1e-4, "routers": 1e-4, "token_router": 1e-4}, batch_size=256, norm=200.0)
    config.model = call(
        "models.dit",
        preset="XL/2",
        conditions=(call("models.label", num_classes=1000),),
        learn_sigma=True,
        remat="dots_no_batch",
    )
    config.routed = call("adapters.routed", groups=16, tokens=True)
    config.budget = call("objectives.budgeted", target=0.5)
    rate = call("training.optimizers.constant", value=1e-4)
    for part in config.optimizer.optimizer.parts.values():
        part.learning_rate = rate
    config.ema = {"average": call("training.ema.fixed", decay=0.9999)}
    return config
