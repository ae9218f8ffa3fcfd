"""Grids: the times of a run as float32 `[S + 1]` (float64 under jax.enable_x64), falling to 0, for `sample`.

A grid begins at 1 unless its paper begins lower (`leading`, a given sigma_max). Discrete ones contain exactly the times
`(k + 1) / T` of their indices, then 0. Grids are plain arrays: plans of vector timesteps are made by stacking or
shifting them, `shift` and `resolution_shift` map grid to grid, and `spliced` makes one of two. Values are computed
once, in float64, on the host.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.clock import as_grid
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes.schedules import check_positive
from diffusion_jax.randomness import uniform
from diffusion_jax.timesteps.mapping import noise_ratio, time_at_noise_ratio
from diffusion_jax.typing import Keys, Number, Process, Times


def _check_steps(steps: int, num_train_steps: int | None = None) -> None:
    if steps < 1:
        raise invalid("steps", steps, "a run needs at least 1 step")
    if num_train_steps is not None and steps > num_train_steps:
        raise invalid("steps", steps, f"a process with {num_train_steps} steps has no more than that")


def scalar_times(grid: Times) -> Any:
    """A grid `[S + 1]`. Raises InvalidInput for one of vector times, or of several modalities."""
    if isinstance(grid, Mapping):
        raise invalid("grid", sorted(grid), "one grid of scalar times was expected")
    times: Any = as_grid(grid)
    if times.ndim != 1:
        raise invalid("grid.shape", times.shape, "a grid of at least two scalar times, [S + 1], was expected")
    return times


def grid_weights(grid: Times, weights: Any) -> np.ndarray:
    """Weights `[S]` of the steps of a grid, in float64.

    Raises InvalidInput for weights that are negative, not finite or all 0, and for another number of them.
    """
    steps, weights = len(scalar_times(grid)) - 1, _numbers("weights", weights)
    if weights.shape != (steps,):
        raise invalid("weights.shape", weights.shape, f"one for each step of the grid, [{steps}], was expected")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise invalid("weights", weights.tolist(), "finite ones that are not negative, nor all 0, were expected")
    return weights


def from_indices(indices: Any, num_train_steps: int = 1000, end: Number = 0.0) -> Float[Array, "..."]:
    """The grid through `t = (k + 1) / T` of falling indices k `[S]`, whole or not, then `end`."""
    indices = _numbers("indices", indices)
    if indices.ndim != 1 or indices.size < 1:
        raise invalid("indices.shape", indices.shape, "a sequence of at least one index is needed")
    if not np.all((indices >= 0) & (indices < num_train_steps)):
        raise InvalidInput(
            f"indices span [{indices.min()}, {indices.max()}], but must lie in [0, {num_train_steps - 1}]."
        )
    return from_array(np.append((indices + 1) / num_train_steps, end))


def _numbers(field: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise invalid(field, values, "an array of numbers was expected") from None


def _checked(field: str, values: Any) -> np.ndarray:
    values = _numbers(field, values)
    if values.ndim < 1 or values.shape[0] < 2:
        raise invalid(f"{field}.shape", values.shape, "a grid needs at least two times along its first axis")
    if not np.all((values >= 0) & (values <= 1)):
        raise InvalidInput(f"{field} must lie in [0, 1]; they span [{values.min():g}, {values.max():g}].")
    rises = np.argwhere(np.diff(values, axis=0) > 0)
    if rises.size:
        raise InvalidInput(f"{field} must not rise; entry {rises[0][0] + 1} is larger than entry {rises[0][0]}.")
    return values


def from_array(values: Any) -> Float[Array, "..."]:
    """Any falling values in [0, 1] as a grid, `[S + 1, *t_shape]`."""
    return jnp.asarray(_checked("values", values), jnp.result_type(float))


SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "linspace": lambda steps, last, offset: np.linspace(last - 1, 0, steps),
    "leading": lambda steps, last, offset: np.arange(steps)[::-1] * float(last // steps) + offset,
    "trailing": lambda steps, last, offset: np.round(last - np.arange(steps) * (last / steps)) - 1.0,
}
"""Falling indices `[S]` of `(steps, last, offset)`, those below `last`: table 2 of Lin et al. 2024.

