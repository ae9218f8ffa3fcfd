"""CG-Taylor: the last block forecast where the first one's forecast was right; 50 steps of DDIM, guidance 1.5."""

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, *range(100, 105))})
    grid = call("timesteps.linspace", steps=50, num_train_steps=1000)
    # The exact model of the card; with three full steps and the last, 19 and 15 evaluations.
    config.mixture = {"components": 10, "dims": 64, "std": 0.15, "samples": 1024, "grid": grid, "warmup": 3}
    config.mixture.update({"probe_order": 1, "order": 1, "shown": 3})
    config.mixture.intervals = {3: "0.0048, clock 0.0146", 4: "0.0273 by the clock"}
    config.digits = {"base": digit_transformer(), "grid": grid, "guidance": 1.5, "samples": 100, "warmup": 3}
    config.digits.update({"probe_order": 3, "order": 1, "intervals": (2, 3, 4, 6), "measures": ("error", "accuracy")})
    config.digits.update({"thresholds": (0.01, 0.02, 0.04, 0.08, 0.16), "chosen": 0.04})
    # At equal evaluations, or equal work with what skipped steps still run: between settings, on the curves.
    config.digits.compared = (
        ("evaluations", 14.0, "clock", "at least as good"),
        ("compute", 19.0, "clock", "at least as good"),
        ("compute", 19.0, "TaylorSeer", "2.36x, TaylorSeer 2.77x (DiT-XL/2)"),
    )
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The digits alone."""
    config.seed_numbers, config.digits.base, config.digits.grid.steps = (0,), tiny_digit_transformer(steps=0), 8
    del config.mixture
    config.digits.update({"samples": 10, "thresholds": (0.05, 5.0), "chosen": 5.0, "intervals": (2, 3)})
    config.digits.update({"compared": (), "measures": ("error",)})
    return config


def paper() -> ConfigDict:
    """DiT-XL/2 on latents of 256 x 256 pixels: threshold 0.008, orders 3 and 1, the first three steps full."""
    label = call("models.label", num_classes=1000)
    config = ConfigDict({"guidance": 1.5, "null": {"label": 1000}, "threshold": 0.008, "warmup": 3})
    config.update({"probe_order": 3, "order": 1})
    config.model = call("models.dit", preset="XL/2", conditions=(label,), learn_sigma=True)
    config.inputs = {"x0": (32, 32, 4), "cond": {"label": ("int",)}}
    config.process, config.grid = call("processes.vp_linear"), call("timesteps.leading", steps=50)
    return config
