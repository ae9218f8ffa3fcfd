"""Second-order methods in sigma / alpha: Heun, DPM-2 and the churned sampler of EDM (Karras et al. 2022).

With `y = x / alpha` every Gaussian process has `dy / d(sigma / alpha) = eps`, which is EDM's equation 4. Steps that end
at sigma' = 0 take no second evaluation (algorithm 1, line 6), nor do steps from alpha = 0, where y is infinite.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import evaluate_if, half_log_snr, hub_step, per_modality, sigma_hat, stateless
from diffusion_jax.time_axes import expand, where
from diffusion_jax.typing import Solver


def _heun(process, denoise, carry, x, step):
    answer, carry = denoise(carry, x, step)

    def refinable(process, x, t, t_next):
        return (t != t_next) & (process.sigma(t_next) != 0) & (process.alpha(t) != 0) & (process.alpha(t_next) != 0)

    def euler(process, x, x0, eps, t_next):
        return hub_step(process, x0, eps, t_next)

    needed = per_modality(refinable, process, x, step.t, step.t_next)
    guess = per_modality(euler, process, x, answer.x0, answer.eps, step.t_next)
    second, carry = evaluate_if(needed, denoise, carry, guess, step._replace(t=step.t_next), answer)

    def average(process, guess, eps, second, needed, t, t_next):
        gap = jnp.where(needed, sigma_hat(process, t_next) - sigma_hat(process, t), 0.0)
        return guess + expand(0.5 * process.alpha(t_next) * gap, guess) * (second - eps)

    return per_modality(average, process, guess, answer.eps, second.eps, needed, step.t, step.t_next), carry


def heun() -> Solver:
    """Heun's method in sigma / alpha: `y' = y + (s' - s) (eps(y, s) + eps(y_euler, s')) / 2` (EDM, algorithm 1).

    Two evaluations a step, one in a step that ends at sigma' = 0 or starts at alpha = 0. One step is `ddim`.
    """

    def step(process, denoise, carry, state, x, step, key):
        x, carry = _heun(process, denoise, carry, x, step)
        return x, state, carry

    return Solver(stateless("heun"), step, order=2)


class _Target(NamedTuple):
    """Where the deterministic part of a step of `kdpm2` ends, prefix-shaped.

    level: sigma / alpha there. gap: how far it is where there is a middle, else 0. added: deviation of the noise there.
    """

    level: Any
    gap: Any
    added: Any


def kdpm2(ancestral: bool = False) -> Solver:
    """DPM-2 of k-diffusion: the midpoint method in sigma / alpha, its middle halfway in the logarithm.

        y' = y + (s' - s) eps(y_m, s_m),  y_m = y + (s_m - s) eps(y, s),  s_m = sqrt(s s')

    with s short for sigma / alpha. ancestral: to `sigma_down` instead of s', then fresh noise, as `euler_ancestral`.
    Two evaluations a step, one in a step that ends at sigma' = 0 or starts at alpha = 0, which is then `euler`.
    """

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if ancestral else x

        def target(process, x, t, t_next):
            start = sigma_hat(process, t)
            # Where alpha' = 0 nothing moves: any finite number.
            end = jnp.where(process.alpha(t_next) == 0, 1.0, sigma_hat(process, t_next))
            added = jnp.zeros_like(end)
            if ancestral:
                ratio = jnp.where(jnp.isfinite(start) & (start > 0), end / jnp.where(start > 0, start, 1.0), 0.0)
                end, added = end * jnp.minimum(ratio, 1.0), end * safe_sqrt(jnp.clip(1.0 - ratio**2, 0.0))
            usable = (t != t_next) & jnp.isfinite(start) & (end > 0) & (process.alpha(t_next) != 0)
            return _Target(end, jnp.where(usable, end - start, 0.0), added), usable

        def middle(process, x, answer, t, target, usable):
            end = target.level
            level = jnp.where(usable, -half_log_snr(process, t) + jnp.log(jnp.where(usable, end, 1.0)), 0.0)
            time = jnp.where(usable, process.inverse_log_snr(-level), t).astype(jnp.result_type(t))
            return hub_step(process, answer.x0, answer.eps, time), time

        def finish(process, x, answer, second, noise, t_next, target):
            (x0, eps), (end, gap, added) = answer[:2], target
            alpha = expand(process.alpha(t_next), x)
            # y = x0 + s eps: first order goes to `end` with the pair itself, second order with eps of the middle.
            moved = alpha * (x0 + expand(end, x) * eps + expand(gap, x) * (second.eps - eps))
            plain = hub_step(process, x0, eps, t_next)
            return where(process.alpha(t_next) != 0, moved + alpha * expand(added, x) * noise, plain)

        end, usable = per_modality(target, process, x, step.t, step.t_next)
        guess, time = per_modality(middle, process, x, answer, step.t, end, usable)
        second, carry = evaluate_if(usable, denoise, carry, guess, step._replace(t=time), answer)
        return per_modality(finish, process, x, answer, second, noise, step.t_next, end), state, carry

    return Solver(stateless("kdpm2"), step, order=1 if ancestral else 2)


def edm(s_churn: float = 40.0, s_tmin: float = 0.05, s_tmax: float = 50.0, s_noise: float = 1.003) -> Solver:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): noise is added before each Heun step.

        gamma = min(s_churn / N, sqrt(2) - 1)  where s_tmin <= sigma / alpha <= s_tmax, else 0
        y_hat = y + s_noise sqrt((1 + gamma)^2 - 1) (sigma / alpha) z

    at the t, at most 1, where sigma / alpha is 1 + gamma times as large (found through the inverse log-SNR).
    s_churn = 0 is `heun`. s_tmin, s_tmax are in units of sigma / alpha. N counts the steps of the run.
    Raises InvalidInput for negative values or an empty interval.
    """
    for field, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        if value < 0:
            raise invalid(field, value, "it must not be negative")
    if s_tmax < s_tmin:
        raise invalid("s_tmax", s_tmax, f"it must be at least s_tmin, {s_tmin}")
    if s_churn == 0:
        return heun()

    def step(process, denoise, carry, state, x, step, key):
        noise = normal_like(key, x)

        def churn(process, x, noise, t, t_next):
            alpha, level = process.alpha(t), sigma_hat(process, t)
            churned = (t != t_next) & (level >= s_tmin) & (level <= s_tmax) & (level > 0) & jnp.isfinite(level)
            level = jnp.where(churned, level, 1.0)
            gamma = jnp.minimum(s_churn / step.num_steps, math.sqrt(2.0) - 1.0)
            raised = process.inverse_log_snr(-2.0 * jnp.log((1.0 + gamma) * level))
            time = jnp.where(churned, jnp.clip(raised, t, 1.0), t).astype(jnp.result_type(t))
            # The level at the time that was really found, so that clipping and rounding cost no accuracy.
            reached = sigma_hat(process, time)
            churned = churned & jnp.isfinite(reached)
            time = jnp.where(churned, time, t)
            added = safe_sqrt(jnp.clip(jnp.where(churned, reached, level) ** 2 - level**2, 0.0))
            scale = process.alpha(time) / jnp.where(alpha == 0, 1.0, alpha)
            noisy = expand(scale, x) * x + expand(process.alpha(time) * s_noise * added, x) * noise
            return where(churned, noisy, x), time

        x, t = per_modality(churn, process, x, noise, step.t, step.t_next)
        x, carry = _heun(process, denoise, carry, x, step._replace(t=t))
        return x, state, carry

    return Solver(stateless("edm"), step, order=1)
