"""A small video transformer of moving shapes: what studies of times for frames share.

It works on the leading principal components of frames, one token a frame: what diffuses is the motion and the look of
one small object, and a step of it takes a tenth of the time that one on patches of pixels takes. A convolutional
autoencoder to 4 x 4 x 4 was measured as well: at 0.6 s of one core for a step of 64 frames it reconstructs no object
within a minute of training.
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import build, call
from diffusion_jax.experiment import defaults


def clip_transformer(
    steps: int,
    draw: ConfigDict | None = None,
    *,
    clips: int = 20_000,
    components: int = 128,
    batch_size: int = 32,
    classes: tuple[str, ...] = (),
    **model: Any,
) -> ConfigDict:
    """The config of a `video_dit` of 8 frames of 16 x 16 pixels in a space of principal components, every frame at its
    own time.

    draw: a call; `frame_times()` when None. clips: of the data. components: latent numbers of a frame. classes: what
    labels are made of, see `data.moving_shapes`; with some the network takes one. model: fields of `video_dit`.
    `config.held_out` are clips in pixels; the space is `experiment.prepare(config).source.space`.
    """
    config = defaults(steps=steps, batch_size=batch_size)
    world = call("data.moving_shapes", length=clips, classes=classes)
    config.data = call("data.principal_latents", source=world, components=components, first=min(600, clips))
    config.held_out = call("data.moving_shapes", split="test", classes=classes)
    fields = {"patch": 1, "width": 64, "depth": 4, "heads": 4, "qk_norm": True}
    fields |= {"attention": "joint", "temporal_positions": "rotary"}
    if classes:
        fields["conditions"] = (call("models.label", num_classes=build(world).num_classes),)
    config.model = call("models.video_dit", **{**fields, **model})
    config.process = call("processes.rectified_flow", prediction="x0")
    config.objective = call("objectives.denoising", draw=frame_times() if draw is None else draw, t_shape=2)
    rate = call("training.optimizers.cosine", peak=4e-3, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.sampling.update(solver=call("solvers.ddim"), grid=clip_grid(), ema="average")
    return config


def frame_times() -> ConfigDict:
    """The distribution of one training time: clips are redundant, so little is undecided below t = 1/2."""
    return call("timesteps.logit_normal", mean=0.8, std=1.2)


def clip_grid(steps: int = 16) -> ConfigDict:
    """Times to sample at, close to each other where there is much noise, for the same reason."""
    return call("timesteps.shift", grid=call("timesteps.linspace", steps=steps), shift=3.0)
