"""FastFit: garments from several pictures are put on a person, and the pictures are encoded once.

There is no guidance, which doubles the cost of all arms alike.
"""

from diffusion_jax.baselines import try_on_transformer
from diffusion_jax.config import ConfigDict, call


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102)})
    config.fastfit, config.coupled = try_on_transformer(), try_on_transformer(form="coupled")
    config.solver = call("solvers.ddim")
    # The twin takes as long for the fewer steps as FastFit for all.
    config.grids = {"full": call("timesteps.linspace", steps=50), "fewer": call("timesteps.linspace", steps=15)}
    config.people, config.shown = 32, 9
    config.timed = {"people": 4, "references": (1, 3, 5)}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """FastFit without its twin."""
    config.seed_numbers, config.people, config.shown = (0,), 4, 2
    config.fastfit = try_on_transformer(2, width=32, depth=1, remat="none", qk_norm=False)
    config.fastfit.ema, config.fastfit.mesh = {}, call("distributed.make_mesh", devices=1)
    del config.coupled
    config.grids.full.steps = 3
    config.timed.references = (3, 3, 3)
    return config


def paper() -> ConfigDict:
    """The inpainting U-Net of Stable Diffusion 1.5 without cross-attention on latents of 768 x 1024 pixels, three
    references; DDPM or DDIM at 50 steps and guidance 2.5."""
    config = ConfigDict({"guidance": 2.5})
    network = call("models.unet", preset="sd15", conditions=(call("models.concat", channels=5),))
    config.model = call("models.with_references", network=network, items=5)
    size = (128, 96)
    references = {"references": (3, *size, 4), "items": ("int", 3), "present": ("bool", 3)}
    config.inputs = {"x0": (*size, 4), "cond": {"concat": (*size, 5), **references}}
    config.process = call("processes.vp_scaled_linear")
    config.grid = call("timesteps.leading", steps=50, steps_offset=1)
    return config
