"""The settings of diffusers' schedulers under which our runs are compared with theirs: `CASES`.

How they are run is in `parity_solvers`.
"""

from typing import Any, NamedTuple

import numpy as np

SEQUENCE = 1500
"""Tokens, where a shift is dynamic."""


class Case(NamedTuple):
    """A scheduler of diffusers, its options, the steps of the run, and what else it is told.

    grid: what `set_timesteps` and our grid are both given. eta: what `step` and `read_scheduler` are.
    first: the step that the run begins at, from noised data, as image to image does.
    """

    scheduler: str
    options: dict[str, Any] = {}
    steps: int = 10
    grid: dict[str, Any] = {}
    eta: float | None = None
    first: int = 0


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
PLAIN = {"clip_sample": False}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def short_name(scheduler: str) -> str:
    """The name of a class without what all of them have in theirs."""
    return scheduler.removesuffix("Scheduler").removesuffix("Discrete")


def _cases(scheduler, common=(), **cases):
    """Named cases of one scheduler: `name=(options, steps, ...)` or options alone."""
    rows = {}
    for name, value in cases.items():
        options, *rest = value if isinstance(value, tuple) else (value,)
        rows[f"{short_name(scheduler)}: {name.replace('_', ' ')}"] = Case(scheduler, {**dict(common), **options}, *rest)
    return rows


