"""Clips of moving shapes, 8 frames of 16 x 16 pixels: the model and the measures that recipes about them share.

The model works on the leading principal components of frames, one token a frame: what diffuses is the motion and the
look of one small object, and a step of it takes a tenth of the time that one on patches of pixels takes. A
convolutional autoencoder to 4 x 4 x 4 was measured as well: at 0.6 s of one core for a step of 64 frames it
reconstructs no object within a minute of training.
"""

import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.config import call
from diffusion_jax.experiment import Experiment, defaults, prepare
from diffusion_jax.metrics import frechet_distance
from diffusion_jax.recipes.parts.latents import LatentSpace, encoded, principal_space


def clip_experiment(
    steps: int,
    draw: ConfigDict | None = None,
    *,
    clips: int = 20_000,
    components: int = 128,
    batch_size: int = 32,
    **model,
) -> ConfigDict:
    """The config of a small `video_dit` on clips of moving shapes in a latent space, every frame at its own time.

    draw: a call; `noisy_times()` when None. clips: of the data. components: latent numbers of a frame; see `prepared`.
    model: fields of `video_dit` that differ.
    """
    config = defaults(steps=steps, batch_size=batch_size)
    config.data = call("data.moving_shapes", length=clips, classes=())
    config.held_out = call("data.moving_shapes", split="test", classes=())
    config.latents = {"clips": min(600, clips), "components": components}
    fields = {"patch": 1, "width": 64, "depth": 4, "heads": 4, "qk_norm": True}
    joint = {"attention": "joint", "temporal_positions": "rotary"}
    config.model = call("models.video_dit", **{**fields, **joint, **model})
    config.process = call("processes.rectified_flow", prediction="x0")
    config.objective = call("objectives.denoising", draw=noisy_times() if draw is None else draw, t_shape=2)
    rate = call("training.optimizers.cosine", peak=4e-3, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.sampling.update(solver=call("solvers.ddim"), sampling_grid=sampling_grid(), ema="average")
    return config


def prepared(config: ConfigDict) -> tuple[Experiment, LatentSpace]:
    """The experiment on its clips in the latent space of `config.latents`: components found in so many first clips."""
    made = prepare(config)
    frames = np.concatenate(made.source.take(range(config.latents.clips))["x0"])
    space = principal_space(frames, config.latents.components)
    latents = encoded(space, made.source)
    return made._replace(source=latents, shape=latents.shape), space


def noisy_times() -> ConfigDict:
    """The distribution of one training time: clips are redundant, so little is undecided below t = 1/2."""
    return call("timesteps.logit_normal", mean=0.8, std=1.2)


def sampling_grid(steps: int = 16) -> ConfigDict:
    """Times to sample at, close to each other where there is much noise, for the same reason."""
    return call("timesteps.shift", grid=call("timesteps.linspace", steps=steps), shift=3.0)


def truth(count: int, frames: int = 8, split: str = "test") -> np.ndarray:
    """The first clips `[count, frames, 16, 16, 3]` of the data; longer ones go on as the law of motion says."""
    return data.moving_shapes(split, length=max(count, 1), frames=frames, classes=()).take(range(count))["x0"]


def distances(clips: Array | np.ndarray, real: Array | np.ndarray) -> dict[str, float]:
    """Fréchet distances to the clips `real` of as many frames: of single "frames" and of their changes, "motion"."""
    return {
        "frames": frechet_distance(data.moving.frame_features(clips), data.moving.frame_features(real)),
        "motion": frechet_distance(data.moving.difference_features(clips), data.moving.difference_features(real)),
    }


def identity_share(
    clips: Array | np.ndarray, real: Array | np.ndarray, frames: slice | list[int] = slice(1, None)
) -> float:
    """The share of `frames` in which a clip shows shape and colour of the first frame of the clip in `real`."""
    reading, reference = data.moving.read(clips), data.moving.read(real)
    return float(data.moving.keeps_identity(reading, reference)[:, frames].mean())


def colour(clips: Array | np.ndarray, real: Array | np.ndarray, frames: slice | list[int] = slice(1, None)) -> float:
    """The share of `frames` in which a clip shows the colour of the first frame of the clip in `real`."""
    reading, reference = data.moving.read(clips), data.moving.read(real)
    return float((reading.colour == reference.colour[:, :1])[:, frames].mean())


def mean_position_error(
    clips: Array | np.ndarray, real: Array | np.ndarray, frames: slice | list[int] = slice(1, None)
) -> float:
    """Mean distance in pixels from the object's true place, over `frames`."""
    reading, reference = data.moving.read(clips), data.moving.read(real)
    return float(data.moving.position_error(reading, reference)[:, frames].mean())
