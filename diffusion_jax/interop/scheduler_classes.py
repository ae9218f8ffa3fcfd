"""The scheduler classes of diffusers, each a function from its config to a `Scheduler`; `SCHEDULERS` lists them.

Which noise levels an option means is in `noise_levels`; reading and writing files is in `schedulers`. The classes
fall into two groups: those that keep x as it is, and those (Euler, Heun, LMS, DPM-2) that keep x / alpha; here x is x,
and `initial_scale` and `final_scale` say how the two are related at the ends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusion_jax import solvers
from diffusion_jax.denoisers import clipped, thresholded
from diffusion_jax.denoisers.base import map_prediction
from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.noise_levels import (
    SMALLEST_ALPHA_BAR,
    Levels,
    SchedulerClass,
    checked_steps,
    consistency_levels,
    continuous_levels,
    discrete_levels,
    edm_levels,
    final_alpha,
    final_sigma,
    flow_levels,
    flow_sigma_levels,
    option,
    refuse,
    repeated_end,
)
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser, Solver

SHORT = 15
"""DPM-Solver and DEIS lower their order at the end in runs of fewer steps than this."""


def _unit(grid: Any) -> Any:
    return 1.0


def _unchanged(denoiser: Denoiser) -> Denoiser:
    return denoiser


def _as_it_is(grid: Any, first: int) -> Any:
    return grid


class Scheduler(NamedTuple):
    """What a scheduler config says, in parts to give to `sample`.

    process: the noise, what the network predicts and is fed: `denoiser(network, process)`.
    solver: the method. Another may be put in its place.
    grid: (num_steps, seq_len=None, timesteps=None, sigmas=None) -> [S + 1]. seq_len: number of tokens, needed where the
        shift is dynamic. timesteps: falling indices instead of spaced ones, as the class takes them. sigmas: of a flow,
        before they are shifted.
    transform: denoiser -> denoiser: clipping, thresholding, the boundary condition of consistency models.
    initial_scale: (grid) -> what standard normal noise is multiplied by to be x at the first time.
    final_scale: (grid) -> what x at the last time is multiplied by to be the image or latent.
    begun: (grid, first) -> the grid of a run that begins at step `first`, as image to image does: an image noised to
        `grid[first]`, then `sample(..., start=first)`, since where a method lowers its order depends on the whole grid.
    config: the config itself, as read.
    """

    process: GaussianProcess
    solver: Solver
    grid: Callable[..., Any]
    transform: Callable[[Denoiser], Denoiser] = _unchanged
    initial_scale: Callable[[Any], Any] = _unit
    final_scale: Callable[[Any], Any] = _unit
    begun: Callable[[Any, int], Any] = _as_it_is
    config: dict[str, Any] = {}


def _bounds(config, clip=None, keep_noise=False):
    """thresholding, else clip_sample: `clip` is the class's default, None where it has no such option."""
    if option(config, "thresholding", False):
        percentile, most = option(config, "dynamic_thresholding_ratio", 0.995), option(config, "sample_max_value", 1.0)
        return lambda denoiser: thresholded(denoiser, percentile, 1.0, most, keep_noise)
    if clip is not None and option(config, "clip_sample", clip):
        bound = option(config, "clip_sample_range", 1.0)
        return lambda denoiser: clipped(denoiser, -bound, bound, keep_noise)
    return _unchanged


def _scaled(config: dict, levels: Levels, solver: Solver, transform=_unchanged, spacing: str = "linspace") -> Scheduler:
    """A scheduler of the group that keeps x / alpha.

    It starts from noise times sigma / alpha, or times its hypotenuse with 1 where indices are leading.
    """
    process = levels.process
    from_noise = option(config, "timestep_spacing", spacing) in ("linspace", "trailing")
    return Scheduler(
        process,
        solver,
        levels.grid,
        transform,
        (lambda grid: process.sigma(grid[0])) if from_noise else _unit,
        lambda grid: 1.0 / process.alpha(grid[-1]),
    )


