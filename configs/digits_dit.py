"""Class-conditional diffusion transformer on 8 x 8 handwritten digits (real, scikit-learn). The quickstart.

    diffusion-jax train --config=digits_dit --workdir=out/digits

About two minutes on two CPU cores. Expected: class accuracy 0.99, Fréchet distance about twice that between training
and held-out digits (1.07 and 1.17 with two seeds, against 0.56).
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults


def get_config() -> ConfigDict:
    config = defaults(steps=2000, batch_size=128)
    config.data = call("data.digits", split="train")
    config.held_out = call("data.digits", split="test")
    config.model = call(
        "models.dit",
        preset="S/2",
        width=96,
        depth=4,
        heads=4,
        conditions=(call("models.label", num_classes=10),),
        qk_norm=True,
        remat="dots_no_batch",
    )
    config.process = call("processes.rectified_flow")
    null = {"label": 10}
    config.objective = call("objectives.denoising", draw=call("timesteps.logit_normal"), cond_dropout=0.1, null=null)
    rate = call("training.optimizers.cosine", peak=2e-3, warmup_steps=0.05)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.train.sample_every = 500
    config.sampling.update(
        ema="average",
        solver=call("solvers.dpm_solver_pp", order=2),
        grid=call("timesteps.linspace", steps=20),
        transformations={"guidance": call("denoisers.guided", scale=1.25, null=null)},
        condition=call("data.cycled_labels"),
        batch_size=250,
    )
    config.metrics.images = call("metrics.image_set", judge=call("metrics.feature_network", world="digits"))
    return config
