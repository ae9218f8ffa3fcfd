"""Samplers of consistency models, whose x0 is already the end of the trajectory: LCM and TCD.

The boundary condition of a consistency model is part of its prediction, so nothing of it is needed here.
"""

import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import hub_step, per_modality, stateless
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Solver


def lcm() -> Solver:
    """Multistep consistency sampling: `x' = alpha' x0 + sigma' z` with fresh noise z.

    One evaluation a step; the last one, to sigma = 0, returns x0. Song et al. 2023, algorithm 1; Luo et al. 2023.
    """
    return _strategic("lcm", 1.0)


def tcd(gamma: float = 0.3, num_train_steps: int | None = None) -> Solver:
    """Strategic stochastic sampling: a deterministic step to `s = (1 - gamma) t'`, then forward noise from s to t'.

        x_s = alpha_s x0 + sigma_s eps
        x'  = (alpha' / alpha_s) x_s + sqrt(sigma'^2 - (alpha' sigma_s / alpha_s)^2) z

    gamma = 0 is DDIM, gamma = 1 is `lcm`. One evaluation a step. Zheng et al. 2024, equation 12.
    num_train_steps: T of a discrete process whose index k stands for t = (k + 1) / T: s is then the index
        `floor((1 - gamma) k')` of TCD's authors, instead of a time.
    Raises InvalidInput unless 0 <= gamma <= 1.
    """
    if not 0 <= gamma <= 1:
        raise invalid("gamma", gamma, "it must lie in [0, 1]: 0 is deterministic, 1 renews all noise")
    return _strategic("tcd", gamma, num_train_steps)


def _strategic_time(t_next, gamma, num_train_steps):
    if num_train_steps is None:
        return (1.0 - gamma) * t_next
    index = jnp.round(num_train_steps * t_next) - 1.0
    # A product that round-off left just below an integer is that integer.
    strategic = (jnp.floor((1.0 - gamma) * index + 1e-4) + 1.0) / num_train_steps
    return jnp.where(index < 0, 0.0, strategic).astype(t_next.dtype)


def _strategic(name, gamma, num_train_steps=None):
    def step(process, denoise, carry, state, x, step, key):
        prediction, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if gamma else x

        def update(process, x, x0, eps, noise, t, t_next):
            if not gamma:
                return hub_step(process, x0, eps, t_next)
            s = _strategic_time(t_next, gamma, num_train_steps)
            alpha, sigma = process.alpha(t_next), process.sigma(t_next)
            kept = alpha / process.alpha(s) * process.sigma(s)
            fresh = safe_sqrt(jnp.clip(sigma**2 - kept**2, 0.0))
            return expand(alpha, x) * x0 + expand(kept, x) * eps + expand(fresh, x) * noise

        x = per_modality(update, process, x, prediction.x0, prediction.eps, noise, step.t, step.t_next)
        return x, state, carry

    return Solver(stateless(name), step, order=1)