FRACTIONAL: dict[str, str] = dict.fromkeys(("karras", "exponential", "beta"), "index")
WHOLE = {"karras": "nearest_index", "exponential": "floor_index", "beta": "floor_index"}
EULER = SchedulerClass(terminal=SMALLEST_ALPHA_BAR, ratios=FRACTIONAL, end=final_sigma)
LMS = SchedulerClass(ratios=FRACTIONAL)
HEUN = SchedulerClass(ratios=FRACTIONAL, beta_start=0.00085, beta_end=0.012)
KDPM2 = HEUN._replace(between="log_sigma")
DDIM = SchedulerClass("leading", rounded=True, terminal=0.0, end=final_alpha(True))
DDPM = SchedulerClass("leading", rounded=True, terminal=0.0)
PNDM = SchedulerClass("leading", rounded=True, end=final_alpha(False))
MULTISTEP = SchedulerClass(following=True, rounded=True, spaced_ends=False, ratios=WHOLE)
DPM = MULTISTEP._replace(terminal=SMALLEST_ALPHA_BAR, end=final_sigma, ratios={**WHOLE, "lu": "nearest_index"})
CONSISTENCY = SchedulerClass(
    "leading", "scaled_linear", 0.00085, 0.012, rounded=True, terminal=0.0, end=final_alpha(True)
)


def _euler(config):
    option(config, "interpolation_type", "linear", ("linear",))
    continuous = option(config, "timestep_type", "discrete", ("discrete", "continuous")) == "continuous"
    if continuous and option(config, "prediction_type", "epsilon") == "v_prediction":
        return _scaled(config, continuous_levels(config, EULER), solvers.euler())
    return _scaled(config, discrete_levels(config, EULER), solvers.euler())


def _euler_ancestral(config):
    levels = discrete_levels(config, EULER._replace(ratios={}, end=DDPM.end), ("epsilon", "v_prediction"))
    return _scaled(config, levels, solvers.euler_ancestral())


def _heun(config):
    return _scaled(config, discrete_levels(config, HEUN), solvers.heun(), _bounds(config, clip=False))


def _kdpm2(ancestral):
    def read(config):
        levels = discrete_levels(config, KDPM2, ("epsilon", "v_prediction"))
        return _scaled(config, levels, solvers.kdpm2(ancestral))

    return read


def _lms(config):
    return _scaled(config, discrete_levels(config, LMS), solvers.lms(start="zeros"))


def _ddim(config, eta=0.0):
    levels = discrete_levels(config, DDIM)
    solver = solvers.ddim(eta)
    if option(config, "timestep_spacing", "leading") != "leading":
        solver = solvers.strided(solver, levels.process.schedule.num_steps)
    return Scheduler(levels.process, solver, levels.grid, _bounds(config, clip=True, keep_noise=True))


def _ddpm(config):
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
    variance = variances[option(config, "variance_type", "fixed_small", tuple(variances))]
    levels = discrete_levels(config, DDPM)
    solver = solvers.ddpm(variance, noise_at_end=True)
    return Scheduler(levels.process, solver, levels.grid, _bounds(config, clip=True))


def _pndm(config):
    levels = discrete_levels(config, PNDM, ("epsilon", "v_prediction"))
    option(config, "timestep_spacing", "leading", ("leading", "trailing"))
    total, runge_kutta = levels.process.schedule.num_steps, not option(config, "skip_prk_steps", False)

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(config, timesteps=timesteps, sigmas=sigmas)
        found = levels.grid(num_steps)
        num_steps = checked_steps(num_steps, total)
        if option(config, "timestep_spacing", "leading") == "trailing" and total % num_steps:
            raise InvalidInput(
                f"num_steps is {num_steps}, but PNDMScheduler with trailing indices needs a divisor of {total}."
            )
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
    solver = solvers.strided(solvers.plms(4, "heun", combined), total)
    return Scheduler(levels.process, solver, grid, begun=_one_earlier)


