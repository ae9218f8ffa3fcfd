"""DDIM: the deterministic first-order step, and its stochastic family (Song et al. 2021, equation 12)."""

import jax.numpy as jnp

from diffusion_jax.randomness import normal_like
from diffusion_jax.time_axes import each, expand
from diffusion_jax.typing import Solver


def ddim(eta: float = 0.0) -> Solver:
    """`x_next = alpha_next x0 + sqrt(sigma_next^2 - s^2) eps + s noise`.

    `s = eta sqrt(sigma_next^2 / sigma^2 (1 - alpha^2 sigma_next^2 ... ))` is the standard deviation of the posterior
    q(x_next | x_t, x0) times eta: 0 is DDIM, 1 is ancestral sampling (DDPM with the small variance).
    """

    def init(process, x, grid):
        return ()

    def step(process, denoise, carry, state, x, step, key):
        prediction, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if eta else x

        def update(x, process, x0, eps, noise, t, t_next):
            alpha, sigma = process.alpha(t), process.sigma(t)
            alpha_next, sigma_next = process.alpha(t_next), process.sigma(t_next)
            if not eta:
                return expand(alpha_next, x) * x0 + expand(sigma_next, x) * eps
            # The share of the noise at t that was added after t_next.
            forward = 1.0 - jnp.square(alpha * sigma_next / (alpha_next * sigma))
            deviation = eta * sigma_next * jnp.sqrt(jnp.clip(forward, 0.0))
            direction = jnp.sqrt(jnp.clip(sigma_next**2 - deviation**2, 0.0))
            return expand(alpha_next, x) * x0 + expand(direction, x) * eps + expand(deviation, x) * noise

        processes = getattr(process, "processes", process)
        x = each(update, x, processes, prediction.x0, prediction.eps, noise, step.t, step.t_next)
        return x, state, carry

    return Solver(init, step, order=1)
