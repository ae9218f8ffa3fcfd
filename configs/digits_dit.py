"""Class-conditional diffusion transformer on 8 x 8 handwritten digits (real, scikit-learn). The quickstart.

    python -m diffusion_jax.train --config=configs/digits_dit.py --workdir=out/digits

About three minutes on two CPU cores. See README for the scores that `evaluate` reports.
"""

from diffusion_jax.config import ConfigDict, call


def get_config() -> ConfigDict:
    steps = 4000
    config = ConfigDict()
    config.seed = 0
    config.data = call("data.digits", split="train")
    config.held_out = call("data.digits", split="test")
    config.model = call("models.dit", preset="S/2", width=96, depth=4, heads=4, num_classes=10, qk_norm=True)
    config.process = call("processes.rectified_flow")
    config.objective = call(
        "objectives.denoising", draw=call("timesteps.logit_normal"), cond_dropout=0.1, null={"label": 10}
    )
    config.optimizer = call(
        "training.optimizers.adamw",
        learning_rate=call("training.optimizers.cosine", peak=2e-3, total_steps=steps, warmup_steps=100),
        weight_decay=0.01,
    )
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.mesh = call("distributed.make_mesh")
    config.train = {
        "steps": steps,
        "batch_size": 128,
        "transforms": (),
        "accumulate": 1,
        "clip_norm": 1.0,
        "log_every": 50,
        "checkpoint_every": 1000,
        "keep": 2,
        "snapshot_every": None,
        "max_skipped": 100,
        "validate_every": 500,
        "validation_examples": 392,
        "sample_every": None,
    }
    config.sampling = {
        "ema": "average",
        "solver": call("solvers.dpm_solver_pp", order=2),
        "grid": call("timesteps.linspace", steps=20),
        "transformations": {"guidance": call("denoisers.guided", scale=1.5, null={"label": 10})},
        "condition": call("data.cycled_labels", num_classes=10),
        "batch_size": 250,
        "picture_columns": 10,
        "picture_zoom": 4,
    }
    return config
