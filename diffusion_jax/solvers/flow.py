"""Solvers in t itself, on the velocity `dx/dt = alpha' x0 + sigma' eps`: Euler, Heun, midpoint, and the SDE form.

The natural choice for flow matching, where the velocity is what the network predicts; they work for every Gaussian
process whose alpha and sigma have finite rates at the times of the grid.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import evaluate_if, per_modality, stateless
from diffusion_jax.time_axes import expand, where
from diffusion_jax.typing import Number, Prediction, Solver

DIFFUSIONS = {
    "sigma": lambda alpha, sigma: sigma,
    "odds": lambda alpha, sigma: sigma / jnp.where(alpha == 0, jnp.inf, alpha),
    "sine": lambda alpha, sigma: 2.0 * (alpha * sigma) ** 2 / jnp.maximum(alpha**2 + sigma**2, 1e-12),
}
"""w^2 / noise^2 of `flow_sde` as functions of alpha and sigma; `odds` is Flow-GRPO's t / (1 - t), 0 at alpha = 0."""


def velocity(process: Any, x0: Any, eps: Any, t: Array | float) -> Array:
    """`alpha' x0 + sigma' eps`, one modality."""
    return process.velocity(Prediction(x0, eps), t)


def flow_euler() -> Solver:
    """`x' = x + (t' - t) v(x, t)`: Euler in t; for rectified flow the same step as `ddim`. One evaluation a step."""

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        return per_modality(_euler, process, x, answer.x0, answer.eps, step.t, step.t_next), state, carry

    return Solver(stateless("flow_euler"), step, order=1)


def _euler(process, x, x0, eps, t, t_next):
    return x + expand(t_next - t, x) * velocity(process, x0, eps, t)


def flow_heun() -> Solver:
    """`x' = x + (t' - t) (v(x, t) + v(x_euler, t')) / 2`. Two evaluations a step.

    One in a step that ends at sigma' = 0, which is an Euler step.
    """

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        guess = per_modality(_euler, process, x, answer.x0, answer.eps, step.t, step.t_next)
        needed = per_modality(
            lambda process, x, t, t_next: (t != t_next) & (process.sigma(t_next) != 0), process, x, step.t, step.t_next
        )
        second, carry = evaluate_if(needed, denoise, carry, guess, step._replace(t=step.t_next), answer)

        def average(process, guess, answer, second, needed, t, t_next):
            change = process.velocity(second, t_next) - process.velocity(answer, t)
            return where(needed, guess + expand(0.5 * (t_next - t), guess) * change, guess)

        return per_modality(average, process, guess, answer, second, needed, step.t, step.t_next), state, carry

    return Solver(stateless("flow_heun"), step, order=2)


def flow_midpoint() -> Solver:
    """`x' = x + (t' - t) v(x_half, (t + t') / 2)`. Two evaluations a step."""

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        middle = jax.tree.map(lambda a, b: 0.5 * (a + b), step.t, step.t_next)
        needed = jax.tree.map(lambda a, b: a != b, step.t, step.t_next)
        half = per_modality(_euler, process, x, answer.x0, answer.eps, step.t, middle)
        second, carry = evaluate_if(needed, denoise, carry, half, step._replace(t=middle), answer)

        def whole(process, x, x0, eps, t, middle, t_next):
            return x + expand(t_next - t, x) * velocity(process, x0, eps, middle)

        x = per_modality(whole, process, x, second.x0, second.eps, step.t, middle, step.t_next)
        return x, state, carry

    return Solver(stateless("flow_midpoint"), step, order=2)


def flow_sde(noise: float = 1.0, diffusion: str = "sigma") -> Solver:
    """The SDE with the flow's marginals and diffusion w (Ma et al. 2024, SiT, equation 6), by Euler-Maruyama:

        x' = x + (t' - t) v + (t - t') w^2 / 2 score + w sqrt(t - t') z,    score = -eps / sigma,  w^2 = noise^2 g

    diffusion: g is 'sigma', 'odds' (sigma / alpha; Flow-GRPO's t / (1 - t)) or 'sine' (vanishes at both ends).
    noise = 0 is `flow_euler`. No noise where the step ends at sigma' = 0. One evaluation a step; grids must decrease.
    Raises InvalidInput for a negative noise or another diffusion.
    """
    if noise < 0:
        raise invalid("noise", noise, "it must not be negative; 0 is deterministic")
    if diffusion not in DIFFUSIONS:
        raise unknown("diffusion", diffusion, DIFFUSIONS)
    if noise == 0:
        return flow_euler()

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        x = per_modality(_maruyama, process, x, answer.x0, answer.eps, normal_like(key, x), step.t, step.t_next)
        return x, state, carry

    def _maruyama(process, x, x0, eps, z, t, t_next):
        mean, deviation = flow_sde_moments(process, x, Prediction(x0, eps), t, t_next, noise, diffusion)
        return mean + expand(deviation, x) * z

    return Solver(stateless("flow_sde"), step, order=1)


def flow_sde_moments(
    process: Any,
    x: Array,
    prediction: Prediction,
    t: Array | float,
    t_next: Array | float,
    noise: Number = 1.0,
    diffusion: str = "sigma",
) -> tuple[Array, Array]:
    """Mean (like x) and standard deviation (like t) of a `flow_sde` step: what policy gradients need of it."""
    sigma = process.sigma(t)
    squared = noise**2 * DIFFUSIONS[diffusion](process.alpha(t), sigma)
    squared = jnp.where((process.sigma(t_next) == 0) | (sigma == 0), 0.0, squared)
    length = t - t_next
    pull = -0.5 * length * squared / jnp.where(sigma == 0, 1.0, sigma)
    mean = _euler(process, x, prediction.x0, prediction.eps, t, t_next) + expand(pull, x) * prediction.eps
    return mean, safe_sqrt(jnp.clip(squared * length, 0.0))
