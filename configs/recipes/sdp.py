"""SDP: a disc is driven around an obstacle by a policy whose actions stand at rising noise levels."""

from diffusion_jax.baselines import action_transformer as policy
from diffusion_jax.config import ConfigDict, call

SHARE = 0.8
"""Of the examples whose levels are those of a stream; the others have one level for all actions."""


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12, 13, 14), "tuned_on": (0, 1, 2, 100, 101)})
    config.update({"task": "reach", "chunk": 4, "h": 4, "other_h": (2, 8), "episodes": 256})
    config.update({"environments": (1, 16), "rounds": 40, "jump": 20, "deadline": 40, "slow": 0.015})
    config.grid = call("timesteps.linspace", steps=32)
    config.policies = {"mixed": policy(1700, SHARE), "constant": policy(1700, 0.0)}
    config.policies.update({"mixed, h = 2": policy(900, SHARE, 2), "mixed, h = 8": policy(1200, SHARE, 8)})
    every = ("full", "full, mixed", "fewer steps", "stream", "stream from zeros", "stream, constant")
    buffers = ("stream, h = 2", "stream, h = 8")
    # Steps of an episode, and who acts: on the table, where the goal jumps, and where a disc that answers slowly stays
    # where both sides are open for several decisions.
    config.plays = {"table": (60, every + buffers), "jump": (40, ("full, mixed", "stream", *buffers))}
    config.plays.slow = (48, ("fewer steps", "stream"))
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """One policy, hardly trained, in a few episodes as a stream and in full."""
    config.update({"seed_numbers": (0,), "episodes": 4, "rounds": 2, "environments": (1,), "other_h": ()})
    config.grid.steps = 4
    config.policies = {n: policy(4, SHARE, num_steps=4, width=16, depth=1, heads=2) for n in ("mixed", "constant")}
    for entry in config.policies.values():
        entry.optimizer, entry.ema = call("training.optimizers.sgd"), {}
    config.plays = {"table": (8, ("full", "stream"))}
    return config


def paper() -> ConfigDict:
    """N = 100, cosine, T_p = 20, T_o = 2, T_a = 8 (h = 2) on Push-T. A token an action in place of a 1-D U-Net."""
    config = policy(500_000, SHARE, 2, chunk=8, num_steps=100, width=256, depth=8)
    config.data = call("data.push_t_demonstrations", episodes=200, history=2, chunk=20)
    plan = {"entries": 20, "chunk": 8, "past": 1}
    config.objective.draw.first.plan.update(plan)
    config.model.network.modalities, config.train.batch_size = (1,), 256
    config.process = call("processes.vp_cosine", num_steps=100)
    rate = call("training.optimizers.cosine", peak=1e-4, total_steps=config.train.steps, warmup_steps=500)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=1e-6)
    config.inputs = {"x0": (20, 2), "t": (20,), "cond": {"observation": (2, 20)}}
    return config
