"""What `benchmarks.chaos` trains: a tiny network with all that a run can keep. An objective with a state, two averages,
of one of them snapshots, and a shuffled source."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

STEPS, CHECKPOINT_EVERY = 32, 8


def get_config() -> ConfigDict:
    config = defaults(steps=STEPS, batch_size=16)
    config.train.update(
        log_every=1,
        checkpoint_every=CHECKPOINT_EVERY,
        snapshot_every=2 * CHECKPOINT_EVERY,
        validate_every=None,
    )
    config.data = call("data.unconditional", source=call("data.toys2d", name="two_moons"))
    config.held_out = call("data.unconditional", source=call("data.toys2d", name="two_moons", split="test"))
    config.model = call("models.mlp", width=16, depth=1)
    config.process = call("processes.cosine")
    draw = call("timesteps.importance", num_buckets=2, history=2)
    config.objective = call("objectives.denoising", draw=draw)
    rate = call("training.optimizers.cosine", peak=1e-2, total_steps=STEPS)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate)
    config.ema = {
        "fixed": call("training.ema.fixed", decay=0.9),
        "power": call("training.ema.power", sigma_rel=0.1),
    }
    config.sampling.update(
        ema="power",
        solver=call("solvers.ddim"),
        grid=call("timesteps.uniform_log_snr", steps=4),
        batch_size=16,
    )
    return config
