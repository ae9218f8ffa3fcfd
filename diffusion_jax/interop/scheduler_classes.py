"""What the scheduler classes of diffusers are read into, and most of those with a table of betas.

Which noise levels an option means is in `noise_levels`; multi-step methods in log(alpha / sigma) are in
`multistep_classes`, flows, EDM and others without a table in `continuous_classes`; `schedulers` lists all. The classes
fall into two groups: those that keep x as it is, and those (Euler, Heun, LMS, DPM-2) that keep x / alpha; here x is x,
and `initial_scale` and `final_scale` say how the two are related at the ends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax import solvers
from diffusion_jax.denoisers import clipped, thresholded
from diffusion_jax.denoisers.base import map_prediction
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.noise_levels import (
    SMALLEST_ALPHA_BAR,
    Levels,
    SchedulerClass,
    betas_of,
    checked_steps,
    consistency_levels,
    continuous_levels,
    discrete_levels,
    final_alpha,
    final_sigma,
    on,
    refuse,
)
from diffusion_jax.processes import GaussianProcess, zero_terminal_snr_betas
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser, Solver


def _unit(grid: Any) -> Any:
    return 1.0


def unchanged(denoiser: Denoiser) -> Denoiser:
    return denoiser


def _as_it_is(grid: Any, first: int, solver: Solver | None = None) -> Any:
    return grid


class Scheduler(NamedTuple):
    """What a scheduler config says, in parts to give to `sample`.

    process: the noise, what the network predicts and is fed: `denoiser(network, process)`.
    solver: the method. Another may be put in its place.
    grid: (num_steps, seq_len=None, timesteps=None, sigmas=None) -> [S + 1]. seq_len: number of tokens, needed where the
        shift is dynamic. In the place of num_steps, as the class takes them: timesteps, falling indices, and sigmas,
        those of a flow before they are shifted, those of Euler with the last one, 0 where the run ends at the data.
    transform: denoiser -> denoiser: clipping, thresholding, the boundary condition of consistency models.
    initial_scale: (grid) -> what standard normal noise is multiplied by to be x at the first time.
    final_scale: (grid) -> what x at the last time is multiplied by to be the image or latent.
    begun: (grid, first, solver=...) -> the grid of a run that begins at step `first`, as image to image does: an image
        noised to `grid[first]`, then `sample(..., start=first)`, since where a method lowers its order depends on the
        whole grid. solver: the one that makes the run, where it is another.
    config: the config itself, as read.
    """

    process: GaussianProcess
    solver: Solver
    grid: Callable[..., Any]
    transform: Callable[[Denoiser], Denoiser] = unchanged
    initial_scale: Callable[[Any], Any] = _unit
    final_scale: Callable[[Any], Any] = _unit
    begun: Callable[..., Any] = _as_it_is
    config: dict[str, Any] = {}


def bounds_of(fields: Fields, clip: bool | None = None, keep_noise: bool = False) -> Any:
    """thresholding, else clip_sample: `clip` is the class's default, None where it has no such option."""
    percentile = fields.number("dynamic_thresholding_ratio", 0.995, 0.0, 1.0)
    most = fields.number("sample_max_value", 1.0, 1.0)
    bound = fields.positive("clip_sample_range", 1.0)
    clips = clip is not None and fields.flag("clip_sample", clip)
    if on(fields, "thresholding"):
        return lambda denoiser: thresholded(denoiser, percentile, 1.0, most, keep_noise)
    if clips:
        return lambda denoiser: clipped(denoiser, -bound, bound, keep_noise)
    return unchanged


def _scaled(fields, levels: Levels, solver: Solver, transform=unchanged, spacing: str = "linspace") -> Scheduler:
    """A scheduler of the group that keeps x / alpha.

    It starts from noise times sigma / alpha, or times its hypotenuse with 1 where indices are leading.
    """
    process = levels.process
    from_noise = fields.raw("timestep_spacing", spacing) in ("linspace", "trailing")
    return Scheduler(
        process,
        solver,
        levels.grid,
        transform,
        (lambda grid: process.sigma(grid[0])) if from_noise else _unit,
        lambda grid: 1.0 / process.alpha(grid[-1]),
    )


