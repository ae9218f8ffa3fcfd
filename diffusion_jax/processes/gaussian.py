"""Gaussian processes: data becomes noise along `x_t = alpha(t) x0 + sigma(t) eps`, `eps ~ N(0, I)`.

A process is a schedule (what alpha and sigma are), a parameterisation (what the network predicts) and what the
network is fed for t. Every parameterisation is a linear combination of the pair (x0, eps),

    scale(t) * output = c_x0(t) * x0 + c_eps(t) * eps,                                                        (1)

so together with `x_t = alpha x0 + sigma eps` each is turned into the pair by the same 2 x 2 solve, and back by (1):

    x0  = (sigma * scale * output - c_eps * x_t) / D,      D = c_x0 * sigma - c_eps * alpha
    eps = (c_x0 * x_t - alpha * scale * output) / D                                                           (2)

Where D = 0 the output does not determine one half of the pair. The other half is returned, with 0 for the unknown one:
at sigma = 0 the pair is (x_t / alpha, 0), at alpha = 0 it is (0, x_t / sigma). Nothing is infinite or NaN at t = 0, so
clean entries (frames, tokens) can share a batch with noisy ones: the score is 0 where there is no noise, and a rate
that would be infinite at an end (sigma' of most VP schedules at 0) is 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffusion_jax import randomness
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.processes.schedules import as_time, check_positive, check_time, safe_inverse
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Keys, Number, Prediction


class Schedule(Protocol):
    """alpha and sigma as functions of t in [0, 1], elementwise over any shape; log_snr = log(alpha^2 / sigma^2).

    Their derivatives should be finite in all of [0, 1], else those of a run with respect to its grid are not: see
    `schedules.safe_log` and `safe_sqrt`.
    """

    def alpha(self, t: ArrayLike) -> Array: ...

    def sigma(self, t: ArrayLike) -> Array: ...

    def log_snr(self, t: ArrayLike) -> Array: ...

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array: ...


def _x0(process, t):
    return jnp.ones_like(t), jnp.zeros_like(t), jnp.ones_like(t)


def _epsilon(process, t):
    return jnp.zeros_like(t), jnp.ones_like(t), jnp.ones_like(t)


def _v(process, t):
    return -process.sigma(t), process.alpha(t), jnp.ones_like(t)


def _velocity(process, t):
    alpha_rate, sigma_rate = process.rates(t)
    return alpha_rate, sigma_rate, jnp.ones_like(t)


def _score(process, t):
    return jnp.zeros_like(t), -jnp.ones_like(t), process.sigma(t)


def _edm(process, t):
    # F = (x0 - c_skip x) / c_out of Karras et al., written so that it is regular at both ends.
    alpha, sigma = process.alpha(t), process.sigma(t)
    total = jnp.hypot(sigma, alpha * process.sigma_data)
    return sigma / (process.sigma_data * total), -alpha * process.sigma_data / total, jnp.ones_like(total)


def _edm_v(process, t):
    c_x0, c_eps, scale = _edm(process, t)
    return -c_x0, -c_eps, scale


PARAMETERIZATIONS: dict[str, Callable] = {
    "x0": _x0,
    "epsilon": _epsilon,
    "v": _v,
    "velocity": _velocity,
    "score": _score,
    "edm": _edm,
    "edm_v": _edm_v,
}
"""What a network may predict: functions (process, t) -> (c_x0, c_eps, scale) of equation (1).

`v` is `alpha eps - sigma x0` (Salimans & Ho 2022, app. D); `velocity` is `dx_t/dt` at a fixed pair (Lipman et al.
2023); `edm` is the preconditioned network F of Karras et al. 2022, equation 7, and `edm_v` its negative, which is v
where sigma_data is 1 (Stable Audio).
"""


def _finite_log_snr(process, t):
    return jnp.clip(process.log_snr(t), -40.0, 40.0)


def _index(process, t):
    return jnp.maximum(process.schedule.position(t) - 1.0, 0.0)


def _floor(value):
    # A value that the rounding of t and of a product left just below an integer is that integer; 999.999 is 999.
    return jnp.floor(value + 2 * jnp.finfo(value.dtype).eps * jnp.abs(value))


NETWORK_TIMES: dict[str, Callable] = {
    "t": lambda process, t: t,
    "1000t": lambda process, t: 1000.0 * t,
    "index": _index,
    "nearest_index": lambda process, t: jnp.round(_index(process, t)),
    "floor_index": lambda process, t: _floor(_index(process, t)),
    "floor_1000t": lambda process, t: _floor(1000.0 * t),
    "sigma": lambda process, t: process.sigma(t),
    "1000sigma": lambda process, t: 1000.0 * process.sigma(t),
    "log_sigma": lambda process, t: -0.125 * _finite_log_snr(process, t),
    "angle": lambda process, t: 2.0 / jnp.pi * jnp.arctan2(process.sigma(t), process.alpha(t)),
    "log_snr": lambda process, t: _finite_log_snr(process, t),
}
"""What a network may be fed for t. `index` is k at t = (k + 1) / T; `log_sigma` is EDM's c_noise,
`log(sigma / alpha) / 4`. `nearest_index`, `floor_index` and `floor_1000t` are integers between nodes too, which some
samplers of diffusers feed their networks; `angle` is that of (alpha, sigma), 1 at alpha = 0.

