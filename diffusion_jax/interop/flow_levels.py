"""The noise of diffusers' schedulers without a table of betas: EDM and flows. See `noise_levels`."""

from typing import Any

import numpy as np

from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.noise_levels import (
    MOST_STEPS,
    Levels,
    SchedulerClass,
    betas_of,
    checked_steps,
    chosen_ratios,
    final_sigma,
    on,
    own_values,
    refuse,
)
from diffusion_jax.interop.told_times import told_exactly
from diffusion_jax.processes import EDM, DiscreteVP, GaussianProcess, Linear
from diffusion_jax.timesteps import NOISE_RATIOS, from_array, times_at_noise_ratios

UNIT = 1000
"""What the network of a flow is told at t = 1."""


def edm_levels(fields: Fields, time: str = "log_sigma", schedule: str = "karras", ends: tuple = (0.002, 80.0, 0.5)):
    """Karras et al. 2022 as it is: sigma from `sigma_max` to `sigma_min`, then 0 or `sigma_min` again.

    schedule, ends: the defaults of `sigma_schedule`, `sigma_min`, `sigma_max` and `sigma_data`.
    """
    prediction = {"epsilon": "edm", "v_prediction": "edm_v"}
    names = tuple(prediction) if time == "log_sigma" else tuple(reversed(prediction))
    chosen = prediction[fields.choice("prediction_type", names)]
    low, high, data = (fields.positive(f"sigma_{name}", end) for name, end in zip(("min", "max", "data"), ends))
    if low > high:
        raise fields.wrong("sigma_min", f"it must be at most sigma_max = {high:g}")
    name = fields.choice("sigma_schedule", ("karras", "exponential"), schedule)
    rho = fields.positive("rho", 7.0)
    shape = {"rho": rho} if name == "karras" else {}
    fields.whole("num_train_timesteps", UNIT, 1, MOST_STEPS)  # Of the levels before a run: none here.
    process = GaussianProcess(EDM(high), chosen, time, data)
    idle = final_sigma(fields, 1)

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, sigmas=sigmas, timesteps=timesteps)
        ratios = NOISE_RATIOS[name](checked_steps(num_steps, MOST_STEPS), low, high, **shape)
        if len(ratios) == 1 and name == "exponential":
            ratios = np.array([low])  # The peer counts from the data.
        times = times_at_noise_ratios(process, ratios)
        return from_array(np.append(times, times[-1] if idle else 0.0))

    return Levels(process, grid)


def _flow_process(fields: Fields, time: str) -> GaussianProcess:
    if fields.whole("num_train_timesteps", UNIT) != UNIT:
        raise fields.wrong("num_train_timesteps", f"a flow's network is told {UNIT} t: only {UNIT} can be read")
    prediction = {"flow_prediction": "velocity", "epsilon": "epsilon", "sample": "x0"}
    chosen = fields.choice("prediction_type", tuple(prediction)) if time != "1000t" else "flow_prediction"
    return GaussianProcess(Linear(), prediction[chosen], time)


class _Shift:
    """`(sigmas, seq_len) -> sigmas`: the static or the dynamic shift, then the stretch to `shift_terminal`."""

    def __init__(self, fields: Fields, name: str):
        self.source, self.dynamic = fields.source, on(fields, "use_dynamic_shifting")
        self.static = fields.positive(name, 1.0)
        self.ends = [fields.number(end, value) for end, value in (("base_shift", 0.5), ("max_shift", 1.15))]
        sizes = (("base_image_seq_len", 256), ("max_image_seq_len", 4096))
        self.sizes = [fields.whole(size, value) for size, value in sizes]
        if self.dynamic and None in self.ends:
            raise fields.wrong("base_shift" if self.ends[0] is None else "max_shift", "the dynamic shift needs it")
        if self.dynamic and self.sizes[0] >= self.sizes[1]:
            raise fields.wrong("max_image_seq_len", f"it must be above base_image_seq_len = {self.sizes[0]}")
        self.kind = fields.choice("time_shift_type", ("exponential", "linear"))
        self.terminal = fields.number("shift_terminal", None, 0.0, 1.0)
        if self.terminal == 1:
            raise fields.wrong("shift_terminal", "a number below 1 is needed")

    def shift(self, seq_len: Any) -> float:
        if not self.dynamic:
            return self.static
        if isinstance(seq_len, bool) or not isinstance(seq_len, int | float | np.integer) or not seq_len > 0:
            raise InvalidInput(
                f"seq_len is {seq_len!r}, but {self.source} says use_dynamic_shifting=true: it must be the number of "
                "tokens of the image."
            )
        (low, high), (first, last) = self.ends, self.sizes
        mu = low + (high - low) * (seq_len - first) / (last - first)
        return float(np.exp(mu)) if self.kind == "exponential" else mu

    def __call__(self, sigmas: np.ndarray, seq_len: Any) -> np.ndarray:
        shift = self.shift(seq_len)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return sigmas if not self.terminal else 1 - (1 - sigmas) * (1 - self.terminal) / (1 - sigmas[-1])


