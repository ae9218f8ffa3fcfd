"""Difficulty curriculum: noisy times first, on digits of 8 x 8 pixels, with a network that is a perceptron with
residuals: a transformer of one token."""

from typing import Any

from diffusion_jax.baselines import on_garments
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

INTERVALS = 5


def experiment(steps: int, batch_size: int = 64, **model: Any) -> ConfigDict:
    """The training that all arms share but for the draw of their times. The rate is constant, as is published."""
    config = defaults(steps=steps, batch_size=batch_size)
    for entry, split in (("data", "train"), ("held_out", "test")):
        config[entry] = call("data.unconditional", source=call("data.digits", split=split))
    # Wider than the 64 pixels: layer norms take directions away, and at 64 some trainings lost one of the picture's.
    config.model = call("models.dit", **{"preset": "S/8", "width": 96, "depth": 1, "heads": 2, **model})
    config.process = call("processes.vp_linear")
    config.objective = call("objectives.denoising", draw=call("timesteps.uniform"))
    rate = call("training.optimizers.constant", value=1e-3, warmup_steps=min(50, steps))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.train.log_every = steps
    config.mesh = call("distributed.make_mesh", devices=1)
    return config


def within(steps: int, share: float, **fields: Any) -> ConfigDict:
    """A curriculum of stages of equal length, the last of which begins after `share` of the steps."""
    longest = max(1, round(share * steps / (INTERVALS - 1)))
    return call("timesteps.curriculum", edges=INTERVALS, patience=None, longest=longest, **fields)


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (100, 101, 102), "intervals": INTERVALS})
    steps = 3000
    config.experiment = experiment(steps)
    config.draws = {
        "uniform": call("timesteps.uniform"),
        "easy first": within(steps, 0.1),
        "hard first": within(steps, 0.1, easy_first=False),
        "easy first, long": within(steps, 0.4),
        "by the loss": call("timesteps.curriculum", edges=INTERVALS, patience=15, smoothing=0.9),
    }
    # Networks of one interval each: their steps, after how many their loss is looked at, at how many of the seeds.
    config.alone = {"steps": 1500, "every": 10, "share": 0.1, "seeds": 3}
    # Marginals of digits as a mixture of Gaussians about them: pairs of times in each interval, samples of each.
    config.entropy = {"std": 0.1, "times": 4, "samples": 256}
    # How often, and with how many draws of noise for each held-out example, losses of the arms are looked at.
    config.watch = {"every": 50, "repeats": 4}
    config.update({"solver": call("solvers.ddim"), "grid": call("timesteps.linspace", steps=25), "count": 1000})
    if variant == "smoke":
        config.update({"seed_numbers": (0,), "count": 8, "grid": call("timesteps.linspace", steps=2)})
        config.experiment = experiment(4, batch_size=8, width=8, depth=1, heads=1, scan=False)
        config.experiment.optimizer, config.experiment.train.clip_norm = call("training.optimizers.sgd"), None
        config.intervals = 2
        config.alone.update({"steps": 4, "every": 2, "seeds": 1})
        config.entropy.update({"times": 1, "samples": 2})
        config.watch.update({"every": 2, "repeats": 1})
        # One network, trained once, stands for all arms.
        config.draws = dict.fromkeys(config.draws, within(4, 0.5))
    return on_garments(config) if variant == "fashion" else config


def paper() -> ConfigDict:
    """DiT-B/2 on latents of 256 x 256 pixels, batches of 256, 20 intervals of equal length, 200 losses of patience. The
    paper trains DiT, EDM and SiT; intervals and patience are sensible values, not quoted ones."""
    model = call("models.dit", preset="B/2", conditions=(call("models.label", num_classes=1000),), learn_sigma=True)
    config = ConfigDict({"model": model, "inputs": {"x0": (32, 32, 4), "cond": {"label": ("int",)}}})
    config.process = call("processes.vp_linear")
    config.objective = call("objectives.denoising", draw=call("timesteps.curriculum", edges=20, patience=200))
    config.grid = call("timesteps.leading", steps=250)
    return config
