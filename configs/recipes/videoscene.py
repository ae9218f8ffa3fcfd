"""VideoScene: one step from a rendering of a scene that was reconstructed from two views, at a time that is chosen."""

from diffusion_jax.baselines import scene_transformer, warmed_adam
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8)
"""Times between which the policy chooses."""


def reconstruction(steps: int, world: ConfigDict) -> ConfigDict:
    """The training of the reconstructor: short, so that there is something to repair."""
    config = defaults(steps=steps, batch_size=8)
    config.update({"data": world, "held_out": None, "model": None, "optimizer": warmed_adam(steps, 3e-3)})
    config.process = call("processes.rectified_flow")
    config.objective = call("objectives.splat_rendering")
    config.reconstructor = call("models.pixel_reconstructor", near=1.6, far=4.4)
    return config


def student(config: ConfigDict, steps: int, rate: float, **leap: float) -> ConfigDict:
    """The distillation of such a network, with its states up to the time `latest`."""
    config = ConfigDict(config.to_dict())
    config.train.steps, config.ema, config.optimizer = steps, {}, warmed_adam(steps, rate)
    config.objective = call("objectives.leap_distillation", **leap)
    return config


def with_policy(config: ConfigDict) -> ConfigDict:
    """Beside the student a policy learns for half of the steps."""
    half = config.train.steps // 2
    config.policy, config.times = call("models.chooser", count=len(TIMES), width=32, depth=2), TIMES
    config.choosing, config.until = {"entropy": 3e-4, "gradient": "exact"}, half
    policy = call("training.optimizers.until", optimizer=warmed_adam(max(half, 1), 5e-3), steps=half)
    config.optimizer = call("training.optimizers.alternating", parts={"student": config.optimizer, "policy": policy})
    return config


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    smoke = variant == "smoke"
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102)})
    world = call("data.splat_scenes", length=4 if smoke else 2048)
    test = call("data.splat_scenes", split="test", length=4 if smoke else 128)
    size: dict = {"width": 16, "depth": 1, "heads": 2, "scan": False, "components": 8, "batch_size": 4} if smoke else {}
    config.reconstruction = reconstruction(0 if smoke else 15, world)
    config.rendered = ConfigDict({"data": world, "held_out": test, "batch": 64})
    config.teacher = scene_transformer(0 if smoke else 1500, world, **size)
    leap = {"levels": 50, "decay": 0.95}
    config.plain = student(config.teacher, 0 if smoke else 500, 5e-4, latest=1.0, **leap)
    config.leap = with_policy(student(config.teacher, 0 if smoke else 500, 5e-4, latest=max(TIMES), **leap))
    config.teacher.ema = {} if smoke else {"average": call("training.ema.power", sigma_rel=0.1)}
    # Steps of the teacher; scenes to which Gaussians are fitted, and how long.
    config.update({"steps": 2 if smoke else 50, "fit_scenes": 2 if smoke else 8, "fit_steps": 2 if smoke else 40})
    # The bandit of exact Gaussians.
    config.bandit = {"size": 64, "batch": 128, "steps": 2 if smoke else 2000, "rate": 3e-3, "entropy": 5e-3}
    config.bandit.update({"draws": 2, "noise": (0.0, 0.25, 1.0, 3.0, 10.0), "qualities": (0.3, 2.0)})
    if smoke:
        # Gaussians are fitted and the bandit learns in the whole study alone.
        config.update({"seed_numbers": (0,), "fit_scenes": 0, "bandit": {}})
        for part in (config.reconstruction, config.teacher, config.plain, config.leap):
            part.mesh = call("distributed.make_mesh", devices=1)
        config.reconstruction.reconstructor.update({"planes": 4, "width": 8, "depth": 1})
    return config


def paper() -> ConfigDict:
    """CogVideoX-5B on 49 frames of 480 x 720, 13 latents of 60 x 90 x 16: 900 steps of warm-up and 20,000 of
    distillation with batches of 2 at 3e-5, attention layers alone; one step from t = 0.55 in the released code. Here
    modulations have the full width, which makes 7 B parameters."""
    size = {"width": 3072, "depth": 42, "heads": 48, "patch": 2, "qk_norm": True, "dtype": "bfloat16"}
    size |= {"attention": "joint", "temporal_positions": "rotary", "conditions": (call("models.concat"),)}
    config = ConfigDict({"model": call("models.video_dit", preset="S/2", **size), "grid": (0.55, 0.0)})
    config.inputs = {"x0": (13, 60, 90, 16), "cond": {"concat": (13, 60, 90, 16)}}
    config.process = call("processes.vp_scaled_linear", zero_terminal_snr=True)
    config.objective = call("objectives.leap_distillation", levels=50)
    return config
