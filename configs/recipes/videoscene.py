"""VideoScene: one step from a rendering of a scene that was reconstructed from two views, at a time that is chosen."""

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

TIMES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.6)
"""Times between which the policy chooses."""


def trained(steps: int, batch_size: int, rate: float, data: ConfigDict) -> ConfigDict:
    config = defaults(steps=steps, batch_size=batch_size)
    config.update({"data": data, "held_out": None, "process": call("processes.rectified_flow"), "model": None})
    config.objective = call("objectives.splat_rendering")
    config.optimizer = adam(steps, rate)
    return config


def adam(steps: int, rate: float) -> ConfigDict:
    schedule = {"peak": rate, "total_steps": max(steps, 1), "warmup_steps": min(20, steps // 4)}
    return call("training.optimizers.adamw", learning_rate=call("training.optimizers.cosine", **schedule))


def clips(steps: int, rate: float, world: ConfigDict, batch_size: int = 32, **size: int) -> ConfigDict:
    """A video transformer on principal components, a token a frame, that is told both ends and where cameras are."""
    config = trained(steps, batch_size, rate, world)
    fields = {"width": 128, "depth": 3, "heads": 4, "components": 64, **size}
    config.components = fields.pop("components")
    config.model = call(
        "models.video_dit", preset="S/1", **fields, patch=1, qk_norm=True, attention="joint",
        temporal_positions="rotary", conditions=(call("models.concat"),),
    )  # fmt: skip
    config.process = call("processes.vp_scaled_linear", zero_terminal_snr=True)
    config.objective = call("objectives.denoising", draw=call("timesteps.uniform"))
    return config


def student(config: ConfigDict, steps: int, rate: float, **leap: float) -> ConfigDict:
    """The distillation of such a network, with its states up to the time `latest`."""
    config = ConfigDict(config.to_dict())
    config.train.steps, config.ema, config.optimizer = steps, {}, adam(steps, rate)
    config.objective = call("objectives.leap_distillation", **leap)
    return config


def with_policy(config: ConfigDict) -> ConfigDict:
    """Beside the student a policy learns for half of the steps."""
    half = config.train.steps // 2
    config.policy, config.times = call("models.chooser", count=len(TIMES), width=32, depth=2), TIMES
    config.choosing = {"until": half, "entropy": 3e-4}
    policy = call("training.optimizers.until", optimizer=adam(max(half, 1), 5e-3), steps=half)
    config.optimizer = call("training.optimizers.alternating", parts={"student": config.optimizer, "policy": policy})
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    world = call("data.splat_scenes", length=16 if smoke else 2048)
    test = call("data.splat_scenes", split="test", length=4 if smoke else 128)
    size: dict = {"width": 16, "depth": 1, "heads": 2, "scan": False, "components": 8} if smoke else {}
    config.reconstruction = trained(0 if smoke else 15, 2 if smoke else 8, 3e-3, world)
    config.reconstruction.reconstructor = call("models.pixel_reconstructor", near=1.6, far=4.4)
    config.rendered = ConfigDict({"data": world, "held_out": test, "batch": 64})
    config.teacher = clips(0 if smoke else 1500, 2e-3, world, 4 if smoke else 32, **size)
    leap = {"levels": 50, "decay": 0.95}
    config.plain = student(config.teacher, 0 if smoke else 500, 5e-4, latest=1.0, **leap)
    config.leap = with_policy(student(config.teacher, 2 if smoke else 500, 5e-4, latest=max(TIMES), **leap))
    config.teacher.ema = {} if smoke else {"average": call("training.ema.power", sigma_rel=0.1)}
    # Steps of the teacher; scenes to which Gaussians are fitted, and how long.
    config.update({"steps": 2 if smoke else 50, "fit_scenes": 2 if smoke else 8, "fit_steps": 2 if smoke else 40})
    # The bandit of exact Gaussians.
    config.bandit = {"size": 64, "batch": 128, "steps": 2 if smoke else 2000, "rate": 3e-3, "entropy": 1e-3}
    config.bandit.update({"noise": (0.0, 0.25, 1.0, 3.0, 10.0), "qualities": (0.3, 2.0)})
    if smoke:
        # Gaussians are fitted and the bandit learns in the whole study alone.
        config.update({"seed_numbers": (0,), "fit_scenes": 0, "bandit": {}})
        for part in (config.reconstruction, config.teacher, config.plain, config.leap):
            part.mesh = call("distributed.make_mesh", devices=1)
        config.reconstruction.reconstructor.update({"planes": 4, "width": 8, "depth": 1})
    return config


def paper() -> ConfigDict:
    """CogVideoX-5B on 49 frames of 480 x 720, 13 latents of 60 x 90 x 16: 900 steps of warm-up and 20,000 of
    distillation with batches of 2 at 3e-5, attention layers alone; one step from t = 0.55 in the released code."""
    size = {"width": 3072, "depth": 42, "heads": 48, "patch": 2, "qk_norm": True, "dtype": "bfloat16"}
    told = (call("models.concat"), call("models.context"))
    model = call(
        "models.video_dit", preset="S/2", **size, attention="joint", temporal_positions="rotary", conditions=told
    )
    cond = {"concat": (13, 60, 90, 16), "context": (226, 4096)}
    config = ConfigDict({"model": model, "inputs": {"x0": (13, 60, 90, 16), "cond": cond}, "grid": (0.55, 0.0)})
    config.process = call("processes.vp_scaled_linear", zero_terminal_snr=True)
    config.objective = call("objectives.leap_distillation", levels=50)
    return config
