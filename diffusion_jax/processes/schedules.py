"""Noise schedules: alpha(t), sigma(t) and the log-SNR as frozen dataclasses, elementwise over any shape of t.

Every schedule is exactly clean at t = 0 (alpha = 1, sigma = 0) and decreases `log_snr = log(alpha^2 / sigma^2)` towards
the prior at t = 1. Results have the dtype of t (at least float32), and each formula keeps its relative accuracy at
both ends. A derivative that would be infinite, at an end, is 0 (`safe_log`, `safe_sqrt`), so that a run can be
differentiated with respect to its grid; so is that of `inverse_log_snr` for noise that no t has, where it is 1.
Schedules given by a table of betas are in `discrete_vp`; what a network predicts is in `gaussian`.

`family` says which identity holds between alpha and sigma, so that a change of log-SNR can keep it:
`vp` alpha^2 + sigma^2 = 1, `flow` alpha + sigma = 1, `ve` alpha = 1.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Number


def as_time(t: Any) -> jax.Array:
    """`t` as a floating array of at least single precision."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        return t.astype(jnp.result_type(float))
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def check_time(t: Any) -> None:
    """Raises InvalidInput for a known time outside of [0, 1] by more than rounding, or a NaN."""
    if isinstance(t, Tracer) or (isinstance(t, jax.Array) and not t.is_fully_addressable):
        return
    known = np.asarray(t)
    within = (known >= -1e-5) & (known <= 1.0 + 1e-5)
    if not within.all():
        wrong = float(known[~within].flat[0]) if known.ndim else float(known)
        raise invalid("t", wrong, "times lie in [0, 1]; the index k of T steps is t = (k + 1) / T")


def at_most(value: Any, limit: Any) -> jax.Array:
    """The value, or `limit` where that is less; the whole derivative of the value where both are equal."""
    return jnp.where(value > limit, limit, value)


def at_least(value: Any, limit: Any) -> jax.Array:
    """The value, or `limit` where that is more; the whole derivative of the value where both are equal."""
    return jnp.where(value < limit, limit, value)


def safe_log(value: Any) -> jax.Array:
    """The logarithm; at 0 it is -inf, and its derivative, in place of an infinite one, 0."""
    zero = value == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1.0, value)))


def safe_sqrt(value: Any) -> jax.Array:
    """The square root; its derivative at 0, in place of an infinite one, is 0."""
    zero = value == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, value)))


def safe_inverse(value: Any) -> jax.Array:
    """1 / value, and 0 where it is 0, where its derivative is 0 too."""
    zero = value == 0
    return jnp.where(zero, 0.0, 1.0 / jnp.where(zero, 1.0, value))


def check_positive(**values: Number) -> None:
    """Raises `InvalidInput` for the first value that is not a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise invalid(name, value, "it must be a positive number")


@dataclasses.dataclass(frozen=True)
class Linear:
    """Rectified flow, optimal-transport path: `alpha = 1 - t`, `sigma = t` (Liu et al. 2023, Lipman et al. 2023)."""

    family = "flow"

    def alpha(self, t: ArrayLike) -> Array:
        return 1.0 - as_time(t)

    def sigma(self, t: ArrayLike) -> Array:
        return as_time(t)

    def log_snr(self, t: ArrayLike) -> Array:
        t = as_time(t)
        end = t == 1
        log_alpha = jnp.where(end, -jnp.inf, jnp.log1p(-jnp.where(end, 0.0, t)))
        return 2.0 * (log_alpha - safe_log(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        return jax.nn.sigmoid(-0.5 * as_time(log_snr))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Variance-preserving cosine, also the GVP interpolant: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`.

    Nichol & Dhariwal 2021 without the offset; Albergo et al. 2023, Ma et al. 2024 (SiT).
    """

    family = "vp"

    def alpha(self, t: ArrayLike) -> Array:
        t = as_time(t)
        # cos near pi / 2 cancels; 1 - t is exact there.
        return jnp.where(t < 0.5, jnp.cos(0.5 * jnp.pi * t), jnp.sin(0.5 * jnp.pi * (1.0 - t)))

    def sigma(self, t: ArrayLike) -> Array:
        return jnp.sin(0.5 * jnp.pi * as_time(t))

    def log_snr(self, t: ArrayLike) -> Array:
        return 2.0 * (safe_log(self.alpha(t)) - safe_log(self.sigma(t)))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        log_snr = as_time(log_snr)
        noisy = log_snr < 0
        # Each side by an exponential that is at most 1, so that neither it nor its derivative overflows.
        from_start = jnp.arctan(jnp.exp(-0.5 * jnp.where(noisy, 0.0, log_snr)))
        from_end = jnp.arctan(jnp.exp(0.5 * jnp.where(noisy, log_snr, 0.0)))
        return jnp.where(noisy, 1.0 - 2.0 / jnp.pi * from_end, 2.0 / jnp.pi * from_start)


