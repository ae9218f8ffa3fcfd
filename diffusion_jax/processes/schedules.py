"""Noise schedules: alpha(t), sigma(t) and the log-SNR as frozen dataclasses, elementwise over any shape of t.

Every schedule is exactly clean at t = 0 (alpha = 1, sigma = 0) and decreases its log-SNR towards the prior at t = 1.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Linear:
    """Rectified flow / conditional optimal transport: `alpha = 1 - t`, `sigma = t` (Liu et al. 2023, Lipman et al. 2023)."""

    def alpha(self, t):
        return 1.0 - t

    def sigma(self, t):
        return jnp.asarray(t) * 1.0

    def log_snr(self, t):
        return 2.0 * (jnp.log1p(-t) - jnp.log(t))

    def inverse_log_snr(self, log_snr):
        return 1.0 / (1.0 + jnp.exp(0.5 * log_snr))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Variance-preserving cosine / generalised VP interpolant: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`."""

    def alpha(self, t):
        return jnp.where(t == 1.0, 0.0, jnp.cos(0.5 * jnp.pi * t))

    def sigma(self, t):
        return jnp.sin(0.5 * jnp.pi * t)

    def log_snr(self, t):
        return -2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * t))

    def inverse_log_snr(self, log_snr):
        return 2.0 / jnp.pi * jnp.arctan(jnp.exp(-0.5 * log_snr))
