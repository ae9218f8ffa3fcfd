"""A choice of times whose best answer is known: coarse samples of two qualities, of exact Gaussians."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.clock import single_step
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.models import chooser
from diffusion_jax.objectives import expected_leap_error, time_policy
from diffusion_jax.processes import rectified_flow
from diffusion_jax.training import train_on_draws
from diffusion_jax.training.optimizers import adamw


def bandit(config: dict[str, Any], key: Any) -> tuple[Any, Any, Any]:
    """Shares of the policy on the best time of each quality, and how much of the gap between the best time for all and
    the best for each its rewards close (`expected_leap_error`)."""
    process, size, u = rectified_flow(), config["size"], np.asarray(config["noise"])
    times, exact = np.sqrt(u) / (1 + np.sqrt(u)), analytic(process)
    world, qualities = gaussian_mixture(np.zeros((1, size), np.float32)), np.asarray(config["qualities"])
    policy = chooser(len(u), width=32, depth=2)

    def reward(params, batch, t, key):
        x_t, _ = process.corrupt(jax.random.split(key, config["batch"]), batch["base"], t)
        said, _ = exact.apply(world, (), x_t, single_step(t), None)
        return -jnp.mean(jnp.square(said.x0 - batch["x0"]), axis=1)

    def batch_of(key, count):
        x0, error = jax.random.normal(key, (2, count, size))
        base = x0 + jnp.sqrt(qualities[np.arange(count) % 2])[:, None] * error
        return {"x0": x0, "base": base, "squares": jnp.square(base)}

    objective = time_policy(policy, times, reward, context="squares", draws=config["draws"], entropy=config["entropy"])
    params = policy.init(key, np.zeros((1, size), np.float32))
    optimizer, draw = adamw(config["rate"]), partial(batch_of, count=config["batch"])
    params = train_on_draws(objective, optimizer, params, draw, config["steps"], key)
    curve = expected_leap_error(u, qualities[:, None])
    logits = policy.apply(params, batch_of(jax.random.fold_in(key, 1), 2000)["squares"])
    share = jnp.stack([jax.nn.softmax(logits[i::2]).mean(0) for i in range(2)])
    best, fixed = curve.min(1).mean(), curve.mean(0).min()
    gain = (fixed - (share * curve).sum(1).mean()) / (fixed - best)
    return share[0, curve[0].argmin()], share[1, curve[1].argmin()], gain
