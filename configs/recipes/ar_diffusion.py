"""AR-Diffusion on moving shapes: three ways to draw the times of frames, and staircases to sample along."""

from typing import Any

from diffusion_jax.baselines import clip_transformer
from diffusion_jax.config import ConfigDict, call

UNIFORM = call("timesteps.uniform")
DRAWS = {
    "anchored": call("timesteps.anchored", num_steps=1000),
    "independent": call("timesteps.independent", draw=UNIFORM),
    "synchronous": call("timesteps.shared", draw=UNIFORM),
}
"""The paper's draw, which never falls (FoPP), a time for each frame (diffusion forcing), and one a clip."""


def arm(name: str, steps: int, **sizes: Any) -> ConfigDict:
    """Causal, but for the synchronous one, which sees all frames."""
    block = 0 if name == "synchronous" else 1
    config = clip_transformer(steps, DRAWS[name], **{"components": 64, "clips": 8000, "block": block, **sizes})
    config.process = call("processes.vp_linear", prediction="x0")
    config.optimizer.learning_rate.peak = 3e-3
    return config


def get_config(variant: str = "") -> ConfigDict:
    """clips, frames: how many are sampled, and the length of long ones. steps: S. width, widths: s of the claims, and
    of the sweep. overlap: frames that a chunk shares with the one before. oracle: widths of the exact causal denoiser,
    and the errors that were computed for the card."""
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101, 102)})
    config.arms = {name: arm(name, 800) for name in DRAWS}
    config.update({"clips": 192, "frames": 24, "steps": 16, "width": 4, "widths": (0, 2, 4, 8, 16), "overlap": 4})
    config.oracle = {"steps": 400, "widths": (40, 200), "errors": (0.32, 0.07)}
    if variant == "smoke":
        size = {"width": 16, "depth": 1, "heads": 2, "scan": False, "clips": 16, "components": 8, "batch_size": 4}
        # One network, trained once, stands for all.
        config.arms = dict.fromkeys(DRAWS, arm("anchored", 2, **size))
        config.update({"seed_numbers": (0,), "clips": 2, "frames": 16, "steps": 2, "width": 2, "widths": (2,)})
        config.oracle = {"steps": 4, "widths": (4,), "errors": (0.0,)}
    return config


def paper() -> ConfigDict:
    """Latents [16, 4, 8, 4]: 32 tokens of 4 channels a frame, all in one causal attention; batches of 96 in 6 parts,
    1e-4, 100,000 updates, x0 of the linear VP process; 50 steps of DDIM at guidance 2, s = 5."""
    model = call("models.video_dit", preset="XL/1", attention="joint", block=1)
    config = ConfigDict({"model": model, "inputs": {"x0": (16, 4, 8, 4), "t": (16,)}, "steps": 50, "width": 5})
    config.process = call("processes.vp_linear", prediction="x0")
    config.objective = call("objectives.denoising", draw=DRAWS["anchored"], t_shape=2)
    return config
