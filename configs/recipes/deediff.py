"""DeeDiff: how deep the digits transformer goes at each step is decided by how wrong it thinks it is."""

from typing import Any

from diffusion_jax.baselines import NULL, digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call


def exits(
    steps: int, tails: str = "shared", layers: float = 1.0, rates: tuple = (2e-4, 3e-3), **fields: Any
) -> ConfigDict:
    """How exits are trained. rates: peak learning rates of the network and of what is beside it, or of this alone.
    layers: weight of the layer-wise loss. fields: of the transformer, where they differ."""
    config = digit_transformer(steps, **fields)
    config.train.batch_size = 32
    config.update({"heads": tails, "frozen": len(rates) == 1})
    config.objective = call(
        "objectives.layerwise", layers=layers, draw=call("timesteps.stratified"), cond_dropout=0.1, null=NULL
    )
    peaks = (
        call("training.optimizers.cosine", peak=r, total_steps=steps, warmup_steps=min(20, steps // 2)) for r in rates
    )
    parts = [call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.0) for rate in peaks]
    both = dict(zip(("params", "exits"), parts))
    config.optimizer = parts[0] if config.frozen else call("training.optimizers.alternating", parts=both)
    return config


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102)})
    config.base = digit_transformer()
    config.update({"tuned": exits(100), "frozen": exits(100, "own", rates=(3e-3,)), "without": exits(100, layers=0.0)})
    config.update({"solver": call("solvers.ddim"), "grid": call("timesteps.linspace", steps=20)})
    # Shares of blocks that are left out; examples on which exits are measured.
    config.update({"samples": 200, "reductions": (0.18, 0.35), "held_out": 128, "judged": True})
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """One network of four blocks that is not trained, without a judge."""
    config.base = tiny_digit_transformer(steps=0, depth=4)
    config.tuned = exits(2, width=24, depth=4, heads=2)
    config.tuned.update({"train": config.base.train, "ema": {}, "mesh": config.base.mesh})
    del config.frozen, config.without
    config.update({"seed_numbers": (0,), "samples": 10, "held_out": 0, "judged": False})
    config.grid.steps = 4
    return config


def paper() -> ConfigDict:
    """CIFAR-10: U-ViT-S/2, 13 blocks of 512 with 8 heads, here as a DiT; 200k updates of 512, AdamW 4e-4, 1000
    steps; certainty at least 0.92."""
    conditions = (call("models.label", num_classes=10),)
    config = ConfigDict({"inputs": {"x0": (32, 32, 3), "cond": {"label": ("int",)}}, "threshold": 0.08})
    size = {"width": 512, "depth": 13, "heads": 8, "patch": 2, "conditions": conditions}
    config.model = call("models.dit", preset="S/2", **size)
    return config
