"""Exposure bias: what a run's own states cost, against the states of training (Ning et al. 2023).

At each time t_i of a run that began with the noise eps, a denoiser is asked twice for x0: at the state that the run has
reached, which holds the errors of its earlier answers, and at the one that training would have shown it,

    free_i = |D(x_i, t_i) - x0|^2,      forced_i = |D(alpha_i x0 + sigma_i eps, t_i) - x0|^2.                       (1)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.clock import as_grid, single_step
from diffusion_jax.denoisers import recorded
from diffusion_jax.processes import need_gaussian
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import ddim
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Condition, Denoiser, Params, Times


class ExposureErrors(NamedTuple):
    """Mean square errors of x0 by step and example, equation (1)."""

    free: Float[Array, "S B"]
    forced: Float[Array, "S B"]


def exposure_figures(errors: ExposureErrors) -> dict[str, float]:
    """Means over the examples of a run.

    "step 0", "step 1" and so on: -10 log10 of the free error there, the PSNR in dB of an x0 whose values span 1.
    "fall": its largest fall from a step to the next, at least 0. "gap": free less forced error at the last step.
    """
    free, forced = jax.device_get(errors)
    curve = -10 * np.log10(free).mean(1)
    falls = {"fall": max(0.0, float(-np.diff(curve).min(initial=0.0))), "gap": float((free - forced)[-1].mean())}
    return falls | {f"step {step}": float(value) for step, value in enumerate(curve)}


def exposure_errors(
    key: Any, denoiser: Denoiser, params: Params, x0: Any, grid: Times, cond: Condition = None
) -> ExposureErrors:
    """Equation (1) for a run of DDIM over `grid [S + 1]` from the prior, towards the known `x0 [B, ...]`.

    denoiser: of a Gaussian process, without a memory. Pure; costs 2 S evaluations. Raises InvalidInput for another
    process.
    """
    need_gaussian("exposure_errors", denoiser.process)
    process, times = denoiser.process, as_grid(grid)
    start = process.prior(key, x0.shape)
    noise = start / expand(process.sigma(times[0]), start)
    told = recorded(denoiser, len(times) - 1)
    made = sample(key, told, params, ddim(), times, x_init=start, cond=cond).run.carry.values

    def forced(t):
        state = process.marginal(x0, noise, t)
        return denoiser.apply(params, denoiser.init(params, state, cond), state, single_step(t), cond)[0].x0

    def errors(said):
        return jnp.square(said - x0).reshape(*said.shape[: said.ndim - x0.ndim + 1], -1).mean(-1)

    return ExposureErrors(errors(made), jax.lax.map(lambda t: errors(forced(t)), times[:-1]))
