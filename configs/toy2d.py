"""Points in the plane, a residual MLP, cosine noise: the smallest thing that trains.

    diffusion-jax train --config=toy2d:checkerboard --workdir=out/checkerboard

The variant names the distribution (`data.toys2d`). One minute on two CPU cores; two moons then have a sliced
Wasserstein distance of 0.049 to held-out points, where as many training points have 0.044.
"""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults


def get_config(name: str = "two_moons") -> ConfigDict:
    config = defaults(steps=4000, batch_size=512)
    config.data = call("data.unconditional", source=call("data.toys2d", name=name))
    config.held_out = call("data.unconditional", source=call("data.toys2d", name=name, split="test"))
    config.model = call("models.mlp", width=128, depth=4)
    config.process = call("processes.cosine")
    config.objective = call("objectives.denoising", draw=call("timesteps.stratified"))
    rate = call("training.optimizers.cosine", peak=2e-3, warmup_steps=0.025)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.sampling.update(
        ema="average",
        solver=call("solvers.dpm_solver_pp", order=2),
        grid=call("timesteps.uniform_log_snr", steps=20),
        batch_size=2000,
    )
    config.metrics.points = call("metrics.point_set")
    return config
