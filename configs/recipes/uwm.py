"""UWM on a tabletop: actions and the future frame with a time each, trained on videos without actions as well."""

from diffusion_jax.baselines import often_at_the_ends
from diffusion_jax.baselines import world_transformer as arm
from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults


def get_config(variant: str = "") -> ConfigDict:
    smoke = variant == "smoke"
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (0, 1, 2, 100, 101, 102)})
    # Of "shared" one network serves all seeds.
    config.update({"once": ("shared",), "steps": 10, "execute": 8, "horizon": 48, "starts": 200, "rounds": 20})
    grid = call("timesteps.linspace", steps=10)
    shared = call("timesteps.on_grid", grid=grid, last=True)
    own = {"action": often_at_the_ends(shared, 0.2), "future": often_at_the_ends(shared, 0.4)}
    labelled, both = windows(100), windows(100, videos=1000)
    config.arms = {
        "cotrained": arm(futures(both, both), own),
        "labelled": arm(futures(labelled, both), own),
        "cloned": arm(windows(100, future=0), call("timesteps.on_grid", grid=grid)),
        "shared": arm(futures(both, both), shared),
    }
    config.held_out = windows(300, split="test")
    if smoke:
        few = windows(4, videos=8, image_size=8)
        config.update({"seed_numbers": (0,), "steps": 2, "horizon": 8, "starts": 4})
        config.arms = {"cotrained": arm(futures(few, few, 16), own, 3, 8, width=16, depth=1, heads=2)}
        config.arms.cotrained.optimizer, config.arms.cotrained.ema = call("training.optimizers.sgd"), {}
        config.held_out = windows(12, split="test", image_size=8)
    return paper() if variant == "paper" else config


def windows(labelled, videos=0, future=1, split="train", image_size=16):
    """Pictures of so many trajectories with actions, and of so many without; half of a batch have them."""
    known = {"labelled": labelled, "share": 0.5 if videos else None} if future else {}
    size = {"episodes": labelled + videos, "chunk": 10, "future": future, "image_size": image_size}
    return call("data.tabletop_demonstrations", split=split, task="reach", noise=0.1, **size, **known)


def futures(source, world, components=128):
    return call("data.principal_futures", source=source, world=world, components=components, tokens=4)


def paper():
    """Zhu et al. 2025: 100k steps on four A100, latents of SDXL; pooled are features of a ResNet-18 of two frames."""
    config = defaults(steps=100_000, batch_size=144)
    config.model = call(
        "models.joint_transformer",
        modalities={"action": (1,), "future": (2, 4, 4)},
        preset="uwm",
        conditions=(call("models.pooled"),),
    )
    config.inputs = {"x0": {"action": (16, 7), "future": (2, 28, 28, 4)}, "cond": {"pooled": (1024,)}}
    noise = call("processes.vp_cosine", num_steps=100, prediction="epsilon")
    config.process = call("processes.JointProcess", processes={"action": noise, "future": noise})
    index = call("timesteps.on_grid", grid=call("timesteps.linspace", steps=100))
    config.objective = call("objectives.denoising", draw={"action": index, "future": index}, missing_weight=1.0)
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-4, weight_decay=1e-6)
    grid = call("timesteps.linspace", steps=10, num_train_steps=100)
    config.sampling.update(solver=call("solvers.ddim"), grid=grid)
    return config
