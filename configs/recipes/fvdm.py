"""FVDM: one video model whose frames have times of their own, for every share p of such examples in training.

    python -m diffusion_jax.recipes fvdm

Variants: `smoke`, a few steps; `paper`, the published settings as entries, which no run here uses.
"""

from typing import Any

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.recipes import fvdm
from diffusion_jax.recipes.parts import moving_clips

SHARES = {"synchronous": 0.0, "mixed": 0.2, "independent": 1.0}
"""p of each arm: the share of examples whose frames have times of their own."""


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3})
    config.update({"count": 8 if smoke else 128, "chunks": 7, "shown": 1 if smoke else 2})
    size: dict[str, Any] = (
        {"steps": 2, "batch_size": 8, "width": 16, "depth": 2, "heads": 2, "clips": 64, "components": 16}
        if smoke
        else {"steps": 2400}
    )
    config.arms = {name: fvdm.arm(share, **size) for name, share in SHARES.items()}
    if smoke:
        for arm in config.arms.values():
            arm.sampling.grid = moving_clips.grid(2)
    return config


def paper() -> ConfigDict:
    """LatteVIDEO-XL/2 on latents of 16 frames of 256 x 256, 250,000 updates, p = 0.2; DDIM with 50 steps.

    The autoencoder of Stable Diffusion (`models.kl_vae`, "kl_f8") makes the latents; the released code learns a
    variance as well.
    """
    config = fvdm.arm(0.2, 250_000, batch_size=32)
    del config.latents
    for half in (config.objective.draw.first, config.objective.draw.second):
        half.draw = call("timesteps.uniform")
    config.data = config.held_out = call("data.moving_shapes", size=32, frames=16, classes=())
    config.model = call("models.video_dit", preset="XL/2")
    config.process = call("processes.vp_linear", prediction="epsilon")
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4)
    config.ema = {"average": call("training.ema.fixed", decay=0.9999)}
    config.sampling.grid = call("timesteps.leading", steps=50)
    return config
