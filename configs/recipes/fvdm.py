"""FVDM: one video model whose frames have times of their own, for every share p of such examples in training.

    python -m diffusion_jax.recipes fvdm

Variants: `smoke`, a few steps; `paper`, the published settings as entries, which no run here uses.
"""

from typing import Any

from diffusion_jax import baselines
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.recipes import fvdm

SHARES = {"synchronous": 0.0, "mixed": 0.2, "independent": 1.0}
"""p of each arm: the share of examples whose frames have times of their own."""


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3})
    # chunks: of long clips, 0 for none; scalar: whether equal times are compared with one time for all.
    config.update({"count": 2 if smoke else 128, "chunks": 0 if smoke else 7, "shown": 2, "scalar": not smoke})
    if not smoke:
        config.arms = {name: fvdm.arm(share, steps=2400) for name, share in SHARES.items()}
        return config
    # One network, trained once, stands for all.
    size: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "scan": False, "clips": 4, "components": 8}
    arm = fvdm.arm(SHARES["mixed"], steps=2, batch_size=4, **size)
    arm.sampling.grid = baselines.clip_grid(2)
    config.arms = dict.fromkeys(SHARES, arm)
    return config


def paper() -> ConfigDict:
    """LatteVIDEO-XL/2 on latents of 16 frames of 256 x 256, 250,000 updates, p = 0.2; DDIM with 50 steps.

    The autoencoder of Stable Diffusion (`models.kl_vae`, "kl_f8") makes the latents; the released code learns a
    variance as well.
    """
    config = fvdm.arm(0.2, 250_000, batch_size=32)
    for half in (config.objective.draw.first, config.objective.draw.second):
        half.draw = call("timesteps.uniform")
    config.data = config.held_out = call("data.moving_shapes", size=32, frames=16, classes=())
    config.model = call("models.video_dit", preset="XL/2")
    config.process = call("processes.vp_linear", prediction="epsilon")
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4)
    config.ema = {"average": call("training.ema.fixed", decay=0.9999)}
    config.sampling.grid = call("timesteps.leading", steps=50)
    return config
