"""Residual shadow removal on photographs and textures of 32 x 32 pixels, in latents of 8 x 8."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

SIZE = {"channels": 16, "multipliers": (1, 2), "num_residual": 1, "attention": (0, 0), "mid_attention": 0, "groups": 4}


PAIRS = 1000


def run(steps: int, batch: int, rate: float, optimizer: str = "adamw") -> ConfigDict:
    """What all trainings here share: data and optimiser."""
    config = defaults(steps=steps, batch_size=batch)
    config.update({"data": call("data.shadow_pairs", length=PAIRS), "held_out": None, "model": None, "process": None})
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call(f"training.optimizers.{optimizer}", learning_rate=schedule, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (20, 21, 22, 23), "tuned_on": (100, 101, 102)})
    config.latents = {"autoencoder": call("models.patch_autoencoder", components=8, patch=4)}
    config.latents.train = call("data.shadow_pairs", length=PAIRS)
    config.latents.test = call("data.shadow_pairs", split="test", length=64)
    noise, from_noise = (call("processes.vp_scaled_linear", prediction=kind) for kind in ("epsilon", "v"))
    # As much noise at the end as leaves half of the latents with the shadow, and the error of x0 the same at all times.
    residual = call("processes.residual_diffusion", process=noise, end=0.5)
    # From pure noise v is predicted: an error of epsilon is 15 times as large in x0 there.
    config.priors = {"noise": run(900, 32, 4e-3), "residual": run(900, 32, 4e-3)}
    for name, process in (("noise", from_noise), ("residual", noise)):
        config.priors[name].update({"model": call("models.unet", **SIZE), "process": process})
        config.priors[name].objective = call("objectives.denoising")
    enhanced = call("objectives.self_enhanced", share=0.8, gap=1.0, decay=0.98, warmup=200)
    ways = (("noise", from_noise, None), ("residual", residual, None), ("enhanced", residual, enhanced))
    for name, process, more in ways:
        config[name] = run(1000, 32, 5e-3, optimizer="muon")
        branch = call("models.controlnet", preset="digits", **SIZE, control_channels=8, control_features=(16,))
        config[name].update({"branch": branch, "process": process, "enhanced": more})
        config[name].objective = call("objectives.denoising", weight=call("timesteps.x0_weight"))
    config.details = run(1000, 16, 4e-3)
    config.details.update({"width": 32, "objective": call("objectives.detail_loss"), "latents": config.latents})
    # Steps of runs, of the one whose answers are looked at, and of the one that is decoded; pictures shown.
    config.update({"steps": (4, 10, 25), "walk": 10, "final": 4, "shown": 8})
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Small pictures, and everything as it begins."""
    pairs = {"length": 6, "size": 8}
    config.update({"seed_numbers": (0,), "steps": (1, 2, 3), "walk": 2, "final": 2, "shown": 4})
    small = {"channels": 4, "multipliers": (1,), "attention": (0,), "mid_residual": 0}
    for one in (*config.priors.values(), config.noise, config.residual, config.enhanced, config.details):
        one.train.update({"steps": 0, "batch_size": 4})
        one.update({"ema": {}, "data": call("data.shadow_pairs", **pairs)})
        one.optimizer = call("training.optimizers.sgd")
        if "branch" in one:
            one.branch.update({**small, "control_features": (4,)})
    # Untrained, both are the same.
    config.enhanced = config.residual
    for prior in config.priors.values():
        prior.model.update(small)
    config.latents.autoencoder.patch, config.latents.train = 2, call("data.shadow_pairs", **pairs)
    config.latents.test = call("data.shadow_pairs", split="test", **pairs)
    config.details.update({"width": 4, "latents": config.latents})
    return config


def paper() -> ConfigDict:
    """Stable Diffusion 1.5 with a ControlNet that sees latents. The steps of training and sampling were not published
    where they could be read."""
    config = ConfigDict({"inputs": {"x0": (64, 64, 4), "cond": {"control": (64, 64, 4), "context": (77, 768)}}})
    branch = call("models.controlnet", preset="sd15", control_channels=4, control_features=(320,))
    config.model = call("models.controlled", unet=call("models.unet", preset="sd15"), control=branch)
    config.process = call("processes.residual_diffusion", process=call("processes.vp_scaled_linear"))
    return config
