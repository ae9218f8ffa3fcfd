"""Trajectories of our solvers against the diffusers schedulers: the same config, network outputs, noise, in float64.

`CASES` is the table and `solver_error` the figure of a row; the tests assert on them. Each case is a scheduler config
that `interop.read_scheduler` turns into a process, a solver and a grid, and which the peer runs itself. The peer
computes in float64 too: inside `in_double` its modules find float64 under the name float32.
"""

import contextlib
import importlib
import inspect
import logging
import warnings
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import randomness
from diffusion_jax.denoisers import denoiser
from diffusion_jax.interop.schedulers import Scheduler, read_scheduler
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network

SHAPE = (3, 4, 5)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SEQUENCE = 1500
"""Tokens, where a shift is dynamic."""


class Case(NamedTuple):
    """A scheduler of diffusers, its options, the steps of the run, and what else it is told.

    grid: what `set_timesteps` and our grid are both given. eta: what `step` and `read_scheduler` are.
    """

    scheduler: str
    options: dict[str, Any] = {}
    steps: int = 10
    grid: dict[str, Any] = {}
    eta: float | None = None


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


def _cases(scheduler, common=(), **cases):
    """Named cases of one scheduler: `name=(options, steps, ...)` or options alone."""
    short = scheduler.removesuffix("Scheduler").removesuffix("Discrete")
    rows = {}
    for name, value in cases.items():
        options, *rest = value if isinstance(value, tuple) else (value,)
        rows[f"{short}: {name.replace('_', ' ')}"] = Case(scheduler, {**dict(common), **options}, *rest)
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
        bh1={"solver_type": "bh1"},
        bh2={},
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
    ),
    **_cases("LCMScheduler", four_steps=({}, 4), v=(V, 7), clipped=({"clip_sample": True}, 4)),
    **_cases(
        "TCDScheduler",
        four_steps=({}, 4),
        gamma_0=({}, 7, {}, 0.0),
        gamma_1=(V, 4, {}, 1.0),
        sample=(X0, 7, {}, 0.3),
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
    **_cases("EDMEulerScheduler", karras={}, exponential={"sigma_schedule": "exponential"}, final_sigma_min=SIGMA_MIN),
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
}
"""Settings under which the whole trajectory must be the peer's."""


class _Double:
    """A module whose float32 is its float64."""

    def __init__(self, module):
        self.__dict__.update({"_module": module, "float32": module.float64})

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextlib.contextmanager
def in_double(module, draw):
    """Within, the peer's `module` works in float64, and draws its noise by `draw(shape)`."""
    import torch

    logging.getLogger(module.__name__).setLevel(logging.ERROR)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    replaced = {
        "np": _Double(np),
        "torch": _Double(torch),
        "randn_tensor": lambda shape, **_: torch.as_tensor(draw(tuple(shape))),
    }
    try:
        with mock.patch.multiple(module, create=True, **replaced), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)


def _model_outputs(x, k, tanh):
    return 0.4 * tanh(x) + k / 2000


def theirs(case: Case, noise: np.ndarray, noises: list[np.ndarray]) -> list[np.ndarray]:
    """The peer's x after each step, from `noise`; `noises` are those of the steps."""
    import torch

    module = importlib.import_module(f"diffusers.schedulers.{_module(case.scheduler)}")
    call = [0]
    calls_per_step = 2 if case.scheduler.startswith("KDPM2Ancestral") else 1
    with in_double(module, lambda shape: noises[call[0] // calls_per_step].reshape(shape)):
        scheduler = getattr(module, case.scheduler)(**case.options)
        scheduler.set_timesteps(**_told(case))
        if "timesteps" not in case.grid and "sigmas" not in case.grid:
            assert len(scheduler.timesteps) >= case.steps
        x = torch.as_tensor(noise) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        extra = {} if case.eta is None else {"eta": case.eta}
        outputs = []
        for i, k in enumerate(scheduler.timesteps):
            call[0] = i
            seen = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
            output = _model_outputs(seen, float(k), torch.tanh)
            x = scheduler.step(output, k, x, return_dict=False, **extra)[0]
            outputs.append(x.numpy())
    return outputs


def _module(scheduler):
    import diffusers

    return inspect.getmodule(getattr(diffusers, scheduler)).__name__.rsplit(".", 1)[-1]


def _told(case):
    told = dict(case.grid)
    if "mu" in told:
        # The pipelines' line through (256, 0.5) and (4096, 1.15).
        told["mu"] = (1.15 - 0.5) / (4096 - 256) * (told["mu"] - 256) + 0.5
    return told if case.steps is None else {"num_inference_steps": case.steps, **told}


def _after_steps(outputs: list, case: Case) -> list:
    """The calls after which the peer has made a whole step: some of its schedulers take several calls for one."""
    if "Heun" in case.scheduler or "KDPM2" in case.scheduler:
        return [*outputs[1:-1:2], outputs[-1]]
    if case.scheduler != "PNDMScheduler":
        return outputs
    return outputs[1:] if case.options.get("skip_prk_steps") else [*outputs[3:12:4], *outputs[12:]]


def read(case: Case) -> Scheduler:
    """Our scheduler of a case."""
    return read_scheduler({"_class_name": case.scheduler, **case.options}, eta=case.eta)


def ours(
    case: Case, noise: np.ndarray, scheduler: Scheduler | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Our x after each step, in the peer's scale, and the noise that each step would draw.

    scheduler: another than the one that the case says.
    """

    def model(params, x, k, cond, train=False, key=None):
        return _model_outputs(x, k.reshape(-1, *(1,) * (x.ndim - 1)), jnp.tanh), {}

    scheduler = read(case) if scheduler is None else scheduler
    told = {name: value for name, value in case.grid.items() if name != "mu"}
    grid = scheduler.grid(case.steps, seq_len=case.grid.get("mu"), **told)
    denoise = scheduler.transform(denoiser(Network(None, model), scheduler.process))
    key = jax.random.key(0)
    x = scheduler.initial_scale(grid) * jnp.asarray(noise)
    run = jax.jit(lambda x: sample(key, denoise, None, scheduler.solver, grid, x_init=x, save_every=1).trace)
    # Each case is compiled and run once: the compiler's own work is most of it.
    trace = run.lower(x).compile(compiler_options=QUICK)(x)
    keys = randomness.fold(randomness.sample_keys(key, jnp.arange(SHAPE[0])), 1)
    steps = range(len(grid) - 1)
    noises = [np.asarray(randomness.normal_like(randomness.fold(keys, i), x)) for i in steps]
    return [np.asarray(scheduler.final_scale(grid[: i + 2]) * trace[i]) for i in steps], noises


def solver_error(case: Case) -> float:
    """The largest difference, over all steps, between our run and the peer's."""
    noise = np.random.default_rng(0).normal(size=SHAPE)
    with jax.enable_x64(True):
        run, noises = ours(case, noise)
    expected = _after_steps(theirs(case, noise, noises), case)
    assert len(expected) == len(run), (len(expected), len(run))
    return max(float(np.max(np.abs(a - b))) for a, b in zip(run, expected))
