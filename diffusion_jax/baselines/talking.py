"""A transformer on clips of talking faces in principal components: the base model of streams that are driven by sound.

A frame is one token; it hears its own features of the voice, and sees a picture of who speaks, which stands behind the
clip in time so that it is ahead of every block.
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.experiment import defaults

TALKING_FRAMES = 8
"""Of a training clip."""


def talking_transformer(
    steps: int, block: int = 0, *, rate: float = 3e-3, draw: Any = None, data: Any = None, **fields: Any
) -> ConfigDict:
    """The config of the network, trained in about a minute of one core.

    block: frames of a block, each of which has a time of its own and sees the blocks of a clip before it; 0 is
        bidirectional. draw: of times. fields: of `video_dit` that differ.
    data: fields of `data.principal_latents` that differ; its clips are three times as long as those of training, which
        can so begin with a picture or with a frame of long before.
    """
    config = defaults(steps=steps, batch_size=64)
    source = call("data.talking_faces", frames=3 * TALKING_FRAMES, length=3000)
    config.data = call("data.principal_latents", **{"source": source, "components": 48, "first": 200, **(data or {})})
    config.held_out, config.frames = None, TALKING_FRAMES
    size = {"preset": "S/1", "width": 64, "depth": 4, "heads": 4, "qk_norm": True, **fields}
    told = (call("models.reference", at=float(TALKING_FRAMES)), call("models.audio"))
    seen = {"block": block, "window": TALKING_FRAMES // block - 1 if block else 0}
    time = {"attention": "joint", "temporal_positions": "rotary"}
    config.model = call("models.video_dit", **{**size, **time, **seen, "conditions": told})
    config.process = call("processes.rectified_flow")
    draw = call("timesteps.logit_normal") if draw is None else draw
    config.objective = call("objectives.denoising", draw=draw, t_shape=2 if block else 1)
    schedule = {"peak": rate, "total_steps": max(steps, 1), "warmup_steps": min(50, steps // 4)}
    config.optimizer = call("training.optimizers.adamw", learning_rate=call("training.optimizers.cosine", **schedule))
    config.ema = {"average": call("training.ema.power", sigma_rel=0.05)}
    return config
