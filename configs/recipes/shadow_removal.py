"""Residual shadow removal on photographs and textures of 32 x 32 pixels, in latents of 8 x 8."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

SIZE = {"channels": 16, "multipliers": (1, 2), "num_residual": 1, "attention": (0, 0), "mid_attention": 0, "groups": 4}


def run(steps: int, batch: int, rate: float, pairs: int = 1000) -> ConfigDict:
    """What all trainings here share: data and optimiser."""
    config = defaults(steps=steps, batch_size=batch)
    config.update({"data": call("data.shadow_pairs", length=pairs), "held_out": None, "model": None, "process": None})
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=schedule, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    config.image = run(900, 16, 5e-3)
    config.image.model = call(
        "models.kl_vae", preset="small", channels=8, multipliers=(1, 2, 2), groups=4, latent_channels=8
    )
    config.image.objective = call("objectives.vae_loss", kl_weight=1e-3)
    noise = call("processes.vp_scaled_linear")
    # As much noise at the end as leaves half of the latents with the shadow, and the error of x0 the same at all times.
    residual = call("processes.residual_diffusion", process=noise, end=0.5)
    config.prior = run(600, 32, 4e-3)
    config.prior.update({"model": call("models.unet", **SIZE), "process": noise})
    config.prior.objective = call("objectives.denoising")
    enhanced = call("objectives.self_enhanced", share=0.5, gap=0.3, decay=0.98, warmup=200)
    weights = {"noise": call("timesteps.min_snr_weight", gamma=5.0), "residual": call("timesteps.x0_weight")}
    for name, process, more in (("noise", noise, None), ("residual", residual, None), ("enhanced", residual, enhanced)):
        config[name] = run(600, 32, 3e-3)
        branch = call("models.controlnet", preset="digits", **SIZE, control_channels=8, control_features=(16,))
        config[name].update({"branch": branch, "process": process, "enhanced": more})
        config[name].objective = call(
            "objectives.denoising", weight=weights["noise" if name == "noise" else "residual"]
        )
    config.details = run(600, 16, 4e-3)
    config.details.update({"width": 24, "objective": call("objectives.detail_loss")})
    config.latents = {"train": config.image.data, "test": call("data.shadow_pairs", split="test", length=64)}
    # Steps of runs, of the one whose answers are looked at, and of the one that is decoded; pictures shown.
    config.update({"steps": (4, 10, 25), "walk": 10, "final": 10, "shown": 8})
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Small pictures, and everything as it begins."""
    pairs = {"length": 6, "size": 8}
    config.update({"seed_numbers": (0,), "steps": (1, 2, 3), "walk": 2, "final": 2, "shown": 4})
    small = {"channels": 4, "multipliers": (1,), "attention": (0,), "mid_residual": 0}
    for name in ("image", "prior", "noise", "residual", "enhanced", "details"):
        config[name].train.update({"steps": 0, "batch_size": 4})
        config[name].update({"ema": {}, "data": call("data.shadow_pairs", **pairs)})
        config[name].optimizer = call("training.optimizers.sgd")
        if "branch" in config[name]:
            config[name].branch.update({**small, "control_features": (4,)})
    config.image.model.update({"channels": 4, "multipliers": (1,)})
    config.details.width = 4
    # Untrained, both are the same.
    config.enhanced = config.residual
    config.prior.model.update(small)
    config.latents = {"train": config.image.data, "test": call("data.shadow_pairs", split="test", **pairs)}
    return config


def paper() -> ConfigDict:
    """Stable Diffusion 1.5 with a ControlNet that sees latents. The steps of training and sampling were not published
    where they could be read."""
    config = ConfigDict({"inputs": {"x0": (64, 64, 4), "cond": {"control": (64, 64, 4), "context": (77, 768)}}})
    branch = call("models.controlnet", preset="sd15", control_channels=4, control_features=(320,))
    config.model = call("models.controlled", unet=call("models.unet", preset="sd15"), control=branch)
    config.process = call("processes.residual_diffusion", process=call("processes.vp_scaled_linear"))
    return config
