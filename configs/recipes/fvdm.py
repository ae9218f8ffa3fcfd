"""FVDM: one video model whose frames have times of their own, for every share p of such examples in training."""

from typing import Any

from diffusion_jax.baselines import clip_grid, clip_transformer
from diffusion_jax.config import ConfigDict, call

SHARES = {"mixed": 0.2, "synchronous": 0.0, "independent": 1.0}
"""p of each arm: the share of examples whose frames have times of their own."""


def arm(share: float, steps: int, **sizes: Any) -> ConfigDict:
    """The experiment of p = `share`: in so many examples every frame has its own time, in the others all have one."""
    one = call("timesteps.logit_normal", mean=1.2, std=1.2)
    first, second = call("timesteps.independent", draw=one), call("timesteps.shared", draw=one)
    return clip_transformer(steps, call("timesteps.mixture", first=first, second=second, probability=share), **sizes)


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (0, 1, 2, 100, 101, 102)})
    # count: of clips. chunks: of long ones, half a clip each; 0 for none. tasks: of which every arm is asked.
    config.update({"count": 128, "chunks": 7, "shown": 2, "tasks": ("generation", "image to video")})
    config.grid = clip_grid()
    if not smoke:
        size = {"width": 128, "depth": 2, "components": 128}
        config.arms = {name: arm(share, 1800, **size) for name, share in SHARES.items()}
        return config
    config.update({"seed_numbers": (0,), "count": 2, "chunks": 0, "grid": clip_grid(2)})
    # One network, trained once, stands for all.
    size = {"width": 16, "depth": 1, "heads": 2, "scan": False, "clips": 4, "components": 8, "batch_size": 4}
    config.arms = dict.fromkeys(SHARES, arm(SHARES["mixed"], steps=2, **size))
    return config


def paper() -> ConfigDict:
    """LatteVIDEO-XL/2 on latents of 16 frames of 256 x 256, batches of 32, 250,000 updates at 1e-4, p = 0.2; DDIM with
    50 steps. The released code learns a variance as well."""
    model = call("models.video_dit", preset="XL/2")
    config = ConfigDict({"model": model, "inputs": {"x0": (16, 32, 32, 4), "t": (16,)}})
    config.process = call("processes.vp_linear", prediction="epsilon")
    config.objective = arm(SHARES["mixed"], 250_000).objective
    for half in (config.objective.draw.first, config.objective.draw.second):
        half.draw = call("timesteps.uniform")
    config.grid = call("timesteps.leading", steps=50)
    return config
