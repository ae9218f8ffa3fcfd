"""Calibration of reuse on a few recorded runs: where outputs may be reused, how far to step with them, their error.

The error of reused outputs is nearly the same function of the step for all conditions, so it is measured once, offline
(Peng et al. 2025, ERTACache). With y_i the kept output of step i of full runs (`outputs`, equation (1)), y~_i what the
forecaster made of the computed steps before, and v_i, v~_i the outputs themselves, all norms over the whole batch:

    reuse i         where ||y~_i - y_i||_1 / ||y_i||_1 < threshold, from the second step to the last but one    (1)
    phi_i         = clip(1 - ||v~_i - v_i||_1 / d_i, 0, 1),     1 where computed                               (2)
    g'_(i+1)      = g'_i - phi_i (g_i - g_(i+1)) (g'_i - g_S) / (g_i - g_S),    g'_0 = g_0, g'_S = g_S         (3)
    v~_i - v_i    ~ slope_i v~_i + bias_i,      slope = Cov(v~, v~ - v) / Var(v~)                              (4)

Equation (3) shares what is left of the run among the steps that are left; it depends on the grid and phi alone, so the
changed grid is known before the run and every solver runs on it as on any other. The time g is the one in which the
kept output is integrated: t for a velocity, s = sigma / alpha for epsilon. The publication fits (4) through a logistic
function and applies its linearisation, which is this regression.

A relative change (1) does not know what a step does to the end of the run, and reuses where outputs are large instead
of where they matter least. `endpoint_influence` gives weights (not of the publication) that do: for Gaussian data of
standard deviation c the ODE carries a difference d of x at time t to c d / sqrt(alpha^2 c^2 + sigma^2) at time 0, so

    reuse i         where w_i mean |y~_i - y_i| < threshold                                                    (5)
    w_i           = |g_i - g_(i+1)| a c / sqrt(alpha^2 c^2 + sigma^2),      alpha and sigma at t_(i+1)

with a = 1 for velocities and a = alpha for epsilon, whose z = x / alpha is integrated.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.forecasting import Forecaster, reuse
from diffusion_jax.acceleration.outputs import Correction, cached_outputs, output_of, parameterized
from diffusion_jax.acceleration.refresh import on_schedule
from diffusion_jax.acceleration.thresholds import threshold_for
from diffusion_jax.clock import as_grid, num_steps
from diffusion_jax.denoisers import recorded
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes import is_joint, need_gaussian
from diffusion_jax.reading import first_line, read_json
from diffusion_jax.sampling import sample
from diffusion_jax.timesteps.mapping import noise_ratio, time_at_noise_ratio
from diffusion_jax.typing import Denoiser

DISTANCES = ("output", "change")
"""d of equation (2): ||v_i||_1, or ||v_i - v_(i-1)||_1, of which accounts of the publication tell differently."""

_REUSE = reuse()


class Trajectories(NamedTuple):
    """Full runs. x: inputs of the denoiser, `[S, B, ...]`. output: its predictions, as network outputs."""

    x: Float[Array, "S B ..."]
    output: Float[Array, "S B ..."]


class Calibration(NamedTuple):
    """What reuse needs to know, by step, and for which runs it is valid.

    computed: `[S]`, the steps that run the network: a schedule for `on_schedule`. fraction: `[S]`, phi of equation (2).
    correction: slope and bias of equation (4), `[S]` or `[S, C]`; 0 where computed. grid: that of the recorded runs.
    valid_for: plain values by name; a run must be told the same ones (`ertacache`).
    """

    computed: Bool[Array, " S"]
    fraction: Float[Array, " S"]
    correction: Correction
    grid: Any
    valid_for: dict[str, Any]


def integrated(process: Any) -> str:
    """The output whose error a run integrates: `velocity` (in t) where that is predicted, else `epsilon` (in s)."""
    return "velocity" if process.prediction == "velocity" else "epsilon"


def record_outputs(key: Any, denoiser: Denoiser, params: Any, solver: Any, grid: Any, **start: Any) -> Trajectories:
    """Runs `denoiser` in full and keeps what calibration looks at; arguments are those of `sampling.sample`.

    About 20 samples over the conditions of later runs are enough. Pure: jit it, and give it a sharded batch; sums over
    the batch are global. Raises InvalidInput for joint and for discrete data.
    """
    process = denoiser.process
    need_gaussian("record_outputs", process)
    if is_joint(process):
        raise InvalidInput(
            "record_outputs keeps one output a step, but joint data has one a modality; calibrate them apart."
        )
    kept_as = parameterized(process, integrated(process))

    def read(prediction, x, step):
        return Trajectories(x, output_of(kept_as, prediction, step.t))

    found = sample(key, recorded(denoiser, num_steps(as_grid(grid)), read), params, solver, grid, **start)
    return found.run.carry.values


def endpoint_influence(process: Any, grid: Any, data_std: float) -> Float[Array, " S"]:
    """w of equation (5): how far the end of the run moves where the output of a step is off by one.

    grid: of times `[S + 1]`. data_std: standard deviation of the clean data, per entry.
    Raises InvalidInput for a deviation that is not positive, and where sigma / alpha is infinite (see `adjusted_grid`).
    """
    if not data_std > 0:
        raise invalid("data_std", data_std, "a standard deviation above 0 was expected")
    grid = as_grid(grid)
    in_t = integrated(process) == "velocity"
    time = grid if in_t else _finite_ratio(process, grid)
    alpha, sigma = process.alpha(grid[1:]), process.sigma(grid[1:])
    carried = data_std / jnp.sqrt(alpha**2 * data_std**2 + sigma**2)
    return jnp.abs(jnp.diff(time)) * carried * (1.0 if in_t else alpha)


def offline_schedule(
    kept: Any, threshold: Any, forecaster: Forecaster = _REUSE, *, weight: Any = None
) -> Bool[Array, " S"]:
    """Equation (1) as a walk: where to compute, given the kept outputs `[S, ...]` of full runs.

    threshold: may be traced; 0 computes every step. weight: `[S]`, w of equation (5) in place of (1).
    """
    return _walk(kept, lambda index, error: error >= threshold, forecaster, weight)[0]


def replayed(kept: Any, computed: Any, forecaster: Forecaster = _REUSE) -> Any:
    """The forecast of each step along full runs, `[S, ...]`, refreshed where `computed [S]` says so."""
    return _walk(kept, lambda index, error: jnp.asarray(computed)[index], forecaster)[1]


def _walk(kept, compute, forecaster, weight=None):
    num_steps = len(kept)
    weights = None if weight is None else jnp.asarray(weight)

    def body(table, entry):
        index, value = entry
        guess = forecasting.predict(forecaster, table, index)
        error = _norm(guess - value) / jnp.maximum(_norm(value), jnp.finfo(jnp.float32).tiny)
        if weights is not None:
            error = weights[index] * jnp.mean(jnp.abs(guess - value))
        now = compute(index, error) | (index == 0) | (index == num_steps - 1)
        fresh = forecasting.update(forecaster, table, value, index)
        table = jax.tree.map(lambda new, old: jnp.where(now, new, old), fresh, table)
        return table, (now, guess)

    steps = jnp.arange(num_steps)
    return jax.lax.scan(body, forecasting.init(forecaster, kept[0]), (steps, kept))[1]


def _norm(values):
    return jnp.sum(jnp.abs(values))


def step_fractions(forecast: Any, output: Any, computed: Any, distance: str = "output") -> Float[Array, " S"]:
    """phi of equation (2), `[S]`, from forecast and true outputs `[S, B, ...]`.

    distance: d, one of `DISTANCES`. With "change" the first reuse of an output itself has phi = 0: the error of reusing
    the last output is the change since. Residuals then stand still too, where "output" lets them go on.
    """
    if distance not in DISTANCES:
        raise unknown("distance", distance, DISTANCES)
    error = jax.vmap(_norm)(forecast - output)
    before = jnp.concatenate([output[:1], output[:-1]]) if distance == "change" else jnp.zeros_like(output)
    scale = jnp.maximum(jax.vmap(_norm)(output - before), jnp.finfo(jnp.float32).tiny)
    return jnp.where(computed, 1.0, jnp.clip(1.0 - error / scale, 0.0, 1.0))


def error_regression(forecast: Any, output: Any, computed: Any, per_channel: bool = False) -> Correction:
    """Equation (4) by least squares at each step, over samples and positions; 0 where computed.

    per_channel: one line for each entry of the last axis, `[S, C]`, instead of one for all, `[S]`.
    """
    axes = tuple(range(1, forecast.ndim - per_channel))
    error = forecast - output
    mean, mean_error = (values.mean(axes, keepdims=True) for values in (forecast, error))
    variance = ((forecast - mean) ** 2).mean(axes)
    covariance = ((forecast - mean) * (error - mean_error)).mean(axes)
    slope = jnp.where(variance > 0, covariance / jnp.where(variance > 0, variance, 1.0), 0.0)
    bias = mean_error.reshape(slope.shape) - slope * mean.reshape(slope.shape)
    reused = ~jnp.asarray(computed).reshape(-1, *(1,) * (slope.ndim - 1))
    return Correction(jnp.where(reused, slope, 0.0), jnp.where(reused, bias, 0.0))


def adjusted_grid(grid: Any, fraction: Any, process: Any = None) -> Any:
    """Equation (3): the grid `[S + 1, *t_shape]` on which step i goes `fraction [S]` of its share of what is left.

    process: where given, s = sigma / alpha is what is shared, and t is found from it; else t itself. Fractions of 1
    leave the grid as it is, bit for bit; the ends stay. Raises InvalidInput where s is infinite (at alpha = 0), and for
    dicts of grids.
    """
    if isinstance(grid, dict):
        raise InvalidInput("adjusted_grid moves one grid; for joint data give each modality's its own fractions.")
    grid = as_grid(grid)
    time = grid if process is None else _finite_ratio(process, grid)
    fraction = jnp.asarray(fraction, grid.dtype).reshape(-1, *(1,) * (grid.ndim - 1))
    left = time - time[-1]
    # How much more is left after a step than there would be; a step that takes all of it, takes all of it.
    share = 1.0 - left[1:] / jnp.where(left[:-1] > 0, left[:-1], 1.0)
    kept = jnp.where(left[1:] > 0, left[1:] / jnp.where(left[:-1] > 0, left[:-1], 1.0), 1.0)
    stretch = jnp.where((fraction == 1) | (left[1:] == 0), 1.0, (1.0 - fraction * share) / kept)
    stretch = jnp.cumprod(stretch, axis=0)
    moved = time[-1] + left[1:] * stretch
    moved = moved if process is None else time_at_noise_ratio(process, moved)
    moved = jnp.where(stretch == 1, grid[1:], moved)
    # Rounding must not turn a step back that stands still.
    return jax.lax.cummin(jnp.concatenate([grid[:1], moved]), axis=0)


def _finite_ratio(process, grid):
    time = noise_ratio(process, grid)
    if not isinstance(time, Tracer) and not np.all(np.isfinite(time)):
        raise InvalidInput(
            "The grid begins where sigma / alpha is infinite, which cannot be shared out; "
            "begin it below t = 1, or predict a velocity, whose time is t."
        )
    return time


def calibrate(
    runs: Trajectories,
    grid: Any,
    process: Any,
    threshold: Any,
    *,
    residual: bool = True,
    distance: str = "output",
    per_channel: bool = False,
    forecaster: Forecaster | None = None,
    weight: Any = None,
    valid_for: Mapping[str, Any] | None = None,
) -> Calibration:
    """ERTACache's three parts from recorded runs: schedule (1), fractions (2) and correction (4).

    Everything is replayed along the full runs, the fit included. residual: keeps outputs minus inputs, as published.
    weight: that of equation (5), `endpoint_influence`; without it schedules are by relative change, as published.
    valid_for: what else the recording depends on, by name, as plain values: the solver's name, the guidance scale, ...
    The grid, the shape of a sample and what is kept are noted by themselves.
    """
    computed, fraction, correction = _fitted(
        runs, threshold, weight, residual, distance, per_channel, _REUSE if forecaster is None else forecaster
    )
    noted = {"prediction": integrated(process), "residual": residual, "shape": list(runs.x.shape[2:])}
    return Calibration(computed, fraction, correction, as_grid(grid), {**noted, **(valid_for or {})})


@partial(jax.jit, static_argnames=("residual", "distance", "per_channel", "forecaster"))
def _fitted(runs, threshold, weight, residual, distance, per_channel, forecaster):
    kept = runs.output - runs.x if residual else runs.output
    computed, guess = _walk(kept, lambda index, error: error >= threshold, forecaster, weight)
    forecast = guess + runs.x if residual else guess
    fraction = step_fractions(forecast, runs.output, computed, distance)
    return computed, fraction, error_regression(forecast, runs.output, computed, per_channel)


def ertacache(
    inner: Denoiser, calibration: Calibration, grid: Any, told: Mapping[str, Any] | None = None
) -> tuple[Denoiser, Any]:
    """`inner` with its outputs reused and corrected as calibrated, and the grid to run it on (Peng et al. 2025).

    grid: the one that the run would use, for a check. told: what the run is, by the names of `valid_for`.
    Raises InvalidInput where the run is another than the calibration is valid for, naming the first difference. For
    first-order solvers; others run too, but the correction is then fitted to other errors.
    """
    grid = as_grid(grid)
    kept = {name: calibration.valid_for[name] for name in ("prediction", "residual", "shape")}
    told = {**kept, "prediction": integrated(inner.process), **(told or {})}
    for name in sorted({*calibration.valid_for, *told}):
        ours, theirs = told.get(name), calibration.valid_for.get(name)
        if ours != theirs:
            raise invalid(f"{name} of the run", ours, f"the calibration is valid for {theirs!r} only; calibrate anew")
    if np.shape(grid) != np.shape(calibration.grid) or not np.allclose(grid, calibration.grid, atol=1e-6):
        raise InvalidInput(
            f"The run has another grid ({num_steps(grid)} steps) than the {num_steps(calibration.grid)} steps that "
            "were calibrated; calibrate anew."
        )
    reused = cached_outputs(
        inner,
        on_schedule(calibration.computed),
        prediction=kept["prediction"],
        residual=kept["residual"],
        correction=calibration.correction,
    )

    def init(params, x, cond):
        if list(x.shape[1:]) != kept["shape"]:
            raise invalid("shape of the run", list(x.shape[1:]), f"the calibration is valid for {kept['shape']} only")
        return reused.init(params, x, cond)

    return reused._replace(init=init), calibrated_grid(grid, calibration, inner.process)


def calibrated_grid(grid: Any, calibration: Calibration, process: Any) -> Any:
    """Equation (3) for `calibration`: `grid` with the times that it adjusts, in the time that its output integrates."""
    in_t = calibration.valid_for["prediction"] == "velocity"
    return adjusted_grid(grid, calibration.fraction, None if in_t else process)


def threshold_at_count(runs: Trajectories, count: int, *, residual: bool = True, weight: Any = None) -> float:
    """The smallest threshold in 1e-5 .. 2 at which recorded runs ask for at most `count` steps (`threshold_for`).

    residual, weight: as for `calibrate`. Raises InvalidInput for a count below 2, as the first and the last step are
    always computed, and where even a threshold of 2 asks for more.
    """
    if count < 2:
        raise invalid("count", count, "the first and the last step are always computed, so it must be at least 2")
    kept = runs.output - runs.x if residual else runs.output
    asked = jax.jit(lambda kept, at: offline_schedule(kept, at, weight=weight).sum())
    return threshold_for(lambda at: asked(kept, at), count, low=1e-5)


def reuse_overlap(first: Calibration, second: Calibration) -> float:
    """The Jaccard index of the steps that two calibrations reuse, `|A & B| / |A | B|`; 1 where neither reuses any."""
    a, b = (~np.asarray(one.computed) for one in (first, second))
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def save_calibration(path: Path | str, calibration: Calibration) -> None:
    """Writes a calibration as JSON, for people too."""
    arrays = {name: getattr(calibration, name) for name in ("computed", "fraction", "grid")}
    plain = {name: np.asarray(value).tolist() for name, value in {**arrays, **calibration.correction._asdict()}.items()}
    Path(path).write_text(json.dumps({**plain, "valid_for": calibration.valid_for}, indent=2) + "\n", encoding="utf-8")


def load_calibration(path: Path | str) -> Calibration:
    """Reads what `save_calibration` wrote. Raises InvalidInput for a file that is something else."""
    try:
        found = read_json(path)
        slope, bias, fraction, grid = (jnp.asarray(found[name]) for name in ("slope", "bias", "fraction", "grid"))
        computed = jnp.asarray(found["computed"], bool)
        return Calibration(computed, fraction, Correction(slope, bias), grid, found["valid_for"])
    except InvalidInput:
        raise
    except Exception as error:  # arrays are made of whatever it holds
        raise InvalidInput(f"{path} is not a calibration ({type(error).__name__}: {first_line(error)}).") from None