FRACTIONAL: dict[str, str] = dict.fromkeys(("karras", "exponential", "beta"), "index")
EULER = SchedulerClass(terminal=SMALLEST_ALPHA_BAR, ratios=FRACTIONAL, end=final_sigma, own_sigmas=True)
LMS = SchedulerClass(ratios=FRACTIONAL)
HEUN = SchedulerClass(ratios=FRACTIONAL, beta_start=0.00085, beta_end=0.012)
KDPM2 = HEUN._replace(between="log_sigma")
DDIM = SchedulerClass("leading", rounded=True, terminal=0.0, end=final_alpha(True))
DDPM = SchedulerClass("leading", rounded=True, terminal=0.0)
PNDM = SchedulerClass("leading", rounded=True, spacings=("leading", "trailing"), end=final_alpha(False))
COGVIDEOX = DDIM._replace(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
CONSISTENCY = SchedulerClass(
    "leading", "scaled_linear", 0.00085, 0.012, rounded=True, terminal=0.0, end=final_alpha(True)
)


def _euler(fields):
    fields.choice("interpolation_type", ("linear",))
    continuous = fields.choice("timestep_type", ("discrete", "continuous")) == "continuous"
    if continuous and fields.raw("prediction_type", "epsilon") == "v_prediction":
        return _scaled(fields, continuous_levels(fields, EULER), solvers.euler())
    return _scaled(fields, discrete_levels(fields, EULER), solvers.euler())


def _euler_ancestral(fields):
    kind = EULER._replace(ratios={}, end=DDPM.end, own_sigmas=False)
    levels = discrete_levels(fields, kind, ("epsilon", "v_prediction"))
    return _scaled(fields, levels, solvers.euler_ancestral())


def _heun(fields):
    return _scaled(fields, discrete_levels(fields, HEUN), solvers.heun(), bounds_of(fields, clip=False))


def _kdpm2(ancestral):
    def read(fields):
        levels = discrete_levels(fields, KDPM2, ("epsilon", "v_prediction"))
        return _scaled(fields, levels, solvers.kdpm2(ancestral))

    return read


def _lms(fields):
    return _scaled(fields, discrete_levels(fields, LMS), solvers.lms(start="zeros"))


def _strided(fields, solver, levels):
    """`solver`, with steps of T // S indices where the grid has others."""
    if fields.raw("timestep_spacing", "leading") == "leading":
        return solver
    return solvers.strided(solver, levels.process.schedule.num_steps)


def _check_divisor(fields, num_steps, total):
    """Where steps of T // S indices do not end at the data, the last one would be another than the last."""
    if fields.raw("timestep_spacing", "leading") == "trailing" and total % num_steps:
        raise InvalidInput(
            f"num_steps is {num_steps}, but {fields.source} with trailing indices needs a divisor of {total}."
        )


def _ddim(fields, eta=0.0):
    levels = discrete_levels(fields, DDIM)
    solver = _strided(fields, solvers.ddim(eta), levels)
    return Scheduler(levels.process, solver, levels.grid, bounds_of(fields, clip=True, keep_noise=True))


def _ddpm(fields):
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
    variance = variances[fields.choice("variance_type", tuple(variances))]
    levels = discrete_levels(fields, DDPM)
    solver = solvers.ddpm(variance, noise_at_end=True)
    return Scheduler(levels.process, solver, levels.grid, bounds_of(fields, clip=True))


def _pndm(fields):
    levels = discrete_levels(fields, PNDM, ("epsilon", "v_prediction"))
    total, runge_kutta = levels.process.schedule.num_steps, not on(fields, "skip_prk_steps")

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, timesteps=timesteps, sigmas=sigmas)
        found = levels.grid(num_steps)
        num_steps = checked_steps(num_steps, total)
        _check_divisor(fields, num_steps, total)
        if runge_kutta and (num_steps < 4 or total // num_steps % 2):
            raise InvalidInput(
                f"num_steps is {num_steps}, but PNDMScheduler without skip_prk_steps needs at least 4 and an even "
                f"{total} // num_steps: it evaluates half way between two steps."
            )
        return found

    # It combines what the network said, whatever that is.
    combined = "eps" if levels.process.prediction == "epsilon" else "output"
    if runge_kutta:
        return Scheduler(levels.process, solvers.pndm(combined), grid)
    solver = solvers.strided(solvers.plms(4, "diffusers", combined), total)

    def one_earlier(grid, first, solver=solver, own=solver):
        """A run of diffusers' PLMS that begins at step 2 or later begins one step earlier, and leaves out the next one.

        Its list of indices has the second one twice, for the two evaluations of the first step, and is cut at `first`:
        the first step is made from the index before, to the one at `first`, and what it comes to is taken for the one
        after. Another solver has no such list.
        """
        return grid if first < 2 or solver is not own else grid.at[first].set(grid[first - 1])

    return Scheduler(levels.process, solver, grid, begun=one_earlier)


def _lcm(fields):
    levels = consistency_levels(fields, CONSISTENCY)
    bounds, scaling = bounds_of(fields, clip=False), fields.positive("timestep_scaling", 10.0)

    def boundary(denoiser):
        def combine(prediction, x, step):
            """x0 becomes `c_out x0 + c_skip x`, which is x at t = 0 (Song et al. 2023, with sigma_data = 1/2)."""
            scaled = scaling * denoiser.process.network_time(step.t)
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
            return prediction._replace(x0=expand(out, x) * prediction.x0 + expand(skip, x) * x)

        return map_prediction(bounds(denoiser), combine)

    # Its last step returns x0 whatever set_alpha_to_one says.
    def grid(num_steps=None, **given):
        return levels.grid(num_steps, **given).at[-1].set(0.0)

    return Scheduler(levels.process, solvers.lcm(), grid, boundary)


def _tcd(fields, eta=0.3):
    levels = consistency_levels(fields, CONSISTENCY._replace(end=lambda fields, steps: 1 / steps))
    solver = solvers.tcd(eta, levels.process.schedule.num_steps)
    return Scheduler(levels.process, solver, levels.grid)


def _cogvideox_betas(fields: Fields) -> tuple[float, ...]:
    """The table whose signal-to-noise ratio is divided by `snr_shift_scale` (Esser et al. 2024), then rescaled."""
    plain = Fields({**fields.values, "rescale_betas_zero_snr": False}, fields.source)
    scale = fields.positive("snr_shift_scale", 3.0)
    alpha_bar = np.cumprod(1 - np.asarray(betas_of(plain, COGVIDEOX), np.float64))
    alpha_bar = alpha_bar / (scale + (1 - scale) * alpha_bar)
    betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    shifted = tuple(float(beta) for beta in betas)
    return zero_terminal_snr_betas(shifted) if on(fields, "rescale_betas_zero_snr") else shifted


def _cogvideox(sde):
    """CogVideoX: DDIM, or DPM-Solver++(2M) of the reverse SDE, whose last step is of first order."""

    def read(fields):
        for name in ("clip_sample", "clip_sample_range", "sample_max_value"):
            fields.raw(name)  # Which it has, and does not use.
        levels = discrete_levels(fields, COGVIDEOX, betas=_cogvideox_betas(fields))
        if not sde:
            return Scheduler(levels.process, _strided(fields, solvers.ddim(), levels), levels.grid)

        def grid(num_steps=None, **given):
            found = levels.grid(num_steps, **given)
            if num_steps is not None:
                _check_divisor(fields, num_steps, levels.process.schedule.num_steps)
            return found

        solver = solvers.dpm_solver_pp(2, equation="sde", lower_order_final=False, euler_at_final=True)
        return Scheduler(levels.process, _strided(fields, solver, levels), grid)

    return read


def _dpm_sde(fields):
    fields.whole("noise_sampler_seed", None, 0, 2**63)
    levels = discrete_levels(fields, KDPM2, ("epsilon", "v_prediction"))
    return _scaled(fields, levels, solvers.dpm_solver_pp(2, "singlestep", "sde"))


DISCRETE_CLASSES: dict[str, Callable[..., Scheduler]] = {
    "CogVideoXDDIMScheduler": _cogvideox(sde=False),
    "CogVideoXDPMScheduler": _cogvideox(sde=True),
    "DDIMParallelScheduler": _ddim,
    "DDIMScheduler": _ddim,
    "DDPMParallelScheduler": _ddpm,
    "DDPMScheduler": _ddpm,
    "DPMSolverSDEScheduler": _dpm_sde,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "EulerDiscreteScheduler": _euler,
    "HeunDiscreteScheduler": _heun,
    "KDPM2AncestralDiscreteScheduler": _kdpm2(True),
    "KDPM2DiscreteScheduler": _kdpm2(False),
    "LCMScheduler": _lcm,
    "LMSDiscreteScheduler": _lms,
    "PNDMScheduler": _pndm,
    "TCDScheduler": _tcd,
}
"""Their class names: functions of the fields of the config."""