The logarithms are those of a log-SNR clipped to [-40, 40]: at the ends they would be infinite.
"""


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
    """A noise schedule together with what the network predicts and is fed.

    schedule: alpha(t), sigma(t), log_snr(t), inverse_log_snr(l); see `processes.schedules`.
    prediction: a key of `PARAMETERIZATIONS`.
    time: what the network is fed for t, a key of `NETWORK_TIMES`.
    sigma_data: standard deviation of the data, used by the `edm` parameterisation.
    """

    schedule: Any
    prediction: str = "v"
    time: str = "1000t"
    sigma_data: Number = 0.5
    kind = "gaussian"

    def __post_init__(self):
        if self.prediction not in PARAMETERIZATIONS:
            raise unknown("prediction", self.prediction, PARAMETERIZATIONS)
        if self.time not in NETWORK_TIMES:
            raise unknown("time", self.time, NETWORK_TIMES)
        if self.time.endswith("index") and not hasattr(self.schedule, "position"):
            raise invalid("time", self.time, "it needs a schedule with discrete steps; use '1000t' or 't'")
        check_positive(sigma_data=self.sigma_data)
        for name in ("alpha", "sigma", "log_snr", "inverse_log_snr"):
            if not callable(getattr(self.schedule, name, None)):
                raise invalid("schedule", self.schedule, f"a schedule must have the method {name}")

    def alpha(self, t: ArrayLike) -> Array:
        """alpha(t), any shape; exactly 1 at t = 0. Raises InvalidInput for a known t outside of [0, 1]."""
        check_time(t)
        return self.schedule.alpha(as_time(t))

    def sigma(self, t: ArrayLike) -> Array:
        """sigma(t), any shape; exactly 0 at t = 0. Raises InvalidInput for a known t outside of [0, 1]."""
        check_time(t)
        return self.schedule.sigma(as_time(t))

    def log_snr(self, t: ArrayLike) -> Array:
        """log(alpha^2 / sigma^2), any shape; falls with t from infinity at 0. Raises InvalidInput as `alpha` does."""
        check_time(t)
        return self.schedule.log_snr(as_time(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        """The t at which `log_snr(t)` is the given one; 1 where there is none, of more noise than t = 1 has."""
        return self.schedule.inverse_log_snr(as_time(log_snr))

    def rates(self, t):
        """d alpha / dt and d sigma / dt, any shape; 0 where infinite."""
        t = as_time(t)
        rates = (jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (self.schedule.alpha, self.schedule.sigma))
        return tuple(jnp.where(jnp.isfinite(rate), rate, 0.0) for rate in rates)

    def edm_scalings(self, t):
        """c_skip, c_out, sigma / alpha and c_in of Karras et al. 2022, table 1, for data seen as x_t / alpha.

        sigma / alpha is a very large number where alpha = 0.
        """
        alpha, sigma = self.alpha(t), self.sigma(t)
        sigma_hat = sigma * jnp.where(alpha == 0, 1.0 / jnp.finfo(alpha.dtype).tiny, safe_inverse(alpha))
        total = jnp.hypot(sigma, alpha * self.sigma_data)
        return (alpha * self.sigma_data / total) ** 2, sigma * (self.sigma_data / total), sigma_hat, alpha / total

    def coefficients(self, t):
        """c_x0, c_eps and scale of equation (1), of the shape of t."""
        return PARAMETERIZATIONS[self.prediction](self, t)

    def corrupt(self, key: Keys, x0, t):
        """`x_t = alpha x0 + sigma eps` with fresh `eps ~ N(0, I)`; returns `(x_t, eps)`."""
        if not jnp.issubdtype(x0.dtype, jnp.floating):
            raise invalid("x0.dtype", str(x0.dtype), "Gaussian noise needs floating-point data, images in [-1, 1]")
        noise = randomness.normal(key, x0.shape).astype(x0.dtype)
        return self.marginal(x0, noise, t), noise

    def marginal(self, x0, noise, t):
        """`x_t = alpha x0 + sigma noise` for a given noise."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def prior(self, key: Keys, shape):
        """Noise at t = 1: N(0, sigma(1)^2 I). `shape` includes the batch."""
        return randomness.normal(key, shape) * self.sigma(1.0)

    def network_input(self, x_t, t):
        """x_t, or `c_in x_t / alpha` for the `edm` parameterisations."""
        if self.prediction not in ("edm", "edm_v"):
            return x_t
        return expand(1.0 / jnp.hypot(self.sigma(t), self.alpha(t) * self.sigma_data), x_t) * x_t

    def network_time(self, t):
        """What the network is fed for t; see `NETWORK_TIMES`. Raises InvalidInput as `alpha` does."""
        check_time(t)
        return NETWORK_TIMES[self.time](self, as_time(t))

    def predict(self, network_output, x_t, t) -> Prediction:
        """The pair (x0, eps) from the network's output at (x_t, t): equation (2)."""
        t = as_time(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        c_x0, c_eps, scale = self.coefficients(t)
        determinant = c_x0 * sigma - c_eps * alpha
        singular = determinant == 0
        inverse = safe_inverse(determinant)
        # All divisions are of coefficients, before they meet the data: few, and rounded alike whatever t's shape.
        x0_of_output = jnp.where(singular, 0.0, sigma * scale * inverse)
        x0_of_x = jnp.where(singular, safe_inverse(alpha), -c_eps * inverse)
        eps_of_output = jnp.where(singular, 0.0, -alpha * scale * inverse)
        eps_of_x = jnp.where(singular, jnp.where(alpha == 0, safe_inverse(sigma), 0.0), c_x0 * inverse)
        x_t, output = x_t.astype(inverse.dtype), network_output.astype(inverse.dtype)
        return Prediction(
            expand(x0_of_output, x_t) * output + expand(x0_of_x, x_t) * x_t,
            expand(eps_of_output, x_t) * output + expand(eps_of_x, x_t) * x_t,
        )

    def target(self, x0, noise, t):
        """What the network's output is regressed to: equation (1) solved for the output; 0 where it is infinite."""
        c_x0, c_eps, scale = self.coefficients(as_time(t))
        inverse = safe_inverse(scale)
        return expand(c_x0 * inverse, x0) * x0 + expand(c_eps * inverse, x0) * noise

    def output(self, prediction: Prediction, t):
        """The network output that means `prediction`: inverse of `predict`, equation (1)."""
        return self.target(prediction.x0, prediction.eps, t)

    def from_x0(self, x0, x_t, t) -> Prediction:
        """The pair whose clean half is `x0`: `eps = (x_t - alpha x0) / sigma`, and 0 where sigma = 0."""
        return Prediction(x0, expand(safe_inverse(self.sigma(t)), x_t) * (x_t - expand(self.alpha(t), x_t) * x0))

    def from_eps(self, eps, x_t, t) -> Prediction:
        """The pair whose noise half is `eps`: `x0 = (x_t - sigma eps) / alpha`, and 0 where alpha = 0."""
        return Prediction(expand(safe_inverse(self.alpha(t)), x_t) * (x_t - expand(self.sigma(t), x_t) * eps), eps)

    def score(self, prediction: Prediction, t):
        """grad log p_t(x_t) = -eps / sigma; 0 where sigma = 0."""
        return expand(-safe_inverse(self.sigma(t)), prediction.eps) * prediction.eps

    def velocity(self, prediction: Prediction, t):
        """dx/dt of the probability-flow ODE: `alpha' x0 + sigma' eps`."""
        alpha_rate, sigma_rate = self.rates(t)
        return self._combine(alpha_rate, sigma_rate, prediction)

    def v(self, prediction: Prediction, t):
        """`alpha eps - sigma x0`."""
        return self._combine(-self.sigma(t), self.alpha(t), prediction)

    def _combine(self, c_x0, c_eps, prediction):
        return expand(c_x0, prediction.x0) * prediction.x0 + expand(c_eps, prediction.eps) * prediction.eps
