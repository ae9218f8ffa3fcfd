"""Which times are hard to learn: how much the data change from one time to the next, and how slowly a loss falls.

Kim et al. (2024) measure the difficulty of an interval of times in two ways. By the relative entropy of neighbouring
marginals, p_t being the distribution of x_t,

    KL(p_a || p_b) = sum of 1/2 (v_a / v_b - 1 - log(v_a / v_b)),      v_t = alpha_t^2 s^2 + sigma_t^2         (1)

over the coordinates of centred Gaussian data of variance s^2, and for a mixture, with q = p_b / p_a, as the mean over
samples of p_a of

    q - 1 - log q,                                                                                             (2)

which for close marginals varies far less than -log q, whose mean is the same. And by the loss L of a network that is
trained in the interval alone, as its normalised drop after n steps,

    (L(n) - L(end)) / (L(0) - L(end)).                                                                         (3)

The yardstick matters: by "within 10 % of its own end" the noisiest times, whose losses fall by decades, look slowest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers.analytic import GaussianMixture, log_density, sample_mixture
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.metrics.arrays import real_numbers
from diffusion_jax.processes import need_gaussian
from diffusion_jax.typing import Number, Numbers

CLOSE = 0.5
"""Standard deviation of the log-ratio of two marginals up to which equation (2) is used."""


def gaussian_relative_entropies(process: Any, times: Numbers, variances: Numbers | Number) -> np.ndarray:
    """Equation (1) from each of `times [n + 1]` to the next, in nats, float64 `[n]`.

    variances: s^2 of the coordinates, any shape; one number is one coordinate. Times that rise go from less noise to
    more. Infinite from a point (s = 0 at t = 0). Raises InvalidInput for a process that is not Gaussian, for fewer than
    two times, and for variances that are negative.
    """
    times, alpha, sigma = _levels("gaussian_relative_entropies", process, times)
    variances = real_numbers("variances", variances).astype(np.float64).reshape(-1)
    if not variances.size or not ((variances >= 0) & np.isfinite(variances)).all():
        raise invalid("variances", variances.tolist(), "finite numbers that are not negative were expected")
    v = alpha[:, None] ** 2 * variances + sigma[:, None] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        change = (v[:-1] - v[1:]) / v[1:]
        each = 0.5 * (change - np.log1p(change))
    return np.where(v[:-1] == v[1:], 0.0, each).sum(axis=1)


def relative_entropies(key: Any, process: Any, mixture: GaussianMixture, times: Numbers, samples: int = 4096) -> Any:
    """Equation (2) from each of `times [n + 1]` to the next, in nats, float64 `[n]`.

    mixture: of one array, `denoisers.gaussian_mixture`; a data set is the mixture of its examples with a small standard
        deviation. samples: of p_a, of which every pair of times has its own. The error of a result is at most
        about 4 / sqrt(samples) of it; values below some 1e-10 are lost in the rounding of log-densities.

    Raises InvalidInput for a process that is not Gaussian, for fewer than two times, and where a marginal is no density
    (t = 0 with a standard deviation of 0).
    """
    times, alpha, sigma = _levels("relative_entropies", process, times)
    if isinstance(mixture.means, dict):
        raise InvalidInput("relative_entropies needs a mixture of one array, but this one has modalities.")
    if samples < 1:
        raise invalid("samples", samples, "at least 1 is needed")
    if mixture.variances is not None:
        least = float(np.min(np.asarray(mixture.variances))) * alpha**2 + sigma**2
        if (least == 0).any():
            raise invalid("times", float(times[least == 0][0]), "the marginal there is points, which have no density")

    @jax.jit
    def log_ratios(mixture, pairs):
        def between(inputs):
            number, (a, b) = inputs
            data_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
            x0 = sample_mixture(data_key, mixture, samples)[0]
            x = process.marginal(x0, jax.random.normal(noise_key, (samples, *mixture.means.shape[1:])), a)
            return log_density(mixture, process, x, b) - log_density(mixture, process, x, a)

        return jax.lax.map(between, (jnp.arange(len(pairs)), pairs))

    pairs = jnp.asarray(np.stack([times[:-1], times[1:]], axis=1), jnp.float32)
    found = np.asarray(log_ratios(mixture, pairs), np.float64)
    # Far marginals have ratios whose mean no sample shows, and need no help.
    close = found.std(axis=1, keepdims=True) < CLOSE
    return np.where(close, np.expm1(np.where(close, found, 0.0)), 0.0).mean(axis=1) - found.mean(axis=1)


def _levels(what: str, process: Any, times: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times `[n + 1]`, and alpha and sigma there, float64."""
    need_gaussian(what, process)
    times = real_numbers("times", times)
    if times.ndim != 1 or len(times) < 2:
        raise invalid("times.shape", times.shape, "at least two times, [n + 1], were expected")
    at = jnp.asarray(times, jnp.float32)
    return times, np.asarray(process.alpha(at), np.float64), np.asarray(process.sigma(at), np.float64)


def normalised_drop(losses: Numbers, window: int = 1) -> np.ndarray:
    """Equation (3) of `losses [..., n]`, float64: 1 at first and 0 in the end.

    window: so many neighbouring losses are averaged first, for losses of batches: `[..., n - window + 1]`; entry i is
        then the mean of losses i .. i + window - 1. L(end) is the last of these.

    Raises InvalidInput for a window that leaves fewer than two, and for losses that end where they began.
    """
    losses = real_numbers("losses", losses).astype(np.float64)
    if losses.ndim < 1 or not 1 <= window < losses.shape[-1]:
        raise invalid("window", window, f"1 to {max(losses.shape[-1:], default=1) - 1} of the losses can be averaged")
    if not np.isfinite(losses).all():
        raise InvalidInput("losses hold a NaN or an infinity, with which no drop can be compared.")
    means = np.lib.stride_tricks.sliding_window_view(losses, window, axis=-1).mean(axis=-1)
    first, last = means[..., :1], means[..., -1:]
    if (first == last).any():
        raise InvalidInput("A loss ends where it began, so there is no drop to compare with.")
    return (means - last) / (first - last)


def steps_to_drop(losses: Numbers, share: Number = 0.1, window: int = 1) -> np.ndarray:
    """How many losses it takes until the `normalised_drop` of `losses [..., n]` is first below `share`: `[...]`."""
    if not 0 < share < 1:
        raise invalid("share", share, "it must lie between 0 and 1")
    # The end itself has a drop of 0, so there is always such a loss.
    return (normalised_drop(losses, window) < share).argmax(axis=-1)
