"""SDP: a disc is driven around an obstacle by a policy whose actions stand at rising noise levels.

    python -m diffusion_jax.recipes sdp

Variants: `smoke`, a few steps; `paper`, the released settings for Push-T as entries, which no run here uses.
"""

from typing import Any

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.experiment import defaults

DISTURBANCE = 0.4
"""Standard deviation of what is added to the expert's actions, so that the expert is seen to recover."""


def policy(
    data: ConfigDict, steps: int, share: float, *, chunk: int = 4, past: int = 0, num_steps: int = 32, **network: Any
) -> ConfigDict:
    """A diffusion policy: `share` of its examples have the levels of a stream, the others one level for all actions.

    Actions of one chunk share a level, so a chunk is a token.
    """
    config = defaults(steps=steps, batch_size=64)
    config.data = data
    config.held_out = None
    size = {"width": 64, "depth": 3, "heads": 4, **network}
    transformer = call(
        "models.joint_transformer", modalities=(chunk,), times="joined", conditions=(call("models.pooled"),), **size
    )
    config.model = call("models.observing", network=transformer)
    config.process = call("processes.rectified_flow")
    config.grid = call("timesteps.linspace", steps=num_steps)
    plan = call("timesteps.chunk_staircase", grid=config.grid, entries=data.chunk, chunk=chunk, past=past)
    config.objective = call(
        "objectives.denoising",
        t_shape=2,
        draw=call(
            "timesteps.mixture",
            first=call("timesteps.on_rows", plan=plan),
            second=call("timesteps.shared", draw=call("timesteps.on_grid", grid=config.grid)),
            probability=share,
        ),
    )
    rate = call("training.optimizers.cosine", peak=3e-3, total_steps=steps, warmup_steps=steps // 20)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=1e-4)
    config.ema.average = call("training.ema.power", sigma_rel=0.05)
    return config


def demonstrations(chunk: int, episodes: int = 500) -> ConfigDict:
    """Windows of an expert that passes the obstacle on either side, and is disturbed."""
    return call(
        "data.tabletop_demonstrations", task="reach", episodes=episodes, history=1, chunk=chunk, noise=DISTURBANCE
    )


def get_config(variant: str | None = None) -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed": 0, "seeds": 3, "task": "reach", "chunk": 4})
    config.update({"episodes": 256, "horizon": 60, "repeats": 40})
    config.arms = ["full", "full_mixed", "short", "stream", "stream_zero", "stream_constant"]
    config.environments = [1, 16]
    config.slow = {"max_step": 0.015, "horizon": 48}
    config.policies = {name: policy(demonstrations(16), 1700, share) for name, share in SHARES.items()}
    # The goal jumps after `step`, and success is counted until `horizon`; h = 2 and 8 have networks of their own.
    config.jump = {"step": 20, "horizon": 40}
    config.jump.policies = {"h2": policy(demonstrations(8), 900, 0.8), "h8": policy(demonstrations(32), 1200, 0.8)}
    # Push-T needs the extra `control` and is left out where it is not installed.
    config.push_t = {"episodes": 10, "horizon": 300, "chunk": 8, "margin": 0.1}
    config.push_t.policy = policy(push_t(episodes=20, chunk=16), 800, 0.8, chunk=8)
    return smoke(config) if variant == "smoke" else config


SHARES = {"mixed": 0.8, "constant": 0.0}


def push_t(episodes: int, chunk: int) -> ConfigDict:
    return call("data.push_t_demonstrations", episodes=episodes, history=2, chunk=chunk)


def smoke(config: ConfigDict) -> ConfigDict:
    """One trained policy in episodes as a stream; no jumps, and no Push-T."""
    config.update({"seeds": 1, "episodes": 4, "horizon": 12, "repeats": 2, "environments": [1]})
    config.arms = ["stream"]
    size = {"width": 16, "depth": 1, "heads": 2, "num_steps": 4}
    config.policies = {name: policy(demonstrations(16, 8), 4, share, **size) for name, share in SHARES.items()}
    config.policies.constant.train.steps, config.policies.mixed.ema = 0, {}
    config.policies.mixed.optimizer = call("training.optimizers.sgd")
    config.slow, config.jump, config.push_t.episodes = None, None, 0
    return config


def paper() -> ConfigDict:
    """The released settings: N = 100, cosine, T_p = 20, T_o = 2, T_a = 8, so h = 2, batches of 256.

    The network is a transformer with a token for each action in place of their 1-D U-Net; the number of steps and the
    learning rate are of Diffusion Policy's order.
    """
    config = policy(push_t(episodes=200, chunk=20), 500_000, 0.8, chunk=8, past=1, num_steps=100, width=256, depth=8)
    config.model.network.modalities = (1,)
    config.train.batch_size = 256
    config.process = call("processes.vp_cosine", num_steps=100)
    rate = call("training.optimizers.cosine", peak=1e-4, total_steps=config.train.steps, warmup_steps=500)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=1e-6)
    return config
