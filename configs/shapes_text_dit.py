"""Text to image: captioned scenes of coloured shapes, a diffusion transformer with a text encoder trained along.

    diffusion-jax train --config=shapes_text_dit --workdir=out/shapes

`evaluate` reads each picture back into a scene and compares it with the caption.

About one step a second on two CPU cores, so five hours and a half there; made for a GPU. Not yet run to its end: its
score is not known.
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.data.scenes import tokenizer
from diffusion_jax.experiment import defaults


def get_config() -> ConfigDict:
    config = defaults(steps=20_000, batch_size=64)
    config.data = call("data.shapes", split="train", length=50_000)
    config.held_out = call("data.shapes", split="test", length=1000)
    vocabulary = tokenizer().vocab_size
    config.model = call(
        "models.dit",
        preset="S/4",
        width=256,
        depth=8,
        heads=4,
        qk_norm=True,
        conditions=(call("models.text", vocab_size=vocabulary),),
        remat="dots_no_batch",
    )
    config.process = call("processes.rectified_flow")
    null = {"tokens": 0, "tokens_mask": False}
    config.objective = call("objectives.denoising", draw=call("timesteps.logit_normal"), cond_dropout=0.1, null=null)
    rate = call("training.optimizers.cosine", peak=1e-3, warmup_steps=0.025)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.train.sample_every = 2000
    config.sampling.update(
        ema="average",
        solver=call("solvers.dpm_solver_pp", order=2),
        grid=call("timesteps.linspace", steps=25),
        transformations={"guidance": call("denoisers.guided", scale=4.0, null=null)},
        condition=call("data.conditions_of", source=config.held_out),
        batch_size=100,
    )
    config.metrics.scenes = call("metrics.scene_set")
    return config
