"""The scheduler classes of diffusers whose methods are multi-step in log(alpha / sigma): DPM-Solver, DEIS, UniPC, SA.

They share how they space indices, and their flows. See `scheduler_classes`, which has the others.
"""

from collections.abc import Callable
from typing import Any

from diffusion_jax import solvers
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.flow_levels import flow_sigma_levels
from diffusion_jax.interop.noise_levels import (
    SMALLEST_ALPHA_BAR,
    SchedulerClass,
    discrete_levels,
    final_sigma,
    on,
    repeated_end,
)
from diffusion_jax.interop.scheduler_classes import Scheduler, bounds_of, unchanged
from diffusion_jax.typing import Solver

SHORT = 15
"""DPM-Solver and DEIS lower their order at the end in runs of fewer steps than this."""

WHOLE = {"karras": "nearest_index", "exponential": "floor_index", "beta": "floor_index"}
MULTISTEP = SchedulerClass(following=True, rounded=True, spaced_ends=False, ratios=WHOLE)
DPM = MULTISTEP._replace(terminal=SMALLEST_ALPHA_BAR, end=final_sigma, ratios={**WHOLE, "lu": "nearest_index"})


def _multistep_levels(fields, kind):
    if on(fields, "use_flow_sigmas"):
        return flow_sigma_levels(fields, kind, below_one=True)
    return discrete_levels(fields, kind)


def _dpm_options(fields):
    algorithm = fields.choice("algorithm_type", ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "deis"))
    kinds = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    kind = kinds[fields.choice("solver_type", tuple(kinds))]
    # What a network says of the variance is told apart where it is loaded.
    fields.choice("variance_type", (None, "learned", "learned_range"))
    if algorithm == "dpmsolver" and not final_sigma(fields, 1):
        raise fields.wrong("algorithm_type", "it needs final_sigmas_type='sigma_min'")
    options: dict[str, Any] = {"solver_type": kind, "third_order": "diffusers"}
    if algorithm == "dpmsolver":
        return solvers.dpm_solver, options
    return solvers.dpm_solver_pp, {**options, "equation": "sde" if algorithm == "sde-dpmsolver++" else "ode"}


def _dpm_multistep(fields):
    kind = DPM
    if fields.raw("beta_schedule", "linear") == "squaredcos_cap_v2":
        kind = DPM._replace(ratios=dict.fromkeys(DPM.ratios, "floor_index"))
    levels = _multistep_levels(fields, kind)
    repeats = any(on(fields, name) for name in (*(f"use_{name}_sigmas" for name in WHOLE), "use_lu_lambdas"))
    return Scheduler(levels.process, dpm_multistep_solver(fields, repeats), levels.grid, bounds_of(fields))


def dpm_multistep_solver(fields: Fields, repeats: bool) -> Solver:
    """repeats: the last level is given twice unless it is 0, so that the last step does not move."""
    method, options = _dpm_options(fields)
    to_zero = not final_sigma(fields, 1)
    return method(
        fields.choice("solver_order", (1, 2, 3), 2),
        lower_order_final=SHORT if fields.flag("lower_order_final", True) else False,
        euler_at_final=on(fields, "euler_at_final") or to_zero,
        idle_steps=int(repeats and not to_zero),
        **options,
    )


def _dpm_singlestep(fields):
    kind = DPM._replace(terminal=None, ratios=WHOLE, spacings=("linspace",))
    levels = _multistep_levels(fields, kind)
    method, options = _dpm_options(fields)
    to_zero = not final_sigma(fields, 1)
    solver = method(
        fields.choice("solver_order", (1, 2, 3), 2),
        method="restarting",
        lower_order_final=fields.flag("lower_order_final", False) or to_zero,
        euler_at_final=to_zero,
        **options,
    )
    return Scheduler(levels.process, solver, levels.grid, bounds_of(fields))


def _deis(fields):
    fields.choice("algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))
    fields.choice("solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    levels = _multistep_levels(fields, MULTISTEP._replace(end=repeated_end))
    solver = solvers.deis(
        fields.choice("solver_order", (1, 2, 3), 2),
        lower_order_final=SHORT if fields.flag("lower_order_final", True) else False,
        idle_steps=int(repeated_end(fields, 1) is None),
    )
    return Scheduler(levels.process, solver, levels.grid, bounds_of(fields))


def _unipc(fields):
    kind = MULTISTEP._replace(terminal=SMALLEST_ALPHA_BAR, end=final_sigma)
    fields.choice("solver_p", (None,))
    flow = on(fields, "use_flow_sigmas")
    if final_sigma(fields, 1) and (flow or any(on(fields, f"use_{name}_sigmas") for name in WHOLE)):
        # Its corrector would be the last to change x, where the last sigma is given twice.
        raise fields.wrong("final_sigmas_type", "with these sigmas only 'zero' can be read")
    levels = flow_sigma_levels(fields, kind, below_one=False) if flow else discrete_levels(fields, kind)
    of_x0 = fields.flag("predict_x0", True)
    variants = {"bh1": "b1", "bh2": "b2", "midpoint": "b2", "heun": "b2", "logrho": "b2"}
    solver = solvers.unipc(
        fields.choice("solver_order", (1, 2, 3), 2),
        variants[fields.choice("solver_type", tuple(variants), "bh2")],
        fields.flag("lower_order_final", True),
        "x0" if of_x0 else "eps",
        fields.wholes("disable_corrector", (), 0, count=1000) if fields.raw("disable_corrector") else (),
    )
    bounds = bounds_of(fields)
    bounds = bounds if of_x0 else unchanged
    return Scheduler(levels.process, solver, levels.grid, bounds)


def _sa(fields):
    fields.choice("algorithm_type", ("data_prediction",))
    fields.choice("tau_func", (None,))
    fields.choice("variance_type", (None, "learned", "learned_range"))
    if on(fields, "use_flow_sigmas"):
        raise fields.wrong("use_flow_sigmas", "only false can be read for this class")
    levels = discrete_levels(fields, MULTISTEP._replace(ratios={}, end=repeated_end))
    total = levels.process.schedule.num_steps
    solver = solvers.sa_solver(
        fields.choice("predictor_order", (1, 2, 3), 2),
        fields.choice("corrector_order", (2, 3, 4), 2),
        1.0,
        # Noise at indices 200 to 800; half an index of slack, so that round-off leaves none out.
        (min(200.5 / total, 1.0), min(801.5 / total, 1.0)),
        fields.flag("lower_order_final", True),
        "b1",
    )
    return Scheduler(levels.process, solver, levels.grid, bounds_of(fields))


MULTISTEP_CLASSES: dict[str, Callable[..., Scheduler]] = {
    "DEISMultistepScheduler": _deis,
    "DPMSolverMultistepScheduler": _dpm_multistep,
    "DPMSolverSinglestepScheduler": _dpm_singlestep,
    "SASolverScheduler": _sa,
    "UniPCMultistepScheduler": _unipc,
}
"""Their class names: functions of the fields of the config."""
