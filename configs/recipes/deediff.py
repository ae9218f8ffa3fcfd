"""DeeDiff: how deep the digits transformer goes at each step is decided by how wrong it thinks it is.

    python -m diffusion_jax.recipes deediff

Variants: `smoke`, a few steps; `paper`, the sizes of the published CIFAR-10 run as entries, which no run here uses.
On training seed 100, a rate of 5e-4 for everything cost the whole network quality (Fréchet distance 7.1 against 1.2),
so it has less and its exits have more; these rates were not tried before they were reported.
"""

from typing import Any

from diffusion_jax.baselines import NULL, digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call

RATES = {"params": 2e-4, "exits": 3e-3}
"""Peak learning rates where all is trained."""


def exits(steps: int, rates: dict[str, float], batch_size: int, layers: float = 1.0, **fields: Any) -> ConfigDict:
    """How exits are trained.

    rates: peak learning rates of the network ("params") and of the "exits", or of these alone. layers: weight of the
    layer-wise loss. fields: of the transformer, where they differ.
    """
    # Without rematerialisation, which so small a network only slows down.
    config = digit_transformer(steps, **{"remat": "none", **fields})
    config.train.batch_size = batch_size
    draw = call("timesteps.stratified")
    config.objective = call("objectives.layerwise", layers=layers, draw=draw, cond_dropout=0.1, null=NULL)
    parts = {
        name: call(
            "training.optimizers.adamw",
            learning_rate=call(
                "training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(20, steps // 2)
            ),
            weight_decay=0.0,
        )
        for name, rate in rates.items()
    }
    config.optimizer = call("training.optimizers.alternating", parts=parts) if len(parts) > 1 else parts["exits"]
    return config


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed": 0, "seeds": 3})
    config.base = digit_transformer()
    # tuned: everything is trained, one tail for all exits. frozen: estimators and a tail for each exit alone.
    config.tuned = exits(200, RATES, 64)
    config.frozen = exits(500, {"exits": 3e-3}, 64)
    config.without = exits(200, RATES, 64, layers=0.0)
    # Which of them there are, and whether it is measured how good estimates are, that leaving is exact, and the time.
    config.update({"kinds": ("tuned", "frozen", "without"), "estimates": True, "exact": True, "clock": True})
    config.solver = call("solvers.ddim")
    config.grid = call("timesteps.linspace", steps=25)
    # Shares of blocks that are left out, for which thresholds are chosen on runs of their own from `calibration` noise.
    config.update({"samples": 256, "reductions": (0.18, 0.35), "calibration": 64, "repeats": 5})
    config.update({"held_out": 128, "calibration_seed": 1000})
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """A few steps of runs that leave a network that was trained with its exits alone."""
    config.base = tiny_digit_transformer(steps=0, depth=4)
    config.tuned = exits(3, RATES, 64)
    config.tuned.update({name: config.base[name] for name in ("model", "mesh", "ema")})
    config.tuned.optimizer.parts = dict.fromkeys(RATES, config.base.optimizer)
    config.update({"kinds": ("tuned",), "estimates": False, "exact": False, "clock": False})
    config.grid = call("timesteps.linspace", steps=3)
    config.update({"seeds": 1, "samples": 16, "calibration": 16, "repeats": 1, "held_out": 16})
    return config


def paper() -> ConfigDict:
    """CIFAR-10: 13 blocks of 512 with 8 heads, patches of 2; 200k updates of 512, AdamW 4e-4, decay 0.03, 1000 steps.

    A DiT in place of their U-ViT, and digits in place of CIFAR-10.
    """
    config = get_config()
    size = {"width": 512, "depth": 13, "heads": 8, "patch": 2}
    config.base = digit_transformer(**size)
    rates = {"params": 4e-4, "exits": 4e-4}
    config.tuned, config.without = (exits(200_000, rates, 512, layers, **size) for layers in (1.0, 0.0))
    config.frozen = exits(200_000, {"exits": 4e-4}, 512, **size)
    for part in (
        *config.tuned.optimizer.parts.values(),
        *config.without.optimizer.parts.values(),
        config.frozen.optimizer,
    ):
        part.update(weight_decay=0.03, b1=0.99, b2=0.999)
        part.learning_rate.warmup_steps = 2500
    config.update({"solver": call("solvers.ddpm"), "samples": 50_000})
    config.grid = call("timesteps.linspace", steps=1000)
    return config
