"""MMD-DDM: a ring of Gaussians with an MLP and digits with a transformer, tuned through their own few-step samplers."""

from typing import Any

import numpy as np

from diffusion_jax.baselines import digit_transformer, tiny_digit_transformer
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

CUBE = call("objectives.polynomial_kernel", degree=3)
CUBIC = call("objectives.raw_space", kernel=CUBE)
RBF = call("objectives.raw_space", kernel=call("objectives.gaussian_kernel", bandwidths=(0.1, 0.3, 1.0)))
FOURIER = call("objectives.fourier_space", kernel=CUBE, size=2, count=64, bandwidth=0.3)
"""Spaces on the ring: moments up to the third, a Gaussian kernel, and the cubic kernel of random features."""


def ddim_grid(steps: int) -> ConfigDict:
    """Indices 0, T / S, 2 T / S, ... from the largest on, as in the published code: 800 is the first of five."""
    return call("timesteps.leading", steps=steps, num_train_steps=1000)


def ring(split: str, examples: int = 20_000) -> ConfigDict:
    """Eight Gaussians of deviation 0.08 on the unit circle."""
    angles = 2 * np.pi * np.arange(8) / 8
    means = tuple((float(np.cos(a)), float(np.sin(a))) for a in angles)
    size = {"weights": (0.125,) * 8, "means": means, "stds": 0.08, "num_examples": examples}
    return call("data.unconditional", source=call("data.gaussian_blobs", split=split, **size))


def through_sampler(steps: int, space: ConfigDict) -> ConfigDict:
    """The objective: the discrepancy in `space` of what DDIM draws in so many steps."""
    run = call(
        "objectives.whole_runs",
        denoiser=call("denoisers.denoiser"),
        solver=call("solvers.ddim"),
        grid=ddim_grid(steps),
    )
    return call("objectives.kernel_matching", generate=run, spaces=(space,))


def tuning(base: ConfigDict, updates: int, rate: float, batch_size: int, objective: Any = None) -> ConfigDict:
    """Further training of `base`, by its own objective or another; the clipping is that of the published code."""
    config = base.copy_and_resolve_references()
    config.train.update({"steps": updates, "batch_size": batch_size, "clip_norm": 0.5})
    config.optimizer, config.ema = call("training.optimizers.adamw", learning_rate=rate), {}
    config.objective = base.objective if objective is None else objective
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (20, 21, 22, 23, 24), "tuned_on": (100, 101, 102)})
    base = defaults(steps=12_000, batch_size=256)
    base.data, base.held_out = ring("train"), ring("test", 4000)
    base.model, base.process = call("models.mlp", width=128, depth=3), call("processes.vp_linear")
    base.objective = call("objectives.denoising", draw=call("timesteps.stratified"))
    rate = call("training.optimizers.cosine", peak=2e-3, total_steps=12_000, warmup_steps=100)
    base.optimizer = call("training.optimizers.adamw", learning_rate=rate)
    base.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    config.ring = {"base": base, "headline": "RBF", "count": 4000, "steps": 5, "plain": (2, 5, 10, 20, 50)}
    config.ring.tuned = {
        f"{name}, {steps}": tuning(base, 500, 3e-4, 128, through_sampler(steps, space))
        for name, space, steps in (("RBF", RBF, 5), ("RBF", RBF, 2), ("Fourier", FOURIER, 5), ("cubic", CUBIC, 2))
    }
    config.ring.tuned.longer = tuning(base, 500, 3e-4, 128)
    digits = digit_transformer(6000, depth=4)
    config.digits = {"base": digits, "headline": "random features", "count": 400, "steps": 5, "plain": (5, 10, 20, 50)}
    kernel = call("objectives.gaussian_kernel", bandwidths=(2.0, 5.0, 10.0))
    space = call("objectives.convolution_space", kernel=kernel, shape=(8, 8, 1))
    space = call("objectives.paired", space=space, classes=10, scale=5.0)
    config.digits.tuned = {
        "random features, 5": tuning(digits, 300, 3e-4, 64, through_sampler(5, space)),
        "longer": tuning(digits, 300, 3e-4, 64),
    }
    # Of a training step: the network, one batch of latents, and how many steps a run has.
    config.memory = {"model": call("models.dit", preset="S/2"), "shape": (8, 32, 32, 4), "steps": 10}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The digits alone, in pixels: one update of a tiny transformer."""
    config.seed_numbers = (0,)
    del config["ring"], config["memory"]
    digits, steps = tiny_digit_transformer(0), 2
    config.digits.base = digits
    config.digits.update({"count": 16, "steps": steps, "plain": (steps,)})
    config.digits.tuned = {
        f"{config.digits.headline}, {steps}": tuning(digits, 1, 3e-4, 4, through_sampler(steps, CUBIC)),
        "longer": tuning(digits, 0, 3e-4, 4),
    }
    return config


def paper() -> ConfigDict:
    """CIFAR-10: five steps of DDIM through the U-Net of DDPM, batches of 64, Adam at 5e-6, gradients clipped at 0.5,
    the cubic kernel of Inception's 2048 features (or of CLIP's 512), some hundreds of updates."""
    config = ConfigDict({"inputs": {"x0": (32, 32, 3)}, "model": call("models.unet", preset="ddpm_cifar10")})
    config.process = call("processes.vp_linear")
    config.update({"grid": ddim_grid(5), "solver": call("solvers.ddim"), "kernel": CUBE})
    config.update({"batch_size": 64, "clip_norm": 0.5, "updates": 500})
    config.optimizer = call("training.optimizers.adamw", learning_rate=5e-6)
    return config