`linspace` is not rounded here.
"""


def linspace(steps: int = 50, num_train_steps: int | None = None) -> Float[Array, "..."]:
    """Equal steps from 1 to 0; with T = `num_train_steps`, S indices rounded from `linspace(T - 1, 0, S)`, then 0.

    The discrete form is the `linspace` of Lin et al. 2024, table 2.
    """
    _check_steps(steps, num_train_steps)
    if num_train_steps is None:
        return from_array(np.linspace(1.0, 0.0, steps + 1))
    return from_indices(SPACINGS["linspace"](steps, num_train_steps, 0).round(), num_train_steps)


def leading(steps: int = 50, num_train_steps: int = 1000, steps_offset: int = 0) -> Float[Array, "..."]:
    """Indices `i (T // S) + steps_offset`, largest first, then 0 (DDIM; Stable Diffusion has offset 1).

    The first time is below 1: the start is not quite noise (Lin et al. 2024, table 2).
    """
    _check_steps(steps, num_train_steps)
    indices = SPACINGS["leading"](steps, num_train_steps, steps_offset)
    if steps_offset < 0 or indices[0] >= num_train_steps:
        raise invalid("steps_offset", steps_offset, f"the indices must stay in [0, {num_train_steps - 1}]")
    return from_indices(indices, num_train_steps)


def trailing(steps: int = 50, num_train_steps: int | None = None) -> Float[Array, "..."]:
    """Indices `round(T - i T / S) - 1`, the first is T - 1, then 0 (Lin et al. 2024, table 2); `linspace` without T."""
    _check_steps(steps, num_train_steps)
    if num_train_steps is None:
        return linspace(steps)
    return from_indices(SPACINGS["trailing"](steps, num_train_steps, 0), num_train_steps)


def quadratic(steps: int = 50, power: Number = 2.0) -> Float[Array, "..."]:
    """`t = linspace(1, 0)^power`: shorter steps near the data (Song et al. 2021, DDIM, appendix D.2)."""
    _check_steps(steps)
    check_positive(power=power)
    return from_array(np.linspace(1.0, 0.0, steps + 1) ** power)


def beta_grid(steps: int = 50, alpha: Number = 0.6, beta: Number = 0.6) -> Float[Array, "..."]:
    """Quantiles of Beta(alpha, beta) at equal steps: denser at both ends for values below 1 (Lee et al. 2024)."""
    _check_steps(steps)
    check_positive(alpha=alpha, beta=beta)
    return from_array(_beta_quantiles(steps + 1, alpha, beta))


def _beta_quantiles(count, alpha, beta):
    """Quantiles of Beta(alpha, beta) at equal steps from 1 to 0."""
    from scipy import stats  # slow to import

    return stats.beta.ppf(np.linspace(1.0, 0.0, count), alpha, beta)


def _sigma_ends(process, sigma_min, sigma_max):
    """The noise ratios a grid spans, and whether it begins at t = 1."""
    terminal = float(noise_ratio(process, 1.0))
    from_one = sigma_max is None
    if from_one:
        sigma_max = min(terminal, 80.0)
    if sigma_min is None:
        # A discrete process knows nothing below its first index.
        steps = getattr(getattr(process, "schedule", None), "num_steps", None)
        sigma_min = min(max(0.002, float(noise_ratio(process, 1.0 / steps)) if steps else 0.0), sigma_max)
    check_positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if sigma_min > sigma_max:
        raise invalid("sigma_min", sigma_min, f"it must be at most sigma_max = {sigma_max:g}")
    if sigma_max > terminal * (1 + 1e-5):
        raise invalid("sigma_max", sigma_max, f"the process ends at sigma / alpha = {terminal:g}")
    return float(sigma_min), float(sigma_max), from_one


def _karras(steps, sigma_min, sigma_max, rho=7.0):
    ramp = np.linspace(0.0, 1.0, steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def _exponential(steps, sigma_min, sigma_max):
    return np.geomspace(sigma_max, sigma_min, steps)


def _beta(steps, sigma_min, sigma_max, alpha=0.6, beta=0.6):
    return sigma_min + _beta_quantiles(steps, alpha, beta) * (sigma_max - sigma_min)


NOISE_RATIOS: dict[str, Callable[..., np.ndarray]] = {"karras": _karras, "exponential": _exponential, "beta": _beta}
"""Falling noise ratios sigma / alpha `[S]` of `(steps, sigma_min, sigma_max)`.

