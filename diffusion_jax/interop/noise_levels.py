"""The noise of a diffusers scheduler config: its process, and the grids that its options of spacing mean.

Here: the fields of `scheduler_config.json` -> `Levels(process, grid)`, for the schedulers that know a table of betas.
Flows and EDM are in `flow_levels`; what a scheduler does with its levels is in `scheduler_classes`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.told_times import peer_betas, peer_indices, peer_noise_ratios, told_exactly
from diffusion_jax.processes import (
    Cosine,
    DiscreteVP,
    GaussianProcess,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr_betas,
)
from diffusion_jax.timesteps import NOISE_RATIOS, SPACINGS, from_array, from_indices, times_at_noise_ratios

PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
SMALLEST_ALPHA_BAR = 2.0**-24
"""alpha_bar of the last step at zero terminal SNR in the schedulers that work with sigma / alpha."""

MOST_STEPS = 10**5
"""The longest table of betas that is believed, a hundred times the usual one."""


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
    spacings: the `timestep_spacing` that it has.
    own_sigmas: takes sigmas, the last of them too, in place of spaced ones.
    end: (fields, T) -> the last time, or None for that of the last level again.
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
    spacings: tuple[str, ...] = ("linspace", "leading", "trailing")
    own_sigmas: bool = False
    end: Callable[[Fields, int], float | None] = lambda fields, steps: 0.0


def on(fields: Fields, name: str) -> bool:
    """A flag that is false unless it is given; null is false."""
    return bool(fields.flag(name, None))


def final_sigma(fields: Fields, steps: int) -> float:
    """The last time by `final_sigmas_type`: 0, or that of index 0."""
    return 0.0 if fields.choice("final_sigmas_type", ("zero", "sigma_min")) == "zero" else 1 / steps


def final_alpha(default: bool) -> Callable[[Fields, int], float]:
    """The last time by `set_alpha_to_one`: 0, or that of index 0."""
    return lambda fields, steps: 0.0 if fields.flag("set_alpha_to_one", default) else 1 / steps


def repeated_end(fields: Fields, steps: int) -> float | None:
    """The last time of the classes that end at index 0, or where their chosen sigmas do (None)."""
    chosen = any(on(fields, f"use_{name}_sigmas") for name in ("karras", "exponential", "beta", "flow"))
    return None if chosen else 1 / steps


def _formula(fields, kind):
    """What its betas are computed from, where that is not a table: the schedule and its ends."""
    ends = tuple(fields.positive(f"beta_{end}", getattr(kind, f"beta_{end}")) for end in ("start", "end"))
    plain = fields.raw("trained_betas") is None and not on(fields, "rescale_betas_zero_snr")
    return fields.raw("beta_schedule", kind.beta_schedule) if plain else None, ends


def betas_of(fields: Fields, kind: SchedulerClass) -> tuple[float, ...]:
    """The table of betas of a config."""
    steps = fields.whole("num_train_timesteps", 1000, 1, MOST_STEPS)
    ends = tuple(fields.positive(f"beta_{end}", getattr(kind, f"beta_{end}")) for end in ("start", "end"))
    tables = {
        "linear": lambda: linear_betas(steps, *ends),
        "scaled_linear": lambda: scaled_linear_betas(steps, *ends),
        "squaredcos_cap_v2": lambda: cosine_betas(steps),
        "sigmoid": lambda: sigmoid_betas(steps, *ends),
    }
    table = fields.numbers("trained_betas", None, steps)
    name = fields.choice("beta_schedule", tuple(tables), kind.beta_schedule)
    table = tables[name]() if table is None else table
    if on(fields, "rescale_betas_zero_snr"):
        if kind.terminal is None:
            raise fields.wrong("rescale_betas_zero_snr", "this class has no such option")
        table = zero_terminal_snr_betas(table, kind.terminal)
    return table


def prediction_of(fields: Fields, allowed: tuple = ("epsilon", "sample", "v_prediction")) -> str:
    """Our name of `prediction_type`."""
    return PREDICTIONS[fields.choice("prediction_type", allowed)]


def chosen_ratios(fields: Fields, kind: SchedulerClass) -> str | None:
    """Which of the `use_..._sigmas` is on: 'karras', 'exponential', 'beta', 'lu', or None."""
    names = {name: f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")} | {"lu": "use_lu_lambdas"}
    chosen = [name for name, field in names.items() if on(fields, field)]
    if len(chosen) > 1:
        raise fields.wrong(names[chosen[0]], f"{names[chosen[1]]} is true too; choose one")
    if not chosen:
        return None
    if chosen[0] not in kind.ratios:
        raise fields.wrong(names[chosen[0]], "it cannot be read for this class")
    return chosen[0]


def _clipped_steps(fields, schedule):
    """How many indices have at least the log(alpha / sigma) of `lambda_min_clipped`."""
    least = fields.raw("lambda_min_clipped", -np.inf)
    if least != -np.inf:
        least = fields.number("lambda_min_clipped", None)
        if least is None:
            raise fields.wrong("lambda_min_clipped", "a number is needed")
    with np.errstate(divide="ignore"):
        lam = -np.log(schedule.noise_ratios[1:])
    count = int(np.sum(lam >= least))
    if not count:
        raise fields.wrong("lambda_min_clipped", f"no step has as much: the first has {lam[0]:g}")
    return count


def checked_steps(steps: Any, most: int) -> int:
    """`steps`; InvalidInput unless it is a number of steps from 1 to `most`."""
    if steps is None:
        raise InvalidInput("num_steps is None, but without timesteps= or sigmas= it must be a number of steps.")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= most:
        raise invalid("num_steps", steps, f"it must be a whole number in 1 .. {most}")
    return int(steps)


def own_values(name: str, values: Any, low: Any, high: Any, num_steps: Any = None, ends: int = 0) -> np.ndarray:
    """Falling `values [S + ends]` that were given to a grid in the place of spaced ones, in double precision.

    Raises InvalidInput unless they are numbers from `low` to `high` that never rise, of `num_steps` steps if given.
    """
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise invalid(name, values, "a list of numbers was expected") from None
    if found.ndim != 1 or not found.size:
        raise invalid(f"{name}.shape", found.shape, "a list of one number a step was expected")
    if not np.all((found >= low) & (found <= high)):
        raise invalid(name, found.tolist(), f"they must lie in [{low:g}, {high:g}]")
    if np.any(np.diff(found) > 0):
        raise invalid(name, found.tolist(), "they must fall, from noise to data")
    if num_steps is not None and num_steps != len(found) - ends:
        raise invalid("num_steps", num_steps, f"{name} has {len(found) - ends} steps; give one of them alone")
    return found


def refuse(fields: Fields, num_steps: Any = None, **given: Any) -> None:
    """Raises InvalidInput for anything that was given to a grid (not None) and that its class cannot take."""
    for name, value in given.items():
        if value is not None:
            raise InvalidInput(f"{name} is given, but {fields.source} as it is configured takes no {name}.")


def discrete_levels(
    fields: Fields,
    kind: SchedulerClass,
    allowed: tuple = ("epsilon", "sample", "v_prediction"),
    betas: tuple[float, ...] | None = None,
) -> Levels:
    """Levels of a table of betas: spaced indices, or noise ratios found in the table.

    betas: the table, where it is not what `betas_of` reads.
    """
    name = chosen_ratios(fields, kind)
    between = kind.between or ("log_sigma" if name else "variance" if kind.rounded else "sigma")
    schedule = DiscreteVP(betas_of(fields, kind) if betas is None else betas, between)
    process = GaussianProcess(schedule, prediction_of(fields, allowed), kind.ratios[name] if name else "index")
    total = schedule.num_steps
    levels = schedule.noise_ratios[1:]
    spacing = fields.choice("timestep_spacing", tuple(SPACINGS), kind.spacing)
    if spacing not in kind.spacings:
        raise fields.wrong("timestep_spacing", f"this class has only {' and '.join(kind.spacings)}")
    offset = fields.whole("steps_offset", 0, 0, total - 1)
    last = _clipped_steps(fields, schedule) if kind.following else total
    ends = [fields.positive(end, None) for end in ("sigma_min", "sigma_max")]
    end = kind.end(fields, total)

    def time_of(sigma):
        return times_at_noise_ratios(process, [sigma])[0] if sigma else 0.0

    def indices(steps):
        if kind.following and spacing != "trailing":
            spaced = SPACINGS[spacing](steps + 1, last, offset)[:-1]
        elif last != total:
            spaced = np.round(np.arange(last, 0, -total / steps)) - 1.0
        elif spacing == "linspace" and steps == 1:
            spaced = np.zeros(1)  # The peer counts from the data: its only index is the first.
        else:
            spaced = SPACINGS[spacing](steps, last, offset)
        return np.round(spaced) if kind.rounded else spaced

    def ratios(steps, table):
        span = np.interp(indices(steps), np.arange(total), table) if kind.spaced_ends else table[::-1]
        least, most = (float(given or own) for given, own in zip(ends, (span[-1], span[0])))
        return NOISE_RATIOS["exponential" if name == "lu" else str(name)](steps, least, most)

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, sigmas=sigmas if name or not kind.own_sigmas else None, timesteps=timesteps if name else None)
        if sigmas is not None:
            if timesteps is not None:
                raise InvalidInput("sigmas and timesteps are both given; choose one.")
            found = own_values("sigmas", sigmas, 0, levels[-1] * (1 + 1e-6), num_steps, 1)
            if len(found) < 2 or not found[-2]:
                raise invalid("sigmas", found.tolist(), "two or more were expected, of which only the last may be 0")
            return from_array(np.append(times_at_noise_ratios(process, found[:-1]), time_of(found[-1])))
        if name:
            steps = checked_steps(num_steps, total)
            found = ratios(steps, levels)
        else:
            spaced = (
                indices(checked_steps(num_steps, total))
                if timesteps is None
                else own_values("timesteps", timesteps, 0, total - 1, num_steps)
            )
            if between != "log_sigma" and end is not None:
                return from_indices(spaced, total, end)
            found = np.interp(spaced, np.arange(total), levels)
        if found[0] > levels[-1] * (1 + 1e-6):
            raise invalid("sigma_max", float(found[0]), f"the table of betas ends at {float(levels[-1]):g}")
        times = times_at_noise_ratios(process, found)
        if name and process.time != "index":
            theirs = peer_noise_ratios(peer_betas(*_formula(fields, kind), schedule.betas))
            told = peer_indices(ratios(steps, theirs), theirs)
            told = np.round(told) if process.time == "nearest_index" else np.floor(told)
            times = told_exactly(process, times, told, total)
        # Some classes end where the last level is: a step that does not move.
        idle = end is None or end > times[-1] * (1 - 1e-6)
        return from_array([*times, times[-1] if idle else end])

    return Levels(process, grid)


def continuous_levels(fields: Fields, kind: SchedulerClass) -> Levels:
    """Euler's `timestep_type='continuous'`: the network is fed log(sigma / alpha) / 4 (stable video diffusion).

    The levels may lie outside of the table of betas, so the process is a cosine, which has them all.
    """
    inner = discrete_levels(Fields({**fields.values, "sigma_min": None, "sigma_max": None}, fields.source), kind)
    process = GaussianProcess(Cosine(), "v", "log_sigma")
    name = chosen_ratios(fields, kind)
    if name is None:
        return Levels(GaussianProcess(inner.process.schedule, "v", "log_sigma"), inner.grid)
    given = [fields.positive(end, None) for end in ("sigma_min", "sigma_max")]

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, sigmas=sigmas, timesteps=timesteps)
        with jax.ensure_compile_time_eval():
            spaced, table = inner.grid(num_steps), inner.process.schedule
            own = (float(np.exp(-0.5 * table.log_snr(spaced[place]))) for place in (-2, 0))
            span = [value if chosen is None else chosen for value, chosen in zip(own, given)]
            end = kind.end(fields, 1) and float(process.inverse_log_snr(-2 * np.log(table.noise_ratios[1])))
        return from_array([*times_at_noise_ratios(process, NOISE_RATIOS[name](num_steps, *span)), end])

    return Levels(process, grid)


def consistency_levels(fields: Fields, kind: SchedulerClass) -> Levels:
    """LCM's and TCD's: every so many of the `original_inference_steps` steps that the student was trained on."""
    schedule = DiscreteVP(betas_of(fields, kind))
    process = GaussianProcess(schedule, prediction_of(fields), "index")
    total = schedule.num_steps
    original = fields.whole("original_inference_steps", 50, 1, total)
    trained = np.arange(original, 0, -1) * (total // original) - 1
    end = kind.end(fields, total) or 0.0

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, sigmas=sigmas)
        if timesteps is not None:
            return from_indices(own_values("timesteps", timesteps, 0, total - 1, num_steps), total, end)
        steps = checked_steps(num_steps, original)
        chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
        return from_indices(trained[chosen], total, end)

    return Levels(process, grid)
