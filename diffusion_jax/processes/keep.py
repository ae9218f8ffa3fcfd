"""Schedules of discrete processes: the probability alpha(t) that a token has been kept until t.

`alpha` and `sigma = 1 - alpha` (the probability of having been lost) are both accurate at both ends; alpha(0) = 1
exactly. `log_snr = log(alpha / sigma)`. Gaussian schedules are in `schedules`.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffusion_jax.errors import invalid
from diffusion_jax.processes.schedules import as_time, at_most, check_positive, safe_log, safe_sqrt
from diffusion_jax.typing import Number


class _Keep(abc.ABC):
    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> Array: ...

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> Array: ...

    def log_snr(self, t: ArrayLike) -> Array:
        """log(alpha / (1 - alpha)), infinite at t = 0."""
        return safe_log(self.alpha(t)) - safe_log(self.sigma(t))


def _power(value, exponent):
    """`value ** exponent`; its derivative at 0, where it may be infinite, is 0."""
    if exponent == 1:
        return value
    zero = value == 0
    return jnp.where(zero, 0.0, jnp.where(zero, 1.0, value) ** exponent)


@dataclasses.dataclass(frozen=True)
class KeepPolynomial(_Keep):
    """`alpha = 1 - (1 - eps) t^power`: linear for power 1 (Sahoo et al. 2024, Shi et al. 2024).

    `eps = 1e-3` with power 1 is the log-linear noise of SEDD (Lou et al. 2024).
    """

    power: Number = 1.0
    eps: Number = 0.0

    def __post_init__(self):
        check_positive(power=self.power)
        if not 0 <= self.eps < 1:
            raise invalid("eps", self.eps, "it must lie in [0, 1)")

    def _powered(self, t):
        return _power(as_time(t), self.power)

    def alpha(self, t: ArrayLike) -> Array:
        return 1.0 - (1.0 - self.eps) * self._powered(t)

    def sigma(self, t: ArrayLike) -> Array:
        return (1.0 - self.eps) * self._powered(t)

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        lost = jax.nn.sigmoid(-as_time(log_snr)) / (1.0 - self.eps)
        return _power(at_most(lost, 1.0), 1.0 / self.power)


@dataclasses.dataclass(frozen=True)
class KeepCosine(_Keep):
    """`alpha = 1 - sin(pi t / 2)`: tokens are revealed slowly at first (Chang et al. 2022, Shi et al. 2024)."""

    def alpha(self, t: ArrayLike) -> Array:
        t = as_time(t)
        # 1 - sin cancels near t = 1, the squared sine is inexact at t = 0.
        return jnp.where(t < 0.5, 1.0 - jnp.sin(0.5 * jnp.pi * t), 2.0 * jnp.sin(0.25 * jnp.pi * (1.0 - t)) ** 2)

    def sigma(self, t: ArrayLike) -> Array:
        return jnp.sin(0.5 * jnp.pi * as_time(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        log_snr = as_time(log_snr)
        kept = log_snr > 0
        # Each side is asked for its own values alone: the derivative of the arcsine is infinite at the other end.
        from_start = 2.0 / jnp.pi * jnp.arcsin(jax.nn.sigmoid(-jnp.where(kept, log_snr, 0.0)))
        root = safe_sqrt(0.5 * jax.nn.sigmoid(jnp.where(kept, 0.0, log_snr)))
        return jnp.where(kept, from_start, 1.0 - 4.0 / jnp.pi * jnp.arcsin(root))


@dataclasses.dataclass(frozen=True)
class KeepGeometric(_Keep):
    """`alpha = exp(-rate_min ((rate_max / rate_min)^t - 1))`: total noise grows geometrically (Lou et al. 2024)."""

    rate_min: Number = 1e-3
    rate_max: Number = 20.0

    def __post_init__(self):
        check_positive(rate_min=self.rate_min, rate_max=self.rate_max)
        if self.rate_max <= self.rate_min:
            raise invalid("rate_max", self.rate_max, f"it must be larger than rate_min = {self.rate_min}")

    def _total(self, t):
        return self.rate_min * jnp.expm1(math.log(self.rate_max / self.rate_min) * as_time(t))

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.exp(-self._total(t))

    def sigma(self, t: ArrayLike) -> Array:
        return -jnp.expm1(-self._total(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        total = at_most(jax.nn.softplus(-as_time(log_snr)), self.rate_max - self.rate_min)
        return at_most(jnp.log1p(total / self.rate_min) / math.log(self.rate_max / self.rate_min), 1.0)


KEEP_SCHEDULES = {"linear": KeepPolynomial, "cosine": KeepCosine, "geometric": KeepGeometric}
"""Schedules of the keep probability by name."""