def flow_levels(fields: Fields) -> Levels:
    """FlowMatchEuler's, FlowMatchHeun's and FlowMatchLCM's: sigma = t, shifted.

    Without `sigmas` they lie between 1 and 1 / 1000, of which the lower end has then been shifted twice (diffusers
    shifts it when the scheduler is made, and the whole grid again).
    """
    if on(fields, "invert_sigmas"):
        raise fields.wrong("invert_sigmas", "only false can be read")
    process = _flow_process(fields, "1000t")
    name = chosen_ratios(fields, SchedulerClass(ratios=dict.fromkeys(("karras", "exponential", "beta"), "1000t")))
    shift = _Shift(fields, "shift")
    static = 1.0 if shift.dynamic else shift.static
    ends = [fields.positive(end, None) for end in ("sigma_min", "sigma_max")]

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        if sigmas is not None and timesteps is not None:
            raise InvalidInput("sigmas and timesteps are both given; choose one.")
        if timesteps is not None:
            sigmas = own_values("timesteps", timesteps, 0, UNIT, num_steps) / UNIT
            if name or shift.terminal or shift.shift(seq_len) != 1:
                raise InvalidInput(
                    f"timesteps are given, but {fields.source} shifts noise levels, and would tell the network other "
                    "times than theirs: give sigmas=, those before the shift."
                )
        elif sigmas is None:
            last = static * 1e-3 / (1 + (static - 1) * 1e-3)
            sigmas = np.linspace(1.0, last, checked_steps(num_steps, MOST_STEPS))
        else:
            sigmas = own_values("sigmas", sigmas, 0, 1, num_steps)
        found = shift(sigmas, seq_len)
        if name:
            least, most = (float(given or own) for given, own in zip(ends, (found[-1], found[0])))
            found = NOISE_RATIOS[name](len(found), least, most)
        return from_array(np.append(np.minimum(found, 1.0), 0.0))

    return Levels(process, grid)


def flow_sigma_levels(fields: Fields, kind: SchedulerClass, below_one: bool) -> Levels:
    """`use_flow_sigmas` of the multistep schedulers, whose networks are fed whole numbers.

    below_one: the grid begins at 1 - 1 / 1000 before it is shifted (DPM-Solver, DEIS); else at 1 - 1e-6 (UniPC).
    """
    process = _flow_process(fields, "floor_1000t")
    name = chosen_ratios(fields, kind)
    if name and below_one:
        raise fields.wrong("use_flow_sigmas", f"use_{name}_sigmas is true too; choose one")
    levels = DiscreteVP(betas_of(fields, kind)).noise_ratios[1:]
    shift = _Shift(fields, "flow_shift")
    end = kind.end(fields, 1)
    # The last sigma by 'sigma_min' is that of the table of betas, read as one of the flow.
    end = {0.0: 0.0, 1.0: float(levels[0]), None: 1.0}[end]

    def grid(num_steps=None, seq_len=None, timesteps=None, sigmas=None):
        refuse(fields, timesteps=timesteps, sigmas=sigmas if below_one or name else None)
        if sigmas is not None:
            sigmas = own_values("sigmas", sigmas, 0, 1, num_steps)
        else:
            steps = checked_steps(num_steps, MOST_STEPS)
            if name:
                ratios = NOISE_RATIOS[name](steps, levels[0], levels[-1])
                return levelled(times_at_noise_ratios(process, ratios), ratios / (1 + ratios))
            spaced = np.linspace(1, 1e-3, steps + 1)
            sigmas = (1.0 - spaced)[::-1][:-1] if below_one else spaced[:-1]
        found = shift(sigmas, seq_len)
        if not below_one:
            found = np.append(found[0] - 1e-6 * (abs(found[0] - 1) < 1e-6), found[1:])
        return levelled(found, found)

    def levelled(times, found):
        times = told_exactly(process, times, np.floor(found * UNIT), UNIT)
        return from_array(np.append(times, min(end, times[-1])))

    return Levels(process, grid)