def _one_earlier(grid, first):
    """A run of diffusers' PLMS that begins at step 2 or later begins one step earlier, and leaves out the next one.

    Its list of indices has the second one twice, for the two evaluations of the first step, and is cut at `first`: the
    first step is made from the index before, to the one at `first`, and what it comes to is taken for the one after.
    """
    return grid if first < 2 else grid.at[first].set(grid[first - 1])


def _multistep_levels(config, kind):
    if option(config, "use_flow_sigmas", False):
        return flow_sigma_levels(config, kind, below_one=True)
    return discrete_levels(config, kind)


def _dpm_options(config):
    algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis")
    algorithm = option(config, "algorithm_type", "dpmsolver++", algorithms)
    kinds = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    kind = kinds[option(config, "solver_type", "midpoint", tuple(kinds))]
    if algorithm == "dpmsolver" and option(config, "final_sigmas_type", "zero") == "zero":
        raise InvalidInput(
            f"{config['_class_name']} says algorithm_type='dpmsolver', which needs final_sigmas_type='sigma_min'."
        )
    options: dict[str, Any] = {"solver_type": kind, "third_order": "diffusers"}
    if algorithm == "dpmsolver":
        return solvers.dpm_solver, options
    return solvers.dpm_solver_pp, {**options, "equation": "sde" if algorithm == "sde-dpmsolver++" else "ode"}


def _dpm_multistep(config):
    kind = DPM
    if option(config, "beta_schedule", "linear") == "squaredcos_cap_v2":
        kind = DPM._replace(ratios=dict.fromkeys(DPM.ratios, "floor_index"))
    levels = _multistep_levels(config, kind)
    repeats = any(config.get(name) for name in (*(f"use_{name}_sigmas" for name in WHOLE), "use_lu_lambdas"))
    return Scheduler(levels.process, _dpm_multistep_solver(config, repeats), levels.grid, _bounds(config))


def _dpm_multistep_solver(config, repeats):
    """repeats: the last level is given twice unless it is 0, so that the last step does not move."""
    method, options = _dpm_options(config)
    to_zero = option(config, "final_sigmas_type", "zero") == "zero"
    return method(
        option(config, "solver_order", 2, (1, 2, 3)),
        lower_order_final=SHORT if option(config, "lower_order_final", True) else False,
        euler_at_final=option(config, "euler_at_final", False) or to_zero,
        idle_steps=int(repeats and not to_zero),
        **options,
    )


def _dpm_singlestep(config):
    option(config, "timestep_spacing", "linspace", ("linspace",))
    levels = _multistep_levels(config, DPM._replace(terminal=None, ratios=WHOLE))
    method, options = _dpm_options(config)
    to_zero = option(config, "final_sigmas_type", "zero") == "zero"
    solver = method(
        option(config, "solver_order", 2, (1, 2, 3)),
        method="restarting",
        lower_order_final=option(config, "lower_order_final", False) or to_zero,
        euler_at_final=to_zero,
        **options,
    )
    return Scheduler(levels.process, solver, levels.grid, _bounds(config))


def _deis(config):
    levels = _multistep_levels(config, MULTISTEP._replace(end=repeated_end))
    solver = solvers.deis(
        option(config, "solver_order", 2, (1, 2, 3)),
        lower_order_final=SHORT if option(config, "lower_order_final", True) else False,
        idle_steps=int(repeated_end(config, 1) is None),
    )
    return Scheduler(levels.process, solver, levels.grid, _bounds(config))


