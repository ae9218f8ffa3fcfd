"""Loss weights as functions `(process, t) -> w`, the shape of t, for the squared error of the network's own output.

The loss is always `w |output - target|^2` with the target of the process's prediction. The literature states weights
for the error of x0 or of eps; both are the error of the output times a known factor, because at a fixed x_t the hub
pair is linear in the output (`processes.gaussian`, equation 2, with its c_x0, c_eps, scale and D):

    x0 - x0_hat = (sigma scale / D) (output - output_hat),   eps - eps_hat = -(alpha scale / D) (output - output_hat)

so one quantity u(t) says the same weight for every prediction:

    w_x0 sigma^2 = w_eps alpha^2 = u,    w = u (scale / D)^2                                                     (1)

Each weight here is written down as its u, which is finite at both ends where w_x0 or w_eps is not. SNR is
alpha^2 / sigma^2. Weights of draws (importance) multiply these.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes import is_gaussian
from diffusion_jax.processes.schedules import as_time, at_least, at_most, check_positive, check_time
from diffusion_jax.timesteps.grids import grid_weights, scalar_times
from diffusion_jax.typing import Number, Numbers, Times

Weight = Callable[[Any, Any], Any]


def _weight(function: Callable[..., Any]) -> Weight:
    """The weight with `u = function(process, t, alpha, sigma)`: equation (1).

    The ends are kept away from by 1e-6, so that what is next to them is returned where equation (1) is 0 / 0, or holds
    an infinite rate. A known t outside of [0, 1] is refused.
    """

    def weight(process, t):
        if not is_gaussian(process):
            raise InvalidInput(f"weights are for Gaussian processes, but this one is {type(process).__name__}.")
        check_time(t)
        t = at_most(at_least(as_time(t), 1e-6), 1.0 - 1e-6)
        alpha, sigma = process.alpha(t), process.sigma(t)
        c_x0, c_eps, scale = process.coefficients(t)
        determinant = c_x0 * sigma - c_eps * alpha
        return function(process, t, alpha, sigma) * jnp.square(scale / determinant)

    return weight


def unit_weight() -> Weight:
    """1 on the error of the output, whatever it is."""
    return lambda process, t: jnp.ones_like(as_time(t))


def low_noise_weight(floor: Number = 0.05) -> Weight:
    """`min(1, sigma^2 / floor)` on the error of the output: 1, but at low noise.

    There a target that leads from a degraded input back to the data grows as 1 / sigma (`objectives.degraded`). On the
    error of x0, v of a VP process then counts 1 / max(sigma^2, floor).
    """
    check_positive(floor=floor)
    return lambda process, t: at_most(jnp.square(process.sigma(t)) / floor, 1.0)


def x0_weight() -> Weight:
    """1 on the error of x0: `u = sigma^2`."""
    return _weight(lambda process, t, alpha, sigma: sigma**2)


def epsilon_weight() -> Weight:
    """1 on the error of eps (Ho et al. 2020, "simple"), which is SNR on that of x0: `u = alpha^2`."""
    return _weight(lambda process, t, alpha, sigma: alpha**2)


def v_weight() -> Weight:
    """1 on the error of v, SNR + 1 on that of x0 for VP (Salimans & Ho 2022): `u = (alpha^2 + sigma^2)^2`."""
    return _weight(lambda process, t, alpha, sigma: (alpha**2 + sigma**2) ** 2)


def min_snr_weight(gamma: Number = 5.0) -> Weight:
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023): `u = min(alpha^2, gamma sigma^2)`."""
    check_positive(gamma=gamma)
    return _weight(lambda process, t, alpha, sigma: jnp.minimum(alpha**2, gamma * sigma**2))


def soft_min_snr_weight(gamma: Number = 5.0) -> Weight:
    """SNR gamma / (SNR + gamma) on the error of x0 (Crowson et al. 2024, HDiT, there gamma is 1 / sigma_data^2)."""
    check_positive(gamma=gamma)
    return _weight(lambda process, t, alpha, sigma: alpha**2 / (alpha**2 / (gamma * sigma**2) + 1.0))


def p2_weight(gamma: Number = 1.0, k: Number = 1.0) -> Weight:
    """(k + SNR)^-gamma on the error of eps (Choi et al. 2022): `u = alpha^2 (k + SNR)^-gamma`."""
    check_positive(gamma=gamma, k=k)
    return _weight(lambda process, t, alpha, sigma: alpha**2 * (k + (alpha / sigma) ** 2) ** -gamma)


def _log_snr_rate(process, t, alpha, sigma):
    alpha_rate, sigma_rate = process.rates(t)
    return 2.0 * (sigma_rate / sigma - alpha_rate / alpha)


def sigmoid_weight(bias: Number = -1.0) -> Weight:
    """sigmoid(bias - log_snr) on the error of eps, integrated over log-SNR (Kingma & Gao 2023; Hoogeboom et al. 2024).

    t being uniform, that is `w_eps = -(d log_snr / dt) sigmoid(bias - log_snr)`.
    """
    if not math.isfinite(bias):
        raise invalid("bias", bias, "a finite number was expected")

    def u(process, t, alpha, sigma):
        gate = jax.nn.sigmoid(bias - 2.0 * jnp.log(alpha / sigma))
        return alpha**2 * gate * _log_snr_rate(process, t, alpha, sigma)

    return _weight(u)


def elbo_weight() -> Weight:
    """`-(d log_snr / dt) / 2` on the error of eps: the negative ELBO in nats, up to a constant (Kingma et al. 2021)."""
    return _weight(lambda process, t, alpha, sigma: 0.5 * alpha**2 * _log_snr_rate(process, t, alpha, sigma))


def edm_weight(sigma_data: Number | None = None) -> Weight:
    """`(s^2 + sigma_data^2) / (s sigma_data)^2` on the error of x0, s = sigma / alpha (Karras et al. 2022).

    `u = alpha^2 + (sigma / sigma_data)^2`, which is 1 on the output of the `edm` prediction.
    sigma_data: the process's own unless given.
    """
    if sigma_data is not None:
        check_positive(sigma_data=sigma_data)

    def u(process, t, alpha, sigma):
        return alpha**2 + jnp.square(sigma / (process.sigma_data if sigma_data is None else sigma_data))

    return _weight(u)


def grid_weight(grid: Times, weights: Numbers) -> Weight:
    """A loss weight `(process, t) -> weights_i / mean(weights)` of the entry of a grid `[S + 1]` nearest to t.

    With uniform times of the grid it has the expectation that draws `by_weights` have without a uniform share.
    Raises InvalidInput as `by_weights` does.
    """
    times, values = scalar_times(grid)[:-1], grid_weights(grid, weights)
    values = jnp.asarray(values / values.mean(), jnp.float32)
    return lambda process, t: values[jnp.argmin(jnp.abs(times - jnp.asarray(t)[..., None]), axis=-1)]
