"""Calibrated reuse of outputs in its parts, against uniform reuse and fewer steps, all at equal evaluations.

Whatever the arm, it is one compiled program: the schedule, the correction and the grid are its arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import pictures
from diffusion_jax.acceleration import (
    Calibration,
    Correction,
    Trajectories,
    adjusted_grid,
    cached_outputs,
    offline_schedule,
    on_schedule,
    record_outputs,
)
from diffusion_jax.acceleration.calibration import integrated
from diffusion_jax.metrics import endpoint_error
from diffusion_jax.recipes.report import Claim, claim
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Solver

ARMS = {
    "fewer": "fewer steps",
    "uniform": "uniform reuse",
    "offline": "offline schedule",
    "time": "and adjusted times",
    "linear": "and correction",
    "all": "all three parts",
}
"""The arms by name, as pictures call them: the plain solver, then reuse, then one part after the other."""


ErrorTable = Mapping[float | int, Mapping[str, Sequence[float]]]
"""By threshold and arm: one endpoint error a seed; the evaluations under "evaluations"."""


class Bench(NamedTuple):
    """What is sampled and how. record: (key, params, cond, size) -> Trajectories.

    full: (key, params, cond, size) -> samples of the denoiser itself, without a cache around it.
    run: (key, params, computed, correction, grid, cond, size, residual) -> (samples, evaluations).
    """

    process: Any
    grid: Any
    record: Callable[..., Trajectories]
    full: Callable[..., Any]
    run: Callable[..., tuple[Any, Any]]


def bench(denoiser: Denoiser, solver: Solver, grid: Any, shape: tuple) -> Bench:
    """`denoiser` on `grid`; shape: of one sample."""

    def record(key, params, cond, size):
        return record_outputs(key, denoiser, params, solver, grid, shape=(size, *shape), cond=cond)

    def full(key, params, cond, size):
        return sample(key, denoiser, params, solver, grid, shape=(size, *shape), cond=cond).x

    def run(key, params, computed, correction, grid, cond, size, residual):
        kept = integrated(denoiser.process)
        schedule = on_schedule(computed)
        cheap = cached_outputs(denoiser, schedule, prediction=kept, residual=residual, correction=correction)
        found = sample(key, cheap, params, solver, grid, shape=(size, *shape), cond=cond)
        return found.x, found.cost.evaluations

    compiled = jax.jit(run, static_argnums=(6, 7))

    def run_from_host(key, params, computed, correction, grid, *rest):
        """Whatever was calibrated from parameters on a mesh lies there; another place would be another program."""
        return compiled(key, params, *jax.device_get((computed, correction, grid)), *rest)

    return Bench(
        denoiser.process,
        jnp.asarray(grid),
        jax.jit(record, static_argnums=3),
        jax.jit(full, static_argnums=3),
        run_from_host,
    )


def calibrated_grid(bench: Bench, calibration: Calibration) -> Any:
    """The grid with the times that the calibration adjusts."""
    in_t = calibration.valid_for["prediction"] == "velocity"
    return adjusted_grid(bench.grid, calibration.fraction, None if in_t else bench.process)


def spread_schedule(steps: int, count: int) -> np.ndarray:
    """A schedule `[S]` of `count` computed steps at equal distances, the first and the last among them."""
    schedule = np.zeros(steps, bool)
    schedule[np.round(np.linspace(0, steps - 1, count)).astype(int)] = True
    return schedule


def fewer_steps(bench: Bench, steps: int, key: Any, params: Any, cond: Any, size: int) -> tuple[Any, Any]:
    """The samples and evaluations of the solver itself at fewer steps, spread along the grid.

    The other steps stand still at the end of the run, so that no other program is compiled.
    """
    length = len(bench.grid) - 1
    places = jnp.minimum(jnp.arange(length + 1) / steps, 1.0) * length
    grid = jnp.interp(places, jnp.arange(length + 1), bench.grid)
    none = Correction(jnp.zeros(length), jnp.zeros(length))
    return bench.run(key, params, jnp.arange(length) < steps, none, grid, cond, size, True)


def samples(
    bench: Bench, arm: str, calibration: Calibration, key: Any, params: Any, cond: Any, size: int
) -> tuple[Any, Any]:
    """The samples and evaluations of an arm, which asks the network as often as `calibration` does."""
    steps, count = len(bench.grid) - 1, int(calibration.computed.sum())
    if arm == "fewer":
        return fewer_steps(bench, count, key, params, cond, size)
    none = jax.tree.map(jnp.zeros_like, calibration.correction)
    computed = jnp.asarray(spread_schedule(steps, count)) if arm == "uniform" else calibration.computed
    correction = calibration.correction if arm in ("linear", "all") else none
    grid = calibrated_grid(bench, calibration) if arm in ("time", "all") else bench.grid
    residual = calibration.valid_for["residual"]
    return bench.run(key, params, computed, correction, grid, cond, size, residual)


def errors(
    bench: Bench, calibration: Calibration, key: Any, params: Any, full: Any, cond: Any = None, arms: Any = ARMS
) -> dict[str, float]:
    """The endpoint error of each arm against the full run `full`, and the evaluations of an arm as "evaluations"."""
    found = {}
    for arm in arms:
        x, evaluations = samples(bench, arm, calibration, key, params, cond, len(full))
        found[arm] = endpoint_error(x, full)
    return {**found, "evaluations": float(evaluations)}


def threshold_at_count(runs: Trajectories, residual: bool, count: int) -> float:
    """The smallest of 200 thresholds at which recorded runs ask for at most `count` steps, or the largest of them."""
    kept = runs.output - runs.x if residual else runs.output
    thresholds = np.geomspace(1e-3, 2.0, 200)
    counts = jax.lax.map(lambda at: offline_schedule(kept, at).sum(), jnp.asarray(thresholds))
    return float(thresholds[int(np.argmax(np.append(np.asarray(counts)[:-1] <= count, True)))])


def gathered(tables: Sequence[Mapping[float | int, Mapping[str, float]]]) -> ErrorTable:
    """One table with the values of every seed."""
    return {at: {arm: [one[at][arm] for one in tables] for arm in row} for at, row in tables[0].items()}


def evaluations(table: ErrorTable, at: float | int) -> str:
    """The evaluations of a run, over the seeds, in words."""
    return "/".join(sorted({f"{value:g}" for value in table[at]["evaluations"]}, key=float))


def added(table: ErrorTable, world: str, unit: str, reasons: Mapping[str, str] | None = None) -> list[Claim]:
    """What the corrections add to the schedule, and what all of it is worth against two simpler ways, by threshold.

    reasons: by baseline, why ours is not better, should it not be.
    """
    claims = []
    comparisons = {
        "offline": ("both corrections together are not worse than the schedule alone", "PSNR 22.1 and 23.8 (Wan2.1)"),
        "uniform": ("better than uniform reuse", "PSNR 13.8 and 23.8 (Wan2.1)"),
        "fewer": ("better than fewer steps", "not compared"),
    }
    for baseline, (words, published) in comparisons.items():
        claims += [
            claim(
                f"{world}: {words}, {unit} {at:g}",
                f"endpoint error at {evaluations(table, at)} evaluations; the baseline is {ARMS[baseline]}",
                table[at][baseline],
                table[at]["all"],
                "lower",
                published,
                reason=(reasons or {}).get(baseline, "seeds differ by more than the arms do"),
            )
            for at in table
        ]
    return claims


def jaccard(first: Calibration, second: Calibration) -> float:
    """The Jaccard index of the steps that two calibrations reuse; 1 where neither reuses any."""
    a, b = (~np.asarray(one.computed) for one in (first, second))
    return float((a & b).sum() / max((a | b).sum(), 1)) if (a | b).any() else 1.0


def draw_errors(path: Path, table: ErrorTable, label: str) -> None:
    """Endpoint error against evaluations, means over seeds."""
    counts = [float(np.mean(row["evaluations"])) for row in table.values()]
    curves = {name: (counts, [float(np.mean(row[arm])) for row in table.values()]) for arm, name in ARMS.items()}
    pictures.save_curves(path, curves, x_label="evaluations", y_label=label)


def draw_calibration(path: Path, calibration: Calibration) -> None:
    """What was calibrated as functions of t."""
    values = {
        "computed (1) or reused (0)": calibration.computed,
        "share of its step (phi)": calibration.fraction,
        "slope of the error": calibration.correction.slope,
        "bias of the error": calibration.correction.bias,
    }
    t = np.asarray(calibration.grid[:-1]).tolist()
    curves = {name: (t, np.asarray(value, float).tolist()) for name, value in values.items()}
    pictures.save_curves(path, curves, x_label="t (the run goes from right to left)", y_label="by step")
