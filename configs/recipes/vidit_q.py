"""ViDiT-Q: the digits transformer at 4 to 8 bits, with ranges by token and channels balanced by timestep."""

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call

SELECT = ("q", "k", "v", "out", "feed_forward/up", "feed_forward/down")
WIDTHS = {
    "W8A8": {"weights": 8, "activations": 8, "alpha": 0.3},
    "W6A6": {"weights": 6, "activations": 6, "alpha": 0.625},
    "W4A8": {"weights": 4, "activations": 8, "alpha": 0.11},
}
"""Bits, and alpha as the authors' configs have it (W8A8 is not balanced there; 0.3 is that of PixArt)."""


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (100, 101, 102), "count": 64})
    if variant == "paper":
        return paper()
    config.base = digit_transformer()
    config.grid = call("timesteps.linspace", steps=20, num_train_steps=1000)
    config.update({"select": SELECT, "edges": (500.5,), "widths": WIDTHS, "sampled": "W4A8"})
    config.arms = ("nearest", "static", "dynamic", "balanced", "by time", "static-dynamic")
    config.drawn = ("nearest", "by time")
    if variant == "smoke":
        config.update({"seed_numbers": (0,), "count": 4, "arms": ("nearest", "by time")})
        config.base = tiny_digit_transformer(0, depth=1)
        config.grid.steps = 4
        config.widths = {"W4A8": WIDTHS["W4A8"]}
    return config


def paper() -> ConfigDict:
    """PixArt-alpha, 20 steps of DPM-Solver: alpha 0.3, calibrated with 32 samples; ranges of t as in OpenSora."""
    config = ConfigDict({"inputs": {"x0": (64, 64, 4)}, "alpha": 0.3, "edges": (500.5,), "count": 32})
    config.model = call("models.pixart")
    config.grid = call("timesteps.linspace", steps=20, num_train_steps=1000)
    return config