CASES: dict[str, Case] = {
    **_cases(
        "EulerDiscreteScheduler",
        SD,
        linspace={},
        linspace_of_7=({}, 7),
        leading=LEADING,
        trailing=TRAILING,
        cosine_betas={"beta_schedule": "squaredcos_cap_v2"},
        v=(V, 7),
        sample=X0,
        karras=({**KARRAS, **V}, 12),
        exponential=EXPONENTIAL,
        beta={**BETA, **LEADING},
        zero_terminal_SNR=(ZERO_SNR, 7),
        final_sigma_min=SIGMA_MIN,
        continuous={
            **V,
            **KARRAS,
            **LEADING,
            "timestep_type": "continuous",
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
        own_timesteps=({}, None, {"timesteps": [999.0, 700.5, 400.0, 31.0]}),
        own_sigmas=({}, None, {"sigmas": [14.0, 7.0, 2.5, 0.3, 0.0]}),
        own_sigmas_to_0_3=(V, None, {"sigmas": [14.0, 7.0, 2.5, 0.3]}),
    ),
    **_cases(
        "DDIMScheduler",
        {**SD, **PLAIN},
        leading={},
        Stable_Diffusion={"set_alpha_to_one": False, "steps_offset": 1},
        trailing={**TRAILING, **V},
        trailing_of_7_constant_stride=(TRAILING, 7),
        linspace_constant_stride={"timestep_spacing": "linspace"},
        zero_terminal_SNR=(ZERO_SNR, 8),
        sample=X0,
        eta_half=({}, 10, {}, 0.5),
        eta_one=({**V, **LEADING}, 10, {}, 1.0),
        clipped={"clip_sample": True, "clip_sample_range": 0.8},
        thresholding=THRESHOLD,
    ),
    **_cases(
        "DPMSolverMultistepScheduler",
        SD,
        dpmsolver_pp_1={"solver_order": 1},
        dpmsolver_pp_2={},
        dpmsolver_pp_2_long_run=({}, 20),
        dpmsolver_pp_2_heun={"solver_type": "heun"},
        dpmsolver_pp_3={"solver_order": 3},
        dpmsolver_pp_3_long_run=({"solver_order": 3}, 18),
        dpmsolver_1={"algorithm_type": "dpmsolver", "solver_order": 1, **SIGMA_MIN},
        dpmsolver_2={"algorithm_type": "dpmsolver", **SIGMA_MIN},
        dpmsolver_2_heun={"algorithm_type": "dpmsolver", "solver_type": "heun", **SIGMA_MIN},
        dpmsolver_3=({"algorithm_type": "dpmsolver", "solver_order": 3, **SIGMA_MIN}, 16),
        sde_dpmsolver_pp_1={"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        sde_dpmsolver_pp_2={"algorithm_type": "sde-dpmsolver++"},
        sde_dpmsolver_pp_2_heun={"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        sde_dpmsolver_pp_3={"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        no_lower_order_final={"lower_order_final": False, **SIGMA_MIN, "solver_order": 3},
        euler_at_final=({"euler_at_final": True, **SIGMA_MIN}, 17),
        leading=LEADING,
        trailing=(TRAILING, 7),
        karras=KARRAS,
        karras_cosine_betas={**KARRAS, "beta_schedule": "squaredcos_cap_v2", "trained_betas": None},
        karras_sigma_min={**KARRAS, **SIGMA_MIN},
        exponential=EXPONENTIAL,
        beta=BETA,
        lu={"use_lu_lambdas": True},
        zero_terminal_SNR=(ZERO_SNR, 8),
        v=V,
        sample=X0,
        thresholding=THRESHOLD,
        lambda_min_clipped={"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        flow=FLOW,
        own_timesteps=({}, None, {"timesteps": [999, 700, 400, 31]}),
    ),
    **_cases(
        "PNDMScheduler",
        SD,
        Stable_Diffusion={"skip_prk_steps": True, "steps_offset": 1},
        v={"skip_prk_steps": True, "steps_offset": 1, **V},
        Runge_Kutta={},
        Runge_Kutta_v=({**V, "set_alpha_to_one": True}, 20),
        trailing={"skip_prk_steps": True, **TRAILING},
    ),
    **_cases(
        "FlowMatchEulerDiscreteScheduler",
        plain={},
        shift=({"shift": 3.0}, 7),
        dynamic_shift=({"use_dynamic_shifting": True}, 7, {"mu": SEQUENCE}),
        dynamic_linear_shift=({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 7, {"mu": SEQUENCE}),
        own_sigmas=({"use_dynamic_shifting": True}, None, {"mu": SEQUENCE, "sigmas": np.linspace(1.0, 0.2, 5)}),
        own_timesteps=({}, None, {"timesteps": [1000.0, 750.0, 400.5, 31.0]}),
        terminal=({"shift": 3.0, "shift_terminal": 0.1}, 7),
        karras={"shift": 3.0, **KARRAS},
        exponential=EXPONENTIAL,
        beta=BETA,
        stochastic={"stochastic_sampling": True},
    ),
    **_cases(
        "EulerAncestralDiscreteScheduler",
        SD,
        linspace=({}, 7),
        leading=LEADING,
        v={**TRAILING, **V},
        zero_terminal_SNR=(ZERO_SNR, 8),
    ),
    **_cases(
        "DDPMScheduler",
        {"clip_sample": False},
        fixed_small={},
        fixed_small_log={"variance_type": "fixed_small_log"},
        fixed_large={"variance_type": "fixed_large"},
        fixed_large_trailing={"variance_type": "fixed_large", **TRAILING},
        clipped={"clip_sample": True},
        thresholding={**THRESHOLD, **SD},
        v=({**V, "timestep_spacing": "linspace"}, 7),
        zero_terminal_SNR=({**SD, **ZERO_SNR}, 7),
        sigmoid_betas={"beta_schedule": "sigmoid"},
        own_betas={"trained_betas": np.linspace(0.01, 0.2, 20).tolist(), "num_train_timesteps": 20},
        own_timesteps=({}, None, {"timesteps": [999, 700, 400, 31]}),
    ),
    **_cases(
        "UniPCMultistepScheduler",
        SD,
        bh2={},
        bh1={"solver_type": "bh1"},
        order_1={"solver_order": 1},
        order_3=({"solver_order": 3}, 12),
        no_lower_order_final={"lower_order_final": False, **SIGMA_MIN},
        noise={"predict_x0": False, **SIGMA_MIN},
        disabled_corrector={"disable_corrector": [0, 3]},
        karras=KARRAS,
        exponential=EXPONENTIAL,
        beta=BETA,
        v=({**V, **LEADING}, 7),
        zero_terminal_SNR=(ZERO_SNR, 8),
        thresholding=THRESHOLD,
        flow=FLOW,
        flow_karras={**FLOW, **KARRAS},
        dynamic_shift=({**FLOW, "use_dynamic_shifting": True}, 10, {"mu": SEQUENCE}),
        flow_own_sigmas=(FLOW, None, {"sigmas": np.array([1.0, 0.75, 0.4, 0.1])}),
    ),
    **_cases(
        "HeunDiscreteScheduler",
        SD,
        linspace=({}, 7),
        leading=LEADING,
        karras=KARRAS,
        exponential=EXPONENTIAL,
        beta=BETA,
        v={**V, **TRAILING},
        sample=X0,
        clipped={"clip_sample": True},
        own_timesteps=({}, None, {"timesteps": [999, 700, 400, 31]}),
    ),
    **_cases(
        "LCMScheduler",
        four_steps=({}, 4),
        v=(V, 7),
        clipped=({"clip_sample": True}, 4),
        own_timesteps=({}, None, {"timesteps": [999, 759, 499, 259]}),
    ),
    **_cases(
        "TCDScheduler",
        four_steps=({}, 4),
        gamma_0=({}, 7, {}, 0.0),
        gamma_1=(V, 4, {}, 1.0),
        sample=(X0, 7, {}, 0.3),
        own_timesteps=({}, None, {"timesteps": [999, 759, 499, 259]}, 0.3),
    ),
    **_cases(
        "LMSDiscreteScheduler",
        SD,
        linspace=({}, 7),
        leading=LEADING,
        karras=KARRAS,
        exponential=EXPONENTIAL,
        beta=BETA,
        v=V,
    ),
    **_cases(
        "DEISMultistepScheduler",
        SD,
        order_1={"solver_order": 1},
        order_2={},
        order_3={"solver_order": 3},
        order_3_long_run=({"solver_order": 3}, 17),
        karras=KARRAS,
        exponential=EXPONENTIAL,
        v={**V, **LEADING},
        thresholding=THRESHOLD,
        flow=FLOW,
    ),
    **_cases(
        "KDPM2DiscreteScheduler", SD, linspace=({}, 7), trailing={**TRAILING, **V}, exponential=EXPONENTIAL, beta=BETA
    ),
    **_cases("KDPM2AncestralDiscreteScheduler", SD, linspace=({}, 7), leading=LEADING, exponential=EXPONENTIAL),
    **_cases(
        "EDMEulerScheduler", karras={}, v=V, exponential={"sigma_schedule": "exponential"}, final_sigma_min=SIGMA_MIN
    ),
    **_cases(
        "EDMDPMSolverMultistepScheduler",
        order_2={},
        order_3=({"solver_order": 3, "sigma_data": 1.0}, 16),
        heun={"solver_type": "heun"},
        sde={"algorithm_type": "sde-dpmsolver++"},
        final_sigma_min=(SIGMA_MIN, 16),
        thresholding=THRESHOLD,
    ),
    **_cases(
        "DPMSolverSinglestepScheduler",
        SD,
        order_1={"solver_order": 1},
        order_2={},
        order_2_odd=({"solver_type": "heun"}, 9),
        order_3=({"solver_order": 3}, 9),
        order_3_of_10=({"solver_order": 3, "solver_type": "heun"}, 10),
        order_3_of_11=({"solver_order": 3, "solver_type": "heun", **SIGMA_MIN}, 11),
        whole_blocks=({"solver_order": 3, **SIGMA_MIN}, 9),
        dpmsolver={"algorithm_type": "dpmsolver", **SIGMA_MIN},
        dpmsolver_3=({"algorithm_type": "dpmsolver", "solver_type": "heun", "solver_order": 3, **SIGMA_MIN}, 9),
        sde={"algorithm_type": "sde-dpmsolver++"},
        sde_3=({"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "solver_order": 3}, 10),
        karras=KARRAS,
        thresholding=THRESHOLD,
        own_timesteps=({}, None, {"timesteps": [999, 700, 400, 31]}),
    ),
    **_cases(
        "SASolverScheduler",
        SD,
        order_2={},
        order_3=({"predictor_order": 3, "corrector_order": 4}, 12),
        order_1={"predictor_order": 1},
        no_lower_order_final={"lower_order_final": False, "corrector_order": 3},
        v={**V, **TRAILING},
        thresholding=THRESHOLD,
    ),
    **_cases("FlowMatchHeunDiscreteScheduler", plain=({}, 7), shift=({"shift": 3.0}, 7)),
    **_cases("FlowMatchLCMScheduler", plain=({}, 4), shift=({"shift": 3.0}, 4), karras=KARRAS),
    **_cases("DDIMParallelScheduler", {**SD, **PLAIN}, leading={}, trailing_v=({**TRAILING, **V}, 7)),
    **_cases("DDPMParallelScheduler", {**SD, **PLAIN}, fixed_small={}, linspace=({"timestep_spacing": "linspace"}, 7)),
    **_cases(
        "CogVideoXDDIMScheduler",
        {**V, **PLAIN},
        of_2B={**TRAILING, "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0},
        of_5B={**TRAILING, "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0},
        leading_epsilon={"prediction_type": "epsilon", "steps_offset": 1, "set_alpha_to_one": False},
        of_7=({**TRAILING, "rescale_betas_zero_snr": True}, 7),
    ),
    **_cases(
        "CogVideoXDPMScheduler",
        V,
        of_5B={**TRAILING, "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0},
        leading_sample={"prediction_type": "sample", "steps_offset": 1},
        linspace=({"timestep_spacing": "linspace"}, 7),
    ),
    **_cases("DPMSolverSDEScheduler", SD, linspace=({}, 7), leading_v={**LEADING, **V}, karras=KARRAS, beta=BETA),
    **_cases(
        "CosineDPMSolverMultistepScheduler",
        stable_audio={},
        heun=({"solver_type": "heun", "sigma_schedule": "karras"}, 16),
        order_1={"solver_order": 1, "prediction_type": "epsilon"},
        final_sigma_min=(SIGMA_MIN, 16),
    ),
    **_cases("IPNDMScheduler", plain=({}, 10)),
}
"""Settings under which the whole trajectory must be the peer's."""


_OF_IMAGES = {
    "DDIM": Case("DDIMScheduler", {**SD, **PLAIN, "steps_offset": 1, "set_alpha_to_one": False}),
    "DDIM trailing": Case("DDIMScheduler", {**SD, **PLAIN, **TRAILING}, 7),
    "DDPM": Case("DDPMScheduler", {**SD, **PLAIN}),
    "PNDM": Case("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    "PNDM of v": Case("PNDMScheduler", {**SD, "skip_prk_steps": True, **V}, 9),
    "Euler": Case("EulerDiscreteScheduler", {**SD, **LEADING}),
    "Euler ancestral": Case("EulerAncestralDiscreteScheduler", SD),
    "Heun": Case("HeunDiscreteScheduler", SD),
    "KDPM2": Case("KDPM2DiscreteScheduler", SD),
    "KDPM2 ancestral": Case("KDPM2AncestralDiscreteScheduler", {**SD, **LEADING}),
    "LMS": Case("LMSDiscreteScheduler", SD, 12),
    "LMS Karras": Case("LMSDiscreteScheduler", {**SD, **KARRAS}),
    "DPM++ 2M": Case("DPMSolverMultistepScheduler", SD, 20),
    "DPM++ 2M Karras": Case("DPMSolverMultistepScheduler", {**SD, **KARRAS}, 20),
    "DPM++ 3M": Case("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, 20),
    "DPM++ 3M SDE": Case(
        "DPMSolverMultistepScheduler", {**SD, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, 16
    ),
    "DPM++ 2M to sigma_min": Case("DPMSolverMultistepScheduler", {**SD, **SIGMA_MIN}, 20),
    "DPM++ 2M Karras to sigma_min": Case("DPMSolverMultistepScheduler", {**SD, **KARRAS, **SIGMA_MIN}, 20),
    "DPM++ 2S": Case("DPMSolverSinglestepScheduler", SD),
    "DPM++ 3S": Case("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3, **SIGMA_MIN}, 12),
    "DEIS": Case("DEISMultistepScheduler", SD, 20),
    "DEIS order 3": Case("DEISMultistepScheduler", {**SD, "solver_order": 3}, 16),
    "UniPC": Case("UniPCMultistepScheduler", SD, 12),
    "UniPC order 3": Case("UniPCMultistepScheduler", {**SD, "solver_order": 3, "disable_corrector": [6]}, 12),
    "SA-Solver": Case("SASolverScheduler", SD, 12),
    "LCM": Case("LCMScheduler", {}, 8),
    "TCD": Case("TCDScheduler", {}, 8, {}, 0.3),
}
IMAGE_CASES: dict[str, Case] = {
    f"{name}, from {first} of {case.steps}": case._replace(first=first)
    for name, case in _OF_IMAGES.items()
    for first in (case.steps // 2, case.steps // 3, *([1] if name.startswith("PNDM") else []))
    if case.steps
}
"""Runs that begin in the middle of their grid, as image to image does."""

FEW = (1, 2, 3, 5)
FEW_CASES: dict[str, Case] = {
    f"{short_name(scheduler)}, {steps} step{'s' * (steps > 1)}": case._replace(steps=steps)
    for scheduler, case in {case.scheduler: case for case in reversed(CASES.values()) if case.steps}.items()
    for steps in FEW
    # With one index a step, the peer's runs of these numbers end elsewhere; ours refuses the second.
    if (scheduler, steps) not in (("PNDMScheduler", 2), ("CogVideoXDPMScheduler", 3))
}
"""The first case of each class in few steps."""
