"""The scheduler classes of diffusers without a table of betas: flows, EDM, Stable Audio's and IPNDM.

See `scheduler_classes`, which has the others, and `flow_levels`, which has their noise levels.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from diffusion_jax import solvers
from diffusion_jax.denoisers.base import map_prediction
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.flow_levels import edm_levels, flow_levels
from diffusion_jax.interop.multistep_classes import SHORT, dpm_multistep_solver
from diffusion_jax.interop.noise_levels import MOST_STEPS, checked_steps, on, own_values, refuse
from diffusion_jax.interop.scheduler_classes import Scheduler, bounds_of
from diffusion_jax.processes import Cosine, GaussianProcess
from diffusion_jax.time_axes import expand
from diffusion_jax.timesteps import from_array


def _noisy(levels, solver, transform):
    """A scheduler of EDM's process, which begins a little above the noise of the first level."""
    high = levels.process.schedule.sigma_max
    return Scheduler(levels.process, solver, levels.grid, transform, lambda grid: (high**2 + 1) ** 0.5)


def _edm_euler(fields):
    return _noisy(edm_levels(fields), solvers.euler(), lambda denoiser: denoiser)


def _edm_dpm(fields):
    return _noisy(edm_levels(fields), dpm_multistep_solver(fields, repeats=True), bounds_of(fields))


def _cosine_dpm(fields):
    """Stable Audio's: DPM-Solver++(2M) of the reverse SDE at levels of which the network is told the angle."""
    levels = edm_levels(fields, "angle", "exponential", (0.3, 500.0, 1.0))
    to_zero = fields.choice("final_sigmas_type", ("zero", "sigma_min")) == "zero"
    kinds = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    solver = solvers.dpm_solver_pp(
        fields.choice("solver_order", (1, 2), 2),
        equation="sde",
        lower_order_final=SHORT if fields.flag("lower_order_final", True) else False,
        euler_at_final=on(fields, "euler_at_final") or to_zero,
        solver_type=kinds[fields.choice("solver_type", tuple(kinds))],
        idle_steps=int(not to_zero),
    )
    return _noisy(levels, solver, lambda denoiser: denoiser)


def _flow(fields):
    levels = flow_levels(fields)
    stochastic = on(fields, "stochastic_sampling")
    return Scheduler(levels.process, solvers.lcm() if stochastic else solvers.flow_euler(), levels.grid)


def _flow_heun(fields):
    levels = flow_levels(fields)
    return Scheduler(levels.process, solvers.flow_heun(), levels.grid)


def _flow_lcm(fields):
    if fields.raw("scale_factors") not in (None, []):
        raise fields.wrong("scale_factors", "sampling at several sizes cannot be read: only null can")
    fields.text("upscale_mode", "bicubic")
    levels = flow_levels(fields)
    return Scheduler(levels.process, solvers.lcm(), levels.grid)


def _ipndm(fields: Fields) -> Scheduler:
    """Dance Diffusion's: PLMS on the cosine schedule, whose network predicts v and is told t; sigma is a squared sine.

    In the first step, where alpha is 0, the clean half of the pair is taken for 0, whatever the network says.
    """
    fields.whole("num_train_timesteps", 1000, 1, MOST_STEPS)
    if fields.raw("trained_betas") is not None:
        raise fields.wrong("trained_betas", "only null can be read for this class")
    process = GaussianProcess(Cosine(), "v", "t")

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, sigmas=sigmas)
        if timesteps is not None:
            return from_array([*own_values("timesteps", timesteps, 0, 1, num_steps), 0.0])
        spaced = np.linspace(1.0, 0.0, checked_steps(num_steps, MOST_STEPS) + 1)
        return from_array(2 / np.pi * np.arcsin(np.sin(0.5 * np.pi * spaced) ** 2))

    def begun_from_nothing(denoiser):
        def combine(prediction, x, step):
            nothing = expand(process.alpha(step.t) == 0, x)
            return prediction._replace(x0=jnp.where(nothing, 0.0, prediction.x0))

        return map_prediction(denoiser, combine)

    return Scheduler(process, solvers.plms(4), grid, begun_from_nothing)


CONTINUOUS_CLASSES: dict[str, Callable[..., Scheduler]] = {
    "CosineDPMSolverMultistepScheduler": _cosine_dpm,
    "EDMDPMSolverMultistepScheduler": _edm_dpm,
    "EDMEulerScheduler": _edm_euler,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "FlowMatchLCMScheduler": _flow_lcm,
    "IPNDMScheduler": _ipndm,
}
"""Their class names: functions of the fields of the config."""