@dataclasses.dataclass(frozen=True)
class LinearVP:
    """The VP-SDE with a linear rate: `log alpha = -B / 2`, `B = beta_min t + (beta_max - beta_min) t^2 / 2`.

    `sigma^2 = 1 - exp(-B)` (Song et al. 2021, equation 32).
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    family = "vp"

    def __post_init__(self):
        check_positive(beta_min=self.beta_min, beta_max=self.beta_max)
        if self.beta_max < self.beta_min:
            raise invalid("beta_max", self.beta_max, f"it must be at least beta_min = {self.beta_min}")

    def _integral(self, t):
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.exp(-0.5 * self._integral(as_time(t)))

    def sigma(self, t: ArrayLike) -> Array:
        return safe_sqrt(-jnp.expm1(-self._integral(as_time(t))))

    def log_snr(self, t: ArrayLike) -> Array:
        integral = self._integral(as_time(t))
        return -integral - safe_log(-jnp.expm1(-integral))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        last = 0.5 * (self.beta_min + self.beta_max)
        integral = at_most(jax.nn.softplus(-as_time(log_snr)), last)
        root = jnp.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return at_most(2.0 * integral / (self.beta_min + root), 1.0)


@dataclasses.dataclass(frozen=True)
class VarianceExploding:
    """The VE-SDE: `alpha = 1`, `sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^{2t} - 1)` (Song et al. 2021)."""

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0
    family = "ve"

    def __post_init__(self):
        check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if self.sigma_max <= self.sigma_min:
            raise invalid("sigma_max", self.sigma_max, f"it must be larger than sigma_min = {self.sigma_min}")

    @property
    def _rate(self):
        return 2.0 * math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.ones_like(as_time(t))

    def sigma(self, t: ArrayLike) -> Array:
        return self.sigma_min * safe_sqrt(jnp.expm1(self._rate * as_time(t)))

    def log_snr(self, t: ArrayLike) -> Array:
        return -2.0 * safe_log(self.sigma(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        return at_most(jax.nn.softplus(-as_time(log_snr) - 2.0 * math.log(self.sigma_min)) / self._rate, 1.0)


@dataclasses.dataclass(frozen=True)
class EDM:
    """`alpha = 1`, `sigma = sigma_max t` (Karras et al. 2022, their sigma divided by its maximum is our t)."""

    sigma_max: Number = 80.0
    family = "ve"

    def __post_init__(self):
        check_positive(sigma_max=self.sigma_max)

    def alpha(self, t: ArrayLike) -> Array:
        return jnp.ones_like(as_time(t))

    def sigma(self, t: ArrayLike) -> Array:
        return self.sigma_max * as_time(t)

    def log_snr(self, t: ArrayLike) -> Array:
        return -2.0 * safe_log(self.sigma(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        log_snr = at_least(as_time(log_snr), -2.0 * math.log(self.sigma_max))
        return at_most(jnp.exp(-0.5 * log_snr) / self.sigma_max, 1.0)


@dataclasses.dataclass(frozen=True)
class Shifted:
    """`schedule` with `log_snr` moved by a constant, its family kept (Hoogeboom et al. 2023, Esser et al. 2024).

    With `k = exp(log_snr_shift / 2)`: `alpha = k alpha_0 / Z`, `sigma = sigma_0 / Z`, where Z restores the identity of
    the family. Negative values mean more noise, as larger images need: `2 log(64 / resolution)` in simple diffusion.
    For `Linear` it is the flow shift `t -> s t / (1 + (s - 1) t)` with `log_snr_shift = -2 log s`. A schedule with a
    finite log-SNR at t = 1 ends at that value plus the shift.
    """

    schedule: Any
    log_snr_shift: Number = 0.0

    def __post_init__(self):
        if not math.isfinite(self.log_snr_shift):
            raise invalid("log_snr_shift", self.log_snr_shift, "it must be a finite number")
        if getattr(self.schedule, "family", None) not in ("vp", "flow", "ve"):
            raise invalid("schedule", self.schedule, "a shifted schedule needs a family: 'vp', 'flow' or 've'")

    @property
    def family(self):
        return self.schedule.family

    def _pair(self, t):
        alpha, sigma = self.schedule.alpha(t) * math.exp(0.5 * self.log_snr_shift), self.schedule.sigma(t)
        total = {"vp": jnp.hypot, "flow": jnp.add, "ve": lambda alpha, sigma: alpha}[self.family](alpha, sigma)
        return alpha / total, sigma / total

    def alpha(self, t: ArrayLike) -> Array:
        return self._pair(t)[0]

    def sigma(self, t: ArrayLike) -> Array:
        return self._pair(t)[1]

    def log_snr(self, t: ArrayLike) -> Array:
        return self.schedule.log_snr(t) + self.log_snr_shift

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        return self.schedule.inverse_log_snr(as_time(log_snr) - self.log_snr_shift)