`beta` are the quantiles of Beta(0.6, 0.6) between the ends (Lee et al. 2024, as samplers of latent models use it).
"""


def times_at_noise_ratios(process: Process, ratios: Any) -> np.ndarray:
    """The times, in double precision, at which sigma / alpha is each of the falling `ratios [S]`; they never rise."""
    # A grid is found once: in double precision, so that a node of a table is exactly itself.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        times = np.asarray(time_at_noise_ratio(process, jnp.asarray(np.asarray(ratios, np.float64))), np.float64)
    return np.minimum.accumulate(times)


def from_noise_ratios(process: Process, ratios: Any, end: Number = 0.0) -> Float[Array, "..."]:
    """The grid through the times at which sigma / alpha is each of the falling `ratios [S]`, then the time `end`."""
    return from_array(np.append(times_at_noise_ratios(process, ratios), end))


def _begun(grid, from_one):
    """The grid with its first time exactly 1, when it is meant to begin there."""
    return grid.at[0].set(1.0) if from_one else grid


def karras(
    process: Process,
    steps: int = 18,
    rho: Number = 7.0,
    sigma_min: Number | None = None,
    sigma_max: Number | None = None,
) -> Float[Array, "..."]:
    """`(sigma / alpha)^(1 / rho)` in equal steps from sigma_max to sigma_min, then 0 (Karras et al. 2022, equation 5).

    sigma_min: 0.002, or that of the first index of a discrete process if larger.
    sigma_max: the process's own at t = 1, at most 80; the first time is then exactly 1.
    """
    _check_steps(steps)
    check_positive(rho=rho)
    sigma_min, sigma_max, from_one = _sigma_ends(process, sigma_min, sigma_max)
    return _begun(from_noise_ratios(process, _karras(steps, sigma_min, sigma_max, rho)), from_one)


def exponential(
    process: Process,
    steps: int = 18,
    sigma_min: Number | None = None,
    sigma_max: Number | None = None,
) -> Float[Array, "..."]:
    """`log(sigma / alpha)` in equal steps, then 0; ends as for `karras`."""
    _check_steps(steps)
    sigma_min, sigma_max, from_one = _sigma_ends(process, sigma_min, sigma_max)
    return _begun(from_noise_ratios(process, _exponential(steps, sigma_min, sigma_max)), from_one)


def uniform_log_snr(
    process: Process,
    steps: int = 20,
    log_snr_min: Number | None = None,
    log_snr_max: Number | None = None,
) -> Float[Array, "..."]:
    """Equal steps of the log-SNR, then 0 (Lu et al. 2022, DPM-Solver): `exponential` with its ends as log-SNRs."""
    return exponential(
        process,
        steps,
        None if log_snr_max is None else math.exp(-0.5 * log_snr_max),
        None if log_snr_min is None else math.exp(-0.5 * log_snr_min),
    )


def shift(grid: Times, shift: Number = 3.0) -> Float[Array, "..."]:
    """`t -> s t / (1 + (s - 1) t)` with s = `shift`: more steps at high noise for s > 1 (Esser et al. 2024, SD3).

    For `rectified_flow` it moves the log-SNR by `-2 log s`.
    """
    check_positive(shift=shift)
    grid = _checked("grid", grid)
    return from_array(np.minimum(shift * grid / (1.0 + (shift - 1.0) * grid), 1.0))


RESOLUTION_RULES = ("flux", "sqrt")


def resolution_shift(
    grid: Times,
    tokens: int = 4096,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: Number = 0.5,
    max_shift: Number = 1.15,
    rule: str = "flux",
) -> Float[Array, "..."]:
    """`shift` by an amount that grows with the number of tokens (latent patches) of the sample.

    rule `flux`: `s = exp(mu)`, mu linear in the tokens through (base_tokens, base_shift) and (max_tokens, max_shift).
    rule `sqrt`: `s = sqrt(tokens / base_tokens)` (Esser et al. 2024, equation 23); the other numbers are not used.
    """
    if rule not in RESOLUTION_RULES:
        raise unknown("rule", rule, RESOLUTION_RULES)
    check_positive(tokens=tokens, base_tokens=base_tokens)
    if rule == "sqrt":
        return shift(grid, math.sqrt(tokens / base_tokens))
    if max_tokens <= base_tokens:
        raise invalid("max_tokens", max_tokens, f"it must be larger than base_tokens = {base_tokens}")
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return shift(grid, math.exp(mu))


def stratified_route(key: Keys, knots: Times) -> Float[Array, "..."]:
    """A random grid along falling `knots [S + 1]`: the first, one of each interval, uniform, and the last: `[S + 2]`.

    Its times are stratified, in order, and each is as likely as any other of its interval: the route of one run among
    those that together visit every time. Knots may be traced, and angles or other levels as well as times.
    """
    high, low = jnp.asarray(knots)[:-1], jnp.asarray(knots)[1:]
    between = low + (high - low) * uniform(key, high.shape)
    return jnp.concatenate([high[:1], between, low[-1:]])


def padded(grid: Any, steps: int) -> Float[Array, "..."]:
    """`grid [S + 1, ...]` with further steps of length zero at its end: `[steps + 1, ...]`.

    A step whose t does not change has no effect, so one compiled program serves runs with fewer steps, for example in a
    comparison of numbers of steps. The denoiser is still evaluated at those steps: time and cost are those of `steps`.
    Raises InvalidInput where the grid has more than `steps`.
    """
    grid = as_grid(grid)
    if steps < len(grid) - 1:
        raise invalid("steps", steps, f"at least the {len(grid) - 1} steps of the grid were expected")
    return jnp.concatenate([grid, jnp.repeat(grid[-1:], steps - len(grid) + 1, axis=0)])


class Spliced(NamedTuple):
    """Two grids as one. grid: `[j + S - k + 1]`. which: int32 `[j + S - k]`, by step: 0 on the first, 1 on the second.

    stop: j, the steps on the first; `sample(..., stop=stop)` and `sample(..., start=stop)` are its two segments.
    """

    grid: Any
    which: Any
    stop: int


def spliced(first: Any, second: Any, k: int = 1) -> Spliced:
    """`first` down to where `second` has made k of its S steps, then `second`: a run handed over at `second[k]`.

    The handover is at `first[j]`, `j = argmin_j |first[j] - second[k]|`, which is moved to `second[k]` itself: so the
    two may be spaced differently, and x is at the noise level at which the second takes it over. k = 0 is `second`,
    with nothing in front; k = S is the end of `first`; a grid spliced to itself is itself. Times are `[S + 1]`.
    Raises InvalidInput for a k outside of 0 .. S, and for a vector of times.
    """
    first, second = (_numbers(name, grid) for name, grid in (("first", first), ("second", second)))
    if first.ndim != 1 or second.ndim != 1:
        raise invalid("the grids' shapes", (first.shape, second.shape), "one time a step was expected")
    if not 0 <= k < len(second):
        raise invalid("k", k, f"a number of steps of the second grid, 0 .. {len(second) - 1}, was expected")
    stop = int(np.argmin(np.abs(first - second[k]))) if k else 0
    which = np.repeat(np.array([0, 1], np.int32), [stop, len(second) - 1 - k])
    return Spliced(from_array(np.concatenate([first[:stop], second[k:]])), jnp.asarray(which), stop)