def _unipc(config):
    kind = MULTISTEP._replace(terminal=SMALLEST_ALPHA_BAR, end=final_sigma)
    option(config, "solver_p", None, (None,))
    if any(config.get(f"use_{name}_sigmas") for name in (*WHOLE, "flow")):
        # It repeats its last sigma then, and returns what its corrector makes of x there.
        option(config, "final_sigmas_type", "zero", ("zero",))
    flow = option(config, "use_flow_sigmas", False)
    levels = flow_sigma_levels(config, kind, below_one=False) if flow else discrete_levels(config, kind)
    variants = {"bh1": "b1", "bh2": "b2", "midpoint": "b2", "heun": "b2", "logrho": "b2"}
    solver = solvers.unipc(
        option(config, "solver_order", 2, (1, 2, 3)),
        variants[option(config, "solver_type", "bh2", tuple(variants))],
        option(config, "lower_order_final", True),
        "x0" if option(config, "predict_x0", True) else "eps",
        tuple(option(config, "disable_corrector", [])),
    )
    bounds = _bounds(config) if option(config, "predict_x0", True) else _unchanged
    return Scheduler(levels.process, solver, levels.grid, bounds)


def _sa(config):
    option(config, "algorithm_type", "data_prediction", ("data_prediction",))
    option(config, "tau_func", None, (None,))
    option(config, "use_flow_sigmas", False, (False,))
    levels = discrete_levels(config, MULTISTEP._replace(ratios={}, end=repeated_end))
    total = levels.process.schedule.num_steps
    solver = solvers.sa_solver(
        option(config, "predictor_order", 2, (1, 2, 3)),
        option(config, "corrector_order", 2, (2, 3, 4)),
        1.0,
        # Noise at indices 200 to 800; half an index of slack, so that round-off leaves none out.
        (min(200.5 / total, 1.0), min(801.5 / total, 1.0)),
        option(config, "lower_order_final", True),
        "b1",
    )
    return Scheduler(levels.process, solver, levels.grid, _bounds(config))


def _lcm(config):
    levels = consistency_levels(config, CONSISTENCY)
    bounds, scaling = _bounds(config, clip=False), option(config, "timestep_scaling", 10.0)

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


def _tcd(config, eta=0.3):
    levels = consistency_levels(config, CONSISTENCY._replace(end=lambda config, steps: 1 / steps))
    solver = solvers.tcd(eta, levels.process.schedule.num_steps)
    return Scheduler(levels.process, solver, levels.grid)


def _edm(solver_of):
    def read(config):
        levels = edm_levels(config)
        high = option(config, "sigma_max", 80.0)
        return Scheduler(
            levels.process, solver_of(config), levels.grid, _bounds(config), lambda grid: (high**2 + 1) ** 0.5
        )

    return read


def _flow(config):
    levels = flow_levels(config)
    stochastic = option(config, "stochastic_sampling", False)
    return Scheduler(levels.process, solvers.lcm() if stochastic else solvers.flow_euler(), levels.grid)


def _flow_heun(config):
    return Scheduler(flow_levels(config).process, solvers.flow_heun(), flow_levels(config).grid)


SCHEDULERS: dict[str, Callable[..., Scheduler]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DEISMultistepScheduler": _deis,
    "DPMSolverMultistepScheduler": _dpm_multistep,
    "DPMSolverSinglestepScheduler": _dpm_singlestep,
    "EDMDPMSolverMultistepScheduler": _edm(lambda config: _dpm_multistep_solver(config, repeats=True)),
    "EDMEulerScheduler": _edm(lambda config: solvers.euler()),
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "HeunDiscreteScheduler": _heun,
    "KDPM2AncestralDiscreteScheduler": _kdpm2(True),
    "KDPM2DiscreteScheduler": _kdpm2(False),
    "LCMScheduler": _lcm,
    "LMSDiscreteScheduler": _lms,
    "PNDMScheduler": _pndm,
    "SASolverScheduler": _sa,
    "TCDScheduler": _tcd,
    "UniPCMultistepScheduler": _unipc,
}
"""Their class names: functions of the config."""
