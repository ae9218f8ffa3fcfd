"""FastFit: garments from several pictures are put on a person, and the pictures are encoded once.

    python -m diffusion_jax.recipes fastfit

Variants: `smoke`, a few steps; `paper`, the published network and sampler, which no run here uses. The number of
training steps was chosen with a training of seed 100, judged on other held-out persons; there is no guidance (1.0),
which doubles the cost of all arms alike, and no other value was tried.
"""

from diffusion_jax.baselines import try_on_transformer
from diffusion_jax.config import ConfigDict, call


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed": 0, "seeds": 3})
    config.fastfit = try_on_transformer(550)
    config.coupled = try_on_transformer(550, "coupled")
    config.people = 32
    config.solver = call("solvers.ddim")
    config.grid = call("timesteps.linspace", steps=50)
    config.guidance = 1.0
    config.timing = {"people": 4, "references": (1, 3, 5), "repeats": 7}
    config.columns = 9
    # Of the pictures whose principal components are compared, every so many-th pixel.
    config.stride = 1
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """FastFit without its twin."""
    config.seeds, config.people, config.columns, config.stride = 1, 4, 2, 4
    config.fastfit = try_on_transformer(2, width=32, depth=1, heads=2, remat="none", qk_norm=False)
    config.fastfit.ema = {}
    del config.coupled
    config.grid.steps = 3
    config.timing = {"people": 4, "references": (3, 3, 3), "repeats": 1}
    return config


def paper() -> ConfigDict:
    """The inpainting U-Net of Stable Diffusion 1.5 without cross-attention, on latents; 50 steps at guidance 2.5."""
    config = ConfigDict({"kinds": 5, "guidance": 2.5, "latents": (128, 96, 4)})
    config.model = call("models.unet", preset="sd15", conditions=(call("models.concat", channels=5),))
    config.process = call("processes.vp_scaled_linear")
    config.solver = call("solvers.ddpm")
    config.grid = call("timesteps.leading", steps=50, steps_offset=1)
    config.objective = call("objectives.denoising", cond_dropout=0.1, null={"references": 0.0})
    return config
