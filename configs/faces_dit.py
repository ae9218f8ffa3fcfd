"""Diffusion transformer on 24 x 24 faces (real, scikit-image): a hundred pictures, so it memorises; a smoke signal.

    diffusion-jax train --config=faces_dit --workdir=out/faces

Nothing is measured: with so few pictures a distance would reward memory.
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults


def get_config() -> ConfigDict:
    config = defaults(steps=3000, batch_size=32)
    config.data = call("data.faces", split="train", others=True)
    config.held_out = call("data.faces", split="test", others=True)
    config.model = call(
        "models.dit",
        preset="S/2",
        width=192,
        depth=6,
        heads=6,
        positions="rotary",
        conditions=(call("models.label", num_classes=2),),
        remat="dots_no_batch",
    )
    config.process = call("processes.vp_cosine", prediction="v")
    null = {"label": 2}
    config.objective = call(
        "objectives.denoising",
        draw=call("timesteps.stratified"),
        weight=call("timesteps.min_snr_weight"),
        cond_dropout=0.1,
        null=null,
    )
    config.train.transforms.flip = call("data.flip")
    rate = call("training.optimizers.cosine", peak=1e-3, warmup_steps=0.03)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.05)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.train.sample_every = 1000
    config.sampling.update(
        ema="average",
        solver=call("solvers.unipc", order=2),
        grid=call("timesteps.trailing", steps=25, num_train_steps=1000),
        transformations={"guidance": call("denoisers.guided", scale=1.5, null=null)},
        condition=call("data.cycled_labels"),
        batch_size=100,
    )
    return config
