"""TaylorSeer: digits from a transformer whose features are forecast between refreshes.

    python -m diffusion_jax.recipes taylorseer

Variants: `smoke`, a few steps; `paper`, DiT-XL/2 on ImageNet as published, which no run here uses.
"""

from typing import Any

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed": 0, "seeds": 3, "base": digit_transformer()})
    # As published for DiT: 50 steps of DDIM, guided by 1.5, two full steps at the beginning.
    config.update({"steps": 50, "warmup": 2, "interval": 4, "order": 2, "scales": (1.0, 1.5)})
    config.update({"samples": 200, "curve_samples": 50, "repeats": 3, "intervals": (2, 3, 4, 6)})
    # What is drawn, and whether DDIM on fewer steps is compared with.
    rules = ("reuse", "Taylor 1", "Taylor 2", "Taylor 3", "Taylor 4", "Newton 2", "Hermite 2")
    config.update({"rules": rules, "fewer": True})
    config.margins = {"accuracy": 0.02, "distance": 1.1}
    config.mixture = mixture(samples=2048)
    return smoke(config) if variant == "smoke" else config


def mixture(samples: int) -> ConfigDict:
    """The exact model: ten narrow components in 64 dimensions, three full steps at the beginning."""
    shape = {"components": 10, "size": 64, "std": 0.15}
    return ConfigDict({**shape, "samples": samples, "steps": 50, "warmup": 3, "intervals": (3, 5)})


def smoke(config: ConfigDict) -> ConfigDict:
    config.base = tiny_digit_transformer(steps=0)
    config.update({"seeds": 1, "steps": 6, "samples": 10, "curve_samples": 10, "repeats": 1, "intervals": (3,)})
    config.update({"interval": 3, "order": 1, "scales": (1.0,), "rules": ("reuse", "Taylor 1"), "fewer": False})
    config.mixture = {**mixture(samples=8).to_dict(), "steps": 7, "intervals": (3,)}
    return config


def paper() -> ConfigDict:
    """DiT-XL/2 on 256 x 256 latents of ImageNet, 50 steps of DDIM, cfg 1.5, 50,000 samples; N and m of the table.

    FID 2.32 in full; 2.34 with N = 3, m = 3 at 2.77 times fewer operations, 2.65 with N = 5, m = 3 at 4.53 times.
    """
    config = ConfigDict(
        {
            "model": call(
                "models.dit", preset="XL/2", conditions=(call("models.label", num_classes=1000),), learn_sigma=True
            )
        }
    )
    config.process = call("processes.vp_linear")
    config.grid = call("timesteps.linspace", steps=50, num_train_steps=1000)
    config.update({"shape": (32, 32, 4), "guidance": 1.5, "null": {"label": 1000}, "samples": 50_000})
    config.settings = {name: setting(*values) for name, values in PUBLISHED.items()}
    return config


PUBLISHED = {"N3_m3": (3, 3), "N5_m3": (5, 3), "N3_m4": (3, 4)}


def setting(interval: int, order: int, warmup: int = 2) -> dict[str, Any]:
    return {
        "forecaster": call("acceleration.taylor", order=order),
        "refresh": call("acceleration.every", interval=interval, warmup=warmup),
    }
