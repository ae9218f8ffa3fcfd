"""AR-Diffusion on moving shapes: three ways to draw the times of frames, one causal network, staircases to sample."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

DRAWS = {
    "synchronous": call("timesteps.shared", draw=call("timesteps.uniform")),
    "independent": call("timesteps.independent", draw=call("timesteps.uniform")),
    "anchored": call("timesteps.anchored", num_steps=1000),
}
"""The arms: one time a clip, one for each frame (diffusion forcing), and the paper's, which never falls (FoPP)."""


def get_config(variant: str = "small") -> ConfigDict:
    """coded, components: clips from which the autoencoder is made, and latent numbers a frame.

    clips, frames: how many are sampled, and the length of long ones; steps: S; widths: s of the sweep, without 0 no
    claim compares with it; width: the one of the claims; overlap: frames that a chunk shares with the one before;
    compared: whether clips are made in chunks and from kept keys too; oracle: of the exact denoiser.
    """
    smoke = variant == "smoke"
    config = ConfigDict({"seed": 0, "seeds": 1 if smoke else 3})
    # In a smoke run one network, trained once, stands for all, and one program samples all staircases.
    draws = dict.fromkeys(DRAWS, DRAWS["anchored"]) if smoke else DRAWS
    config.arms = {name: _paper(draw) if variant == "paper" else _small(draw, smoke) for name, draw in draws.items()}
    config.coded, config.components = (4, 8) if smoke else (500, 64)
    config.clips, config.frames = (2, 8) if smoke else (256, 24)
    config.steps, config.width, config.widths = (2, 2, (2,)) if smoke else (16, 4, (0, 2, 4, 8, 16))
    config.overlap, config.compared = 4, not smoke
    config.oracle = {"steps": 4 if smoke else 400, "widths": (0, 1, 2, 4) if smoke else (0, 40, 200, 400)}
    return config


def _small(draw, smoke):
    """Latents [8, 1, 1, 64]: a token a frame."""
    config = defaults(steps=2 if smoke else 800, batch_size=4 if smoke else 32)
    config.data = call("data.moving_shapes", length=16 if smoke else 8000, classes=())
    config.held_out = call("data.moving_shapes", split="test", classes=())
    size = {"width": 64, "depth": 4, "heads": 4}
    if smoke:
        size = {"width": 16, "depth": 1, "heads": 2, "scan": False, "qk_norm": False}
    kind = {"patch": 1, "attention": "joint", "block": 1, "temporal_positions": "rotary", "qk_norm": True}
    config.model = call("models.video_dit", **{**kind, **size})
    config.process = call("processes.vp_linear", prediction="x0")
    config.objective = call("objectives.denoising", draw=draw, t_shape=2)
    rate = call(
        "training.optimizers.cosine", peak=3e-3, total_steps=config.train.steps, warmup_steps=1 if smoke else 50
    )
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def _paper(draw):
    """Latents [16, 4, 8, 4]: 32 tokens of 4 channels a frame, all in one causal attention; 6 x 16 clips an update."""
    config = defaults(steps=100_000, batch_size=96)
    config.train.accumulate = 6
    config.data = config.held_out = call("data.moving_shapes", frames=16, classes=())
    config.model = call("models.video_dit", preset="XL/1", attention="joint", block=1, remat="full")
    config.process = call("processes.vp_linear", prediction="x0")
    config.objective = call("objectives.denoising", draw=draw, t_shape=2)
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4)
    return config
