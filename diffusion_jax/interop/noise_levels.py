"""The noise of a diffusers scheduler config: its process, and the grids that its options of spacing mean.

Here: `scheduler_config.json` -> `Levels(process, grid)`. What a scheduler does with its levels is in `schedulers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes import (
    EDM,
    Cosine,
    DiscreteVP,
    GaussianProcess,
    Linear,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr_betas,
)
from diffusion_jax.timesteps import NOISE_RATIOS, SPACINGS, from_array, from_indices, from_noise_ratios

PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "original_sample": "x0", "v_prediction": "v"}
SMALLEST_ALPHA_BAR = 2.0**-24
"""alpha_bar of the last step at zero terminal SNR in the schedulers that work with sigma / alpha."""


class Levels(NamedTuple):
    """process: what the network predicts and is fed. grid: (num_steps, seq_len, timesteps, sigmas) -> [S + 1]."""

    process: GaussianProcess
    grid: Callable[..., Any]


class SchedulerClass(NamedTuple):
    """How one class of schedulers reads the options of noise that it shares with others.

    spacing, beta_schedule, beta_start, beta_end: its defaults.
    following: spaces S + 1 indices and leaves out the last, instead of S.
    rounded: rounds indices to whole ones.
    terminal: alpha_bar of the last step at zero terminal SNR; None where it has no such option.
    ratios: what its network is fed for each of `use_{name}_sigmas` (and `lu`), a key of `NETWORK_TIMES`.
    between: interpolation of its table; None is that of the grid: log(sigma) for the sigmas of `ratios`, else sigma.
    spaced_ends: those sigmas span the spaced indices, instead of the whole table.
    end: (config, T) -> the last time, or None for that of the last level again.
    """

    spacing: str = "linspace"
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    following: bool = False
    rounded: bool = False
    terminal: float | None = None
    ratios: dict[str, str] = {}
    between: str | None = None
    spaced_ends: bool = True
    end: Callable[[dict, int], float | None] = lambda config, steps: 0.0


def option(config: dict[str, Any], name: str, default: Any, allowed: tuple = ()) -> Any:
    """`config[name]`, or the class's `default`; InvalidInput unless it is among `allowed`, if that is given."""
    value = config.get(name, default)
    if allowed and value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise InvalidInput(f"{config['_class_name']} says {name}={value!r}, but only {choices} can be read.")
    return value


