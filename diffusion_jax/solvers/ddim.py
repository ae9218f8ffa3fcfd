"""One-step Gaussian solvers of first order: DDIM, DDPM and the Euler methods, which are the same steps by other names.

    x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z,        z ~ N(0, I)                                        (1)

is the step of a non-Markovian chain whose marginals are those of the process, whatever the deviation s (Song et al.
2021, equation 12, for any alpha and sigma). Consistency samplers are in `consistency`, higher orders in other modules.
"""

import jax.numpy as jnp

from diffusion_jax.errors import invalid, unknown
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.randomness import normal_like
from diffusion_jax.solvers.base import hub_step, per_modality, shrinkage, stateless
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Solver

VARIANCES = ("small", "large")


def _one_step(name, order, noisy, update):
    """A solver that evaluates once and applies `update(process, x, x0, eps, noise, t, t_next)` to each modality."""

    def step(process, denoise, carry, state, x, step, key):
        prediction, carry = denoise(carry, x, step)
        noise = normal_like(key, x) if noisy else x
        x = per_modality(update, process, x, prediction.x0, prediction.eps, noise, step.t, step.t_next)
        return x, state, carry

    return Solver(stateless(name), step, order=order)


def ddim(eta: float = 0.0) -> Solver:
    """Equation (1) with eta times the standard deviation of the posterior q(x' | x_t, x0):

        s = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2).

    eta = 0 is DDIM, deterministic: at a frozen prediction it is the exact flow of every Gaussian process. eta = 1 is
    ancestral sampling, DDPM with the small variance. One evaluation a step; steps that rise (inversion) need eta = 0.
    Raises InvalidInput unless 0 <= eta <= 1. Song et al. 2021, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise invalid("eta", eta, "it must lie in [0, 1]: 0 is deterministic, 1 ancestral")

    def update(process, x, x0, eps, noise, t, t_next):
        if not eta:
            return hub_step(process, x0, eps, t_next)
        sigma = process.sigma(t_next)
        kept = shrinkage(process, t, t_next) ** 2
        deviation = eta * sigma * safe_sqrt(jnp.clip(1.0 - kept, 0.0))
        # sqrt(sigma'^2 - s^2) without its cancellation.
        share = 1.0 - eta**2 * (1.0 - jnp.minimum(kept, 1.0)) if eta < 1 else kept
        direction = sigma * safe_sqrt(share)
        mean = expand(process.alpha(t_next), x) * x0 + expand(direction, x) * eps
        return mean + expand(deviation, x) * noise

    return _one_step("ddim", 1, bool(eta), update)


def ddpm(variance: str = "small", noise_at_end: bool = False) -> Solver:
    """Ancestral sampling: the mean of the posterior q(x' | x_t, x0) plus noise of one of two variances.

        mean  = alpha' x0 + (alpha sigma'^2 / (alpha' sigma)) eps
        small = sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2)        the posterior's, exact for a single x0
        large = sigma^2 - (alpha / alpha')^2 sigma'^2                   the forward step's, exact for x0 ~ N(0, I)

    No noise is added in a step that ends at sigma = 0. One evaluation per step. Ho et al. 2020, section 3.2.
    noise_at_end: with the large variance, adds its noise there too unless the step begins at the first index of a
        discrete process: what diffusers does where a run stops above index 0 (spacing 'trailing').
    Raises InvalidInput for another variance.
    """
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)

    def update(process, x, x0, eps, noise, t, t_next):
        ratio, sigma = shrinkage(process, t, t_next), process.sigma(t_next)
        if variance == "small":
            added = sigma**2 * (1.0 - ratio**2)
        else:
            alpha, start = process.alpha(t_next), process.sigma(t)
            # Both are 0 only where nothing moves.
            alpha, level = jnp.where(alpha == 0, 1.0, alpha), jnp.where(start == 0, 1.0, start)
            added = start**2 * (1.0 - (process.alpha(t) * sigma / alpha) ** 2 / level**2)
            quiet = sigma == 0
            if noise_at_end:
                quiet = quiet & (getattr(process.schedule, "num_steps", jnp.inf) * t <= 1.5)
            added = jnp.where(quiet, 0.0, added)
        mean = expand(process.alpha(t_next), x) * x0 + expand(ratio * sigma, x) * eps
        return mean + expand(safe_sqrt(jnp.clip(added, 0.0)), x) * noise

    return _one_step("ddpm", 1, True, update)


def euler() -> Solver:
    """Euler's method for `dy/d(sigma/alpha) = eps` with `y = x / alpha` (Karras et al. 2022).

    k-diffusion's `sample_euler`. Exactly DDIM: both freeze the pair over the step. For Euler in t see `flow_euler`.
    """
    return ddim()


def euler_ancestral(eta: float = 1.0) -> Solver:
    """Euler down to `sigma_down`, then fresh noise `sigma_up` (k-diffusion `sample_euler_ancestral`), for any process.

        sigma_up^2 = eta^2 sigma'^2 (sigma^2 - sigma'^2) / sigma^2,  sigma_down^2 = sigma'^2 - sigma_up^2

    with sigma short for sigma / alpha; this is equation (1) with DDIM's deviation: `ddim(eta)`.
    """
    return ddim(eta)
