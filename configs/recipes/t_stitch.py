"""T-Stitch: a small transformer runs the first steps on digits, the large one the rest; guidance 1.5, as published."""

from diffusion_jax.baselines import digit_transformer
from diffusion_jax.config import ConfigDict, call


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, *range(100, 105))})
    config.digits = {"steps": 50, "count": 200, "guidance": 1.5, "three": (0.4, 0.3)}
    config.digits.update(
        {"first": (0.0, 0.4, 0.6, 0.8, 1.0), "last": (0.4,), "fewer": (0.4, 0.8), "traced": 50, "reversed": 1.0}
    )
    config.digits.small = digit_transformer(1500, width=40, depth=2)
    config.digits.middle = digit_transformer(2000, width=48, depth=4)
    config.digits.large = digit_transformer()
    # The spread of the large model alone over the seeds of choices.
    config.digits.tolerance = 0.2
    config.ring = {"steps": 100, "count": 1500, "tolerance": 1e-3, "costs": (0.1, 0.3, 1.0)}
    config.ring.update({"first": (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0), "last": (0.1, 0.4)})
    # The cheapest shares of the small and the middle model within the tolerance, of all tenths on seed 100.
    config.ring.update({"fewer": (0.4, 0.8), "three": (0.7, 0.2), "reversed": 10.0})
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The digits alone, models as they begin."""
    config.seed_numbers = (0,)
    del config.ring
    config.digits.update({"steps": 10, "count": 16, "traced": 4})
    for name, width in (("small", 12), ("middle", 16), ("large", 24)):
        config.digits[name] = digit_transformer(4, width=width, depth=1, heads=2)
        config.digits[name].train.steps = 0
    return config


def paper() -> ConfigDict:
    """DiT-S, B and XL on latents of 256 x 256 pixels, 100 steps of DDIM, guidance 1.5 for each."""
    config = ConfigDict({"guidance": 1.5, "null": {"label": 1000}})
    config.models = {
        name: call("models.dit", preset=preset, conditions=(call("models.label", num_classes=1000),), learn_sigma=True)
        for name, preset in (("small", "S/2"), ("middle", "B/2"), ("large", "XL/2"))
    }
    config.inputs = {"x0": (32, 32, 4), "cond": {"label": ("int",)}}
    config.process, config.grid = call("processes.vp_linear"), call("timesteps.leading", steps=100)
    return config