def final_sigma(config: dict, steps: int) -> float:
    """The last time by `final_sigmas_type`: 0, or that of index 0."""
    return 0.0 if option(config, "final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero" else 1 / steps


def final_alpha(default: bool) -> Callable[[dict, int], float]:
    """The last time by `set_alpha_to_one`: 0, or that of index 0."""
    return lambda config, steps: 0.0 if option(config, "set_alpha_to_one", default) else 1 / steps


def betas_of(config: dict[str, Any], kind: SchedulerClass) -> tuple[float, ...]:
    """The table of betas of a config."""
    steps = option(config, "num_train_timesteps", 1000)
    ends = option(config, "beta_start", kind.beta_start), option(config, "beta_end", kind.beta_end)
    tables = {
        "linear": lambda: linear_betas(steps, *ends),
        "scaled_linear": lambda: scaled_linear_betas(steps, *ends),
        "squaredcos_cap_v2": lambda: cosine_betas(steps),
        "sigmoid": lambda: sigmoid_betas(steps, *ends),
    }
    if config.get("trained_betas") is not None:
        table = tuple(float(beta) for beta in config["trained_betas"])
    else:
        table = tables[option(config, "beta_schedule", kind.beta_schedule, tuple(tables))]()
    if option(config, "rescale_betas_zero_snr", False):
        if kind.terminal is None:
            raise InvalidInput(f"{config['_class_name']} has no rescale_betas_zero_snr, which is true.")
        table = zero_terminal_snr_betas(table, kind.terminal)
    return table


def prediction_of(config: dict[str, Any], allowed: tuple = ("epsilon", "sample", "v_prediction")) -> str:
    """Our name of `prediction_type`."""
    return PREDICTIONS[option(config, "prediction_type", "epsilon", allowed)]


def chosen_ratios(config: dict[str, Any], kind: SchedulerClass) -> str | None:
    """Which of the `use_..._sigmas` is on: 'karras', 'exponential', 'beta', 'lu', or None."""
    names = {name: f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")} | {"lu": "use_lu_lambdas"}
    chosen = [name for name, field in names.items() if config.get(field)]
    if len(chosen) > 1:
        raise InvalidInput(f"{config['_class_name']} says both {names[chosen[0]]} and {names[chosen[1]]}; choose one.")
    if not chosen:
        return None
    if chosen[0] not in kind.ratios:
        raise InvalidInput(f"{config['_class_name']} says {names[chosen[0]]}=true, which cannot be read for it.")
    return chosen[0]


def _clipped_steps(config, schedule):
    """How many indices have at least the log(alpha / sigma) of `lambda_min_clipped`."""
    with np.errstate(divide="ignore"):
        lam = -np.log(schedule.noise_ratios[1:])
    return int(np.sum(lam >= float(option(config, "lambda_min_clipped", -np.inf))))


def checked_steps(steps: int | None, num_train_steps: int) -> int:
    """`steps`; InvalidInput unless it is a number of steps that a table of `num_train_steps` has."""
    if steps is None:
        raise InvalidInput("num_steps is None, but without timesteps= or sigmas= it must be a number of steps.")
    if not 1 <= steps <= num_train_steps:
        raise invalid("num_steps", steps, f"it must lie in 1 .. {num_train_steps}")
    return steps


def refuse(config: dict[str, Any], **given: Any) -> None:
    """Raises InvalidInput for anything that was given to a grid (not None) and that its class cannot take."""
    for name, value in given.items():
        if value is not None:
            raise InvalidInput(f"{name} is given, but {config['_class_name']} as it is configured takes no {name}.")


def discrete_levels(
    config: dict[str, Any], kind: SchedulerClass, allowed: tuple = ("epsilon", "sample", "v_prediction")
):
    """Levels of a table of betas: spaced indices, or noise ratios found in the table."""
    name = chosen_ratios(config, kind)
    between = kind.between or ("log_sigma" if name else "variance" if kind.rounded else "sigma")
    schedule = DiscreteVP(betas_of(config, kind), between)
    process = GaussianProcess(schedule, prediction_of(config, allowed), kind.ratios[name] if name else "index")
    total = schedule.num_steps
    levels = schedule.noise_ratios[1:]
    spacing = option(config, "timestep_spacing", kind.spacing, tuple(SPACINGS))
    offset = option(config, "steps_offset", 0)
    last = _clipped_steps(config, schedule) if kind.following else total
    end = kind.end(config, total)

    def indices(steps):
        if kind.following and spacing != "trailing":
            spaced = SPACINGS[spacing](steps + 1, last, offset)[:-1]
        elif last != total:
            spaced = np.round(np.arange(last, 0, -total / steps)) - 1.0
        else:
            spaced = SPACINGS[spacing](steps, last, offset)
        return np.round(spaced) if kind.rounded else spaced

    def ratios(name, steps):
        span = np.interp(indices(steps), np.arange(total), levels) if kind.spaced_ends else levels[::-1]
        least, most = config.get("sigma_min"), config.get("sigma_max")
        shape = NOISE_RATIOS["exponential" if name == "lu" else name]
        return shape(steps, span[-1] if least is None else least, span[0] if most is None else most)

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(config, sigmas=sigmas, timesteps=timesteps if name else None)
        if name:
            found = ratios(name, checked_steps(num_steps, total))
        else:
            spaced = (
                indices(checked_steps(num_steps, total)) if timesteps is None else np.asarray(timesteps, np.float64)
            )
            if between != "log_sigma" and end is not None:
                return from_indices(spaced, total, end)
            found = np.interp(spaced, np.arange(total), levels)
        if found[0] > levels[-1] * (1 + 1e-6):
            raise invalid("sigma_max", float(found[0]), f"the table of betas ends at {float(levels[-1]):g}")
        times = from_noise_ratios(process, found)
        # Some classes end where the last level is: a step that does not move.
        idle = end is None or end > float(times[-2]) * (1 - 1e-6)
        return times.at[-1].set(times[-2] if idle else end)

    return Levels(process, grid)


def repeated_end(config: dict, steps: int) -> float | None:
    """The last time of the classes that end at index 0, or where their chosen sigmas do (None)."""
    chosen = any(config.get(f"use_{name}_sigmas") for name in ("karras", "exponential", "beta", "flow"))
    return None if chosen else 1 / steps


def continuous_levels(config: dict[str, Any], kind: SchedulerClass) -> Levels:
    """Euler's `timestep_type='continuous'`: the network is fed log(sigma / alpha) / 4 (stable video diffusion).

    The levels may lie outside of the table of betas, so the process is a cosine, which has them all.
    """
    inner = discrete_levels({**config, "sigma_min": None, "sigma_max": None}, kind)
    process = GaussianProcess(Cosine(), "v", "log_sigma")
    name = chosen_ratios(config, kind)
    if name is None:
        return Levels(GaussianProcess(inner.process.schedule, "v", "log_sigma"), inner.grid)

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(config, sigmas=sigmas, timesteps=timesteps)
        spaced = inner.grid(num_steps)
        table = inner.process.schedule
        ends = [config.get(field) for field in ("sigma_min", "sigma_max")]
        default = float(np.exp(-0.5 * table.log_snr(spaced[-2]))), float(np.exp(-0.5 * table.log_snr(spaced[0])))
        span = [default[i] if value is None else value for i, value in enumerate(ends)]
        end = float(process.inverse_log_snr(-2 * np.log(table.noise_ratios[1]))) if kind.end(config, 1) else 0.0
        return from_noise_ratios(process, NOISE_RATIOS[name](num_steps, *span), end)

    return Levels(process, grid)


def consistency_levels(config: dict[str, Any], kind: SchedulerClass) -> Levels:
    """LCM's and TCD's: every so many of the `original_inference_steps` steps that the student was trained on."""
    schedule = DiscreteVP(betas_of(config, kind))
    process = GaussianProcess(schedule, prediction_of(config), "index")
    total, original = schedule.num_steps, option(config, "original_inference_steps", 50)
    trained = np.arange(original, 0, -1) * (total // original) - 1
    end = kind.end(config, total) or 0.0

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(config, sigmas=sigmas)
        if timesteps is not None:
            return from_indices(timesteps, total, end)
        steps = checked_steps(num_steps, original)
        chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
        return from_indices(trained[chosen], total, end)

    return Levels(process, grid)


def edm_levels(config: dict[str, Any]) -> Levels:
    """Karras et al. 2022 as it is: sigma from `sigma_max` to `sigma_min`, then 0 or `sigma_min` again."""
    option(config, "prediction_type", "epsilon", ("epsilon",))
    low, high = option(config, "sigma_min", 0.002), option(config, "sigma_max", 80.0)
    name = option(config, "sigma_schedule", "karras", ("karras", "exponential"))
    shape = {"rho": option(config, "rho", 7.0)} if name == "karras" else {}
    process = GaussianProcess(EDM(high), "edm", "log_sigma", option(config, "sigma_data", 0.5))

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(config, sigmas=sigmas, timesteps=timesteps)
        ratios = NOISE_RATIOS[name](checked_steps(num_steps, 10**9), low, high, **shape)
        found = from_noise_ratios(process, ratios, 0.0)
        return found.at[-1].set(found[-2] if final_sigma(config, 1) else 0.0)

    return Levels(process, grid)


def _flow_process(config, time):
    if option(config, "num_train_timesteps", 1000) != 1000:
        raise InvalidInput(
            f"{config['_class_name']} says num_train_timesteps={config['num_train_timesteps']}, "
            "but a flow's network is fed 1000 t: only 1000 can be read."
        )
    prediction = {"flow_prediction": "velocity", "epsilon": "epsilon", "sample": "x0"}
    return GaussianProcess(
        Linear(), prediction[option(config, "prediction_type", "flow_prediction", tuple(prediction))], time
    )


def _shifted(config, field, sigmas, seq_len):
    """The static or the dynamic shift, then the stretch to `shift_terminal`."""
    if option(config, "use_dynamic_shifting", False):
        if seq_len is None:
            raise InvalidInput(
                f"seq_len is None, but {config['_class_name']} says use_dynamic_shifting=true: it must be the "
                "number of tokens of the image."
            )
        first, last = option(config, "base_image_seq_len", 256), option(config, "max_image_seq_len", 4096)
        low, high = option(config, "base_shift", 0.5), option(config, "max_shift", 1.15)
        mu = low + (high - low) * (seq_len - first) / (last - first)
        kind = option(config, "time_shift_type", "exponential", ("exponential", "linear"))
        shift = float(np.exp(mu)) if kind == "exponential" else mu
    else:
        shift = option(config, field, 1.0)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    terminal = option(config, "shift_terminal", None)
    return sigmas if not terminal else 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


def flow_levels(config: dict[str, Any]) -> Levels:
    """FlowMatchEuler's and FlowMatchHeun's: sigma = t, shifted.

    Without `sigmas` they lie between 1 and 1 / 1000, of which the lower end has then been shifted twice (diffusers
    shifts it when the scheduler is made, and the whole grid again).
    """
    option(config, "invert_sigmas", False, (False,))
    process = _flow_process(config, "1000t")
    name = chosen_ratios(config, SchedulerClass(ratios=dict.fromkeys(("karras", "exponential", "beta"), "1000t")))
    static = 1.0 if option(config, "use_dynamic_shifting", False) else option(config, "shift", 1.0)

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        if sigmas is not None and timesteps is not None:
            raise InvalidInput("sigmas and timesteps are both given; choose one.")
        if timesteps is not None:
            sigmas = np.asarray(timesteps, np.float64) / 1000
        elif sigmas is None:
            last = static * 1e-3 / (1 + (static - 1) * 1e-3)
            sigmas = np.linspace(1.0, last, checked_steps(num_steps, 10**9))
        found = _shifted(config, "shift", np.asarray(sigmas, np.float64), seq_len)
        if name:
            found = NOISE_RATIOS[name](
                len(found),
                found[-1] if config.get("sigma_min") is None else config["sigma_min"],
                found[0] if config.get("sigma_max") is None else config["sigma_max"],
            )
        return from_array(np.append(np.minimum(found, 1.0), 0.0))

    return Levels(process, grid)


def flow_sigma_levels(config: dict[str, Any], kind: SchedulerClass, below_one: bool) -> Levels:
    """`use_flow_sigmas` of the multistep schedulers, whose networks are fed whole numbers.

    below_one: the grid begins at 1 - 1 / 1000 before it is shifted (DPM-Solver, DEIS); else at 1 - 1e-6 (UniPC).
    """
    process = _flow_process(config, "floor_1000t")
    name = chosen_ratios(config, kind)
    if name and below_one:
        raise InvalidInput(f"{config['_class_name']} says both use_flow_sigmas and use_{name}_sigmas; choose one.")
    levels = DiscreteVP(betas_of(config, kind)).noise_ratios[1:]
    end = kind.end(config, 1)
    # The last sigma by 'sigma_min' is that of the table of betas, read as one of the flow.
    end = {0.0: 0.0, 1.0: float(levels[0]), None: 1.0}[end]

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(config, timesteps=timesteps, sigmas=sigmas if below_one or name else None)
        if sigmas is None:
            steps = checked_steps(num_steps, 10**9)
            if name:
                return from_noise_ratios(process, NOISE_RATIOS[name](steps, levels[0], levels[-1]))
            spaced = np.linspace(1, 1e-3, steps + 1)
            sigmas = (1.0 - spaced)[::-1][:-1] if below_one else spaced[:-1]
        found = _shifted(config, "flow_shift", np.asarray(sigmas, np.float64), seq_len)
        if not below_one:
            found = np.append(found[0] - 1e-6 * (abs(found[0] - 1) < 1e-6), found[1:])
        return from_array(np.append(found, min(end, found[-1])))

    return Levels(process, grid)
