"""What each step of a deterministic run contributes to its answer, and from which times are drawn and weighed.

DDIM from t to s changes x / alpha by the step's eps alone. With nu = sigma / alpha, for any answers of a network,

    x_0 = x_T / alpha_T + sum_i c_i eps(x_i, t_i),       c_i = nu_(i + 1) - nu_i,                                  (1)

so an error of the answer at step i arrives in x_0 with the factor c_i, and where the errors of different steps are
independent, E |error of x_0|^2 = sum_i c_i^2 E |error of answer i|^2 (Pang et al. 2025, ADDP). An Euler step adds
(s - t) u to x itself: there c_i = t_(i + 1) - t_i for velocities u.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes import is_gaussian
from diffusion_jax.processes.schedules import safe_inverse
from diffusion_jax.timesteps.draws import by_weights
from diffusion_jax.timesteps.grids import scalar_times
from diffusion_jax.typing import Number, Numbers, Process, Times, TimestepDraw


def contributions(process: Any, grid: Times) -> Float[Array, " S"]:
    """c_i of equation (1) for the output of `process`, at each step of a grid `[S + 1]`; negative where noise falls.

    The error of an output is that of eps times a known factor at a fixed x_t, so of v they are
    sin(phi_s - phi_t) / cos(phi_s) with alpha = cos(phi), and of x0 1 - nu_s / nu_t. For "velocity" they are s - t.
    At alpha = 0 those of epsilon are infinite, as its error in x0 is there. Use the grid of deployment: contributions
    depend on the number of steps. Raises InvalidInput for processes that are not Gaussian, and for vector times.
    """
    if not is_gaussian(process):
        raise InvalidInput(f"contributions are for Gaussian processes, but this one is {type(process).__name__}.")
    times = scalar_times(grid)
    t, s = times[:-1], times[1:]
    if process.prediction == "velocity":
        return s - t
    alpha, sigma, ratio = process.alpha(t), process.sigma(t), process.sigma(s) * safe_inverse(process.alpha(s))
    c_x0, c_eps, scale = process.coefficients(t)
    determinant = c_x0 * sigma - c_eps * alpha
    # (nu_s - nu_t) times the error of eps: the first factor may be infinite at alpha = 0, where the second is 0.
    found = (sigma - alpha * ratio) * scale / jnp.where(t == s, 1.0, determinant)
    # A step that stands still contributes nothing.
    return jnp.where(t == s, 0.0, found)


def by_contribution(
    process: Process, grid: Times, uniform_share: Number = 0.5, spread: str = "independent"
) -> TimestepDraw:
    """`by_weights` of the squares of `contributions`, contribution-aware sampling of times; there, what a share is.

    grid: `[S + 1]` of deployment, or the finest that there is, such as `trailing(1000)`, for runs of any length.
    """
    return by_weights(grid, np.square(contributions(process, grid)), uniform_share, spread)


def measured_contributions(
    times: Numbers, quality: Numbers, at: Numbers | None = None, degree: int = 1
) -> Float[np.ndarray, " n"]:
    """Contributions of times where quality is no square error, from that of the predicted x0 at each step of a run.

    times: `[S]`, falling. quality: `[S]`, or `[N, S]` of several runs, larger for better, such as the overlap of the
    predicted mask (`denoisers.recorded` keeps predictions). What quality gains from one step to the next is regressed
    on t by a polynomial of `degree` and evaluated at the times `at`, those of the steps unless given; what is negative
    counts as 0. The sum is 1; where nothing is gained all are equal.
    Raises InvalidInput for fewer steps than the polynomial needs, or quality of another length.
    """
    times, gained = np.asarray(times, np.float64), np.asarray(quality, np.float64)
    gained = gained if gained.ndim == 1 else gained.mean(axis=0)
    if times.ndim != 1 or gained.shape != times.shape or len(times) < degree + 2:
        shapes = (times.shape, gained.shape)
        raise invalid("times, quality", shapes, f"the times and the quality of at least {degree + 2} steps are needed")
    if not (np.diff(times) < 0).all() or not np.isfinite(gained).all() or degree < 0:
        told = "times that fall, finite qualities and a degree of at least 0 are needed"
        raise invalid("times, quality, degree", (times.tolist(), gained.tolist(), degree), told)
    fitted = np.polynomial.Polynomial.fit(times[:-1], np.diff(gained), degree)
    found = np.maximum(fitted(times if at is None else np.asarray(at, np.float64)), 0.0)
    return found / found.sum() if found.sum() > 0 else np.full(len(found), 1.0 / len(found))
