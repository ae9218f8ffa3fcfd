"""T-Stitch: a small transformer runs the first, noisiest steps on digits, the large one the rest.

    python -m diffusion_jax.recipes t_stitch

Variants: `smoke`, a few steps; `paper`, the published settings, DiT-S, DiT-B and DiT-XL on latents of ImageNet.

Tolerances are the standard deviation over seeds of what the large model alone scores: for the ring it was found on
seeds 100 to 102 and is `noise`; for the digits each run finds it anew on `noise_seeds`.
"""

from diffusion_jax.baselines import digit_transformer
from diffusion_jax.config import ConfigDict, call


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed": 0, "seeds": 3, "steps": 50, "few_steps": 10, "size": 256})
    config.timing = {"steps": 20, "size": 64, "repeats": 5}
    config.shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    # At the cost of these shares the large model makes fewer steps alone.
    config.fewer = [0.4, 0.8, 1.0]
    config.noise_seeds = [100, 101, 102, 103]
    # The shares of the small and of the middle model.
    config.three = [0.4, 0.3]
    config.models = {
        "small": digit_transformer(1800, width=60, depth=2),
        "middle": digit_transformer(1200, width=60, depth=4),
        "large": digit_transformer(),
    }
    config.ring = {"steps": 100, "size": 1500, "noise": 1e-3, "costs": [0.1, 0.3, 1.0], "choice_seed": 100}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Two models on digits, as they begin."""
    config.update({"seeds": 1, "steps": 10, "few_steps": 5, "size": 16, "noise_seeds": [100, 101], "three": []})
    config.timing = {"steps": 10, "size": 16, "repeats": 1}
    config.models = {
        name: digit_transformer(4, width=width, depth=1, heads=2) for name, width in (("small", 12), ("large", 24))
    }
    for model in config.models.values():
        model.train.steps = 0
    config.ring = None
    return config


def paper() -> ConfigDict:
    """DiT-S / B / XL with patches of 2 on latents of 256 x 256 images, DDIM with 100 steps, guidance 1.5 for each."""
    config = ConfigDict({"steps": 100, "guidance": 1.5, "null": {"label": 1000}})
    config.models = {
        name: call("models.dit", preset=preset, conditions=(call("models.label", num_classes=1000),), learn_sigma=True)
        for name, preset in (("small", "S/2"), ("middle", "B/2"), ("large", "XL/2"))
    }
    config.process = call("processes.vp_linear")
    config.grid = call("timesteps.leading", steps=config.steps)
    return config
