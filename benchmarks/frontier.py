"""Quality against wall-clock time, for every way of doing less on one trained model: `docs/images/frontier.png`.

The transformer on digits that studies share draws the same samples from the same noise with the plain solver at fewer
and fewer steps, and with every method at several settings. Two measures: how far a sample ends from where the plain run
of all steps ends (relative L2), and the Fréchet distance of the samples to held-out digits. Times are medians of runs
that take turns; each round draws with a seed of its own. A setting beats fewer steps where, in every round, it is
better than the plain solver would be in its time, between the numbers of steps that were run.

    python -m benchmarks.run frontier
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.frontier_models import Models, frontier_models
from benchmarks.frontier_picture import BEATS, GUIDED, MEASURES, PLAIN, draw
from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row
from diffusion_jax import metrics, solvers, timesteps
from diffusion_jax.acceleration import (
    cached_features,
    cached_outputs,
    calibrate,
    cg_taylor,
    dmd,
    endpoint_influence,
    ertacache,
    every,
    exit_by_uncertainty,
    first_block_cached,
    foca,
    guided_with_reuse,
    record_outputs,
    reuse,
    sea_cached,
    taylor,
    threshold_at_count,
    threshold_for_depth,
    whole_depth,
)
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.denoisers import by_share, clipped, denoiser, guided, recorded, switched
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser


class Family(NamedTuple):
    """One curve of the picture. make: from a setting, which may be traced, to a denoiser. settings: by their labels.

    grid: that it runs on; None where the setting is the number of steps. compiled: once a setting, where the setting
    is no number that can be traced.
    """

    name: str
    make: Callable[[Any], Denoiser]
    settings: dict[str, Any]
    params: Any
    grid: Any
    compiled: bool = False


class Plan(NamedTuple):
    """Sizes of the comparison. steps: of the full run. samples: of each round. first: the seed of the first round."""

    steps: int = 50
    samples: int = 200
    first: int = 0
    smoke: bool = False


class Measured(NamedTuple):
    """What came of one setting. seconds, and errors by measure: one value a round. compute: relative, of a run."""

    family: str
    label: str
    seconds: list[float]
    errors: dict[str, list[float]]
    accuracy: float
    compute: float


def frontier(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """Every setting against the plain run of all steps, and the picture of all of them."""
    plan = Plan(8, 10, smoke=True) if smoke else Plan()
    measured = measure(families(plan), plan, rounds)
    rows = rows_of(measured, beating(measured))
    for row in rows:
        print(f"  {row.case}: {row.ratio.value:.2f}x, {row.note}", flush=True)
    if not smoke:
        draw(rows)
    return rows


def rows_of(measured: Sequence[Measured], better: Sequence[dict[str, bool]]) -> list[Row]:
    """The table: each setting against the plain run of all steps."""
    rows = []
    for one, beats in zip(measured, better, strict=True):
        base = _plain_of(measured, one)[0]
        said = "; ".join(
            f"{measure} {np.mean(values):#.3g} ± {np.std(values):.2g}" + (f", {BEATS}" if beats[measure] else "")
            for measure, values in one.errors.items()
        )
        faster = ratio(base.seconds, one.seconds)
        rows.append(
            Row(
                case=f"{one.family}, {one.label}",
                ours=summarise(one.seconds),
                peer=f"{base.family}, {base.label}",
                theirs=summarise(base.seconds),
                ratio=faster,
                note=f"operations predict {base.compute / one.compute:.2f}x; {said}; accuracy {one.accuracy:.3f}",
            )
        )
    return rows


def measure(families: Sequence[Family], plan: Plan, rounds: int) -> list[Measured]:
    """Runs every setting of `families` in turns, `rounds` times after one that compiles."""
    cond = {"label": jnp.arange(plan.samples) % CLASSES}
    calls: dict[str, Callable[[], None]] = {}
    drawn: dict[str, list[np.ndarray]] = {}
    costs, names = {}, []
    for family in families:
        shared = None
        for label, setting in family.settings.items():
            grid = timesteps.linspace(setting) if family.grid is None else family.grid
            program = _program(family, setting, grid, plan, cond) if family.compiled or shared is None else shared
            shared = program
            index = f"{family.name}, {label}"
            names.append((family.name, label))
            drawn[index] = []
            given = None if family.compiled else setting

            def call(program=program, params=family.params, given=given, index=index):
                # The same noise for all settings of a round.
                key = jax.random.key(plan.first + len(drawn[index]))
                out = jax.block_until_ready(program(key, params, given))
                drawn[index].append(np.asarray(out.x))
                costs[index] = float(out.cost.compute)

            calls[index] = call
    # Turns long enough not to be repeated: each call is a round with a seed of its own.
    times = interleave(calls, rounds, turn=0.0, settled=0.0)
    judge, labels = (None if plan.smoke else metrics.feature_network("digits")), np.asarray(cond["label"])
    found = []
    for name, label in names:
        index = f"{name}, {label}"
        start = next(f"{other}, {at}" for other, at in names if other == _plain_name(name))
        # The first call only compiled.
        pairs = list(zip(drawn[index], drawn[start], strict=True))[1:]
        ends = [metrics.endpoint_error(a, b, relative=True) for a, b in pairs]
        scores = [metrics.judged(judge, x, labels) if judge else metrics.Judged(0.0, 1.0) for x in drawn[index][1:]]
        errors: dict[str, list[float]] = {MEASURES[0]: ends, MEASURES[1]: [score.distance for score in scores]}
        accuracy = float(np.mean([score.accuracy for score in scores]))
        found.append(Measured(name, label, times[index], errors, accuracy, costs[index]))
    return found


def _program(family: Family, setting: Any, grid: Any, plan: Plan, cond: Any) -> Callable[..., Any]:
    shape = (plan.samples, 8, 8, 1)

    @jax.jit
    def run(key, params, given):
        made = family.make(setting if family.compiled else given)
        return sample(key, made, params, solvers.ddim(), grid, shape=shape, cond=cond)

    return run


def families(plan: Plan) -> list[Family]:
    """All that is compared; those of guidance behind "guided, "."""
    grid = timesteps.linspace(plan.steps)
    found = frontier_models(grid, plan.smoke)
    return [*_unguided(found, plan, grid), *_guided(found, plan, grid)]


def _steps(plan: Plan) -> dict[str, int]:
    """Steps of the plain solver, all of them first."""
    kept = (50, 40, 32, 25, 20, 17, 14, 12, 10, 8)
    return {f"{plan.steps * k // 50} steps": plan.steps * k // 50 for k in kept[:: 4 if plan.smoke else 1]}


def _intervals(*numbers: int) -> dict[str, int]:
    return {f"N = {number}": number for number in numbers}


def _thresholds(*numbers: float) -> dict[str, float]:
    return {f"threshold {number:g}": number for number in numbers}


def _unguided(found: Models, plan: Plan, grid: Any) -> list[Family]:
    network, process, params = found.network, found.process, found.params
    plain = denoiser(network, process)
    small, few, cost = found.small
    both, (exits, left), (narrow, cut) = (few, params), found.exits, found.widths

    def features(forecaster, warmup=2):
        return lambda interval: cached_features(network, process, forecaster, every(interval, warmup))

    def outputs(forecaster, inner=plain, warmup=2):
        return lambda interval: cached_outputs(inner, every(interval, warmup), forecaster)

    def stitched(last):
        return lambda share: switched([small, last], by_share(share), compute=(cost, 1.0))

    return [
        Family(PLAIN, lambda _: plain, _steps(plan), params, None, compiled=True),
        Family("feature reuse", features(reuse()), _intervals(2, 3, 5), params, grid),
        Family("TaylorSeer, m = 1", features(taylor(1)), _intervals(2, 3, 5, 8), params, grid),
        Family("TaylorSeer, m = 3", features(taylor(3)), _intervals(3, 5), params, grid),
        Family("FoCa", features(foca(), 3), _intervals(3, 5, 8), params, grid),
        Family("output reuse", outputs(reuse()), _intervals(2, 3, 5), params, grid),
        Family("output forecast, m = 1", outputs(taylor(1)), _intervals(2, 3, 4, 5, 7), params, grid),
        Family("output forecast, FoCa", outputs(foca(), warmup=3), _intervals(3, 5, 7), params, grid),
        Family("output forecast, DMD", outputs(dmd(), warmup=4), _intervals(2, 3, 4, 5, 7), params, grid),
        Family("SeaCache", partial(sea_cached, plain), _thresholds(0.05, 0.1, 0.2, 0.4), params, grid),
        Family(
            "SeaCache, m = 1",
            partial(sea_cached, plain, forecaster=taylor(1)),
            _thresholds(0.05, 0.1, 0.2, 0.4),
            params,
            grid,
        ),
        Family("CG-Taylor", partial(cg_taylor, network, process), _thresholds(0.01, 0.03, 0.1, 0.3), params, grid),
        Family(
            "first-block cache",
            partial(first_block_cached, network, process),
            _thresholds(0.03, 0.06, 0.1, 0.2),
            params,
            grid,
        ),
        *_calibrated(found, plan, grid),
        Family("T-Stitch", stitched(plain), {f"r = {r:g}": r for r in (0.2, 0.4, 0.6)}, both, grid),
        Family(
            "T-Stitch + output forecast",
            stitched(outputs(taylor(1))(3)),
            {f"r = {r:g}, N = 3": r for r in (0.2, 0.4, 0.6)},
            both,
            grid,
        ),
        Family(
            "early exit, clipped",
            lambda threshold: clipped(exit_by_uncertainty(exits, process, threshold)),
            _depths(found, plan, grid),
            left,
            grid,
        ),
        Family("DyDiT", lambda _: narrow, {"half of the widths": 0}, cut, grid),
        Family("DyDiT + output forecast", outputs(taylor(1), narrow), _intervals(2, 3, 5), cut, grid),
    ]


def _calibrated(found: Models, plan: Plan, grid: Any) -> list[Family]:
    """ERTACache at several numbers of computed steps, from one recording with a seed that no round uses: by relative
    change as published, and weighted by what a step does to the end. Each has its own grid."""
    plain, params = denoiser(found.network, found.process), found.params
    cond = {"label": jnp.arange(min(64, plan.samples)) % CLASSES}
    shape = (len(cond["label"]), 8, 8, 1)
    runs = record_outputs(jax.random.key(1000), plain, params, solvers.ddim(), grid, shape=shape, cond=cond)
    influence = endpoint_influence(found.process, grid, float(runs.x[-1].std()))
    made = []
    for name, weight in (("ERTACache", None), ("ERTACache, by influence", influence)):
        for count in (3,) if plan.smoke else (25, 17, 12, 8):
            threshold = threshold_at_count(runs, count, weight=weight)
            calibration = calibrate(runs, grid, found.process, threshold, weight=weight)
            reused, moved = ertacache(plain, calibration, grid)
            label = {f"{count} of {plan.steps} steps": count}
            made.append(Family(name, lambda _, reused=reused: reused, label, params, moved))
    return made


def _depths(found: Models, plan: Plan, grid: Any) -> dict[str, float]:
    """Thresholds for shares of the blocks, from one recorded run with a seed that no round uses.

    Where little but noise is left x0 is a small error times a large factor, so it is clipped, here and in the runs.
    """
    exits, params = found.exits
    seen = recorded(
        clipped(whole_depth(exits, found.process)),
        plan.steps,
        lambda prediction, x, step: prediction.extras["uncertainty"],
        axes=1,
    )
    cond = {"label": jnp.arange(min(64, plan.samples)) % CLASSES}
    shape = (len(cond["label"]), 8, 8, 1)
    run = sample(jax.random.key(1000), seen, params, solvers.ddim(), grid, shape=shape, cond=cond)
    uncertainty = np.asarray(run.run.carry.values)
    shares = (0.5,) if plan.smoke else (0.85, 0.7, 0.5, 0.35)
    return {f"{share:.0%} of the blocks": threshold_for_depth(uncertainty, share * exits.depth) for share in shares}


def _guided(found: Models, plan: Plan, grid: Any) -> list[Family]:
    network, process, params = found.network, found.process, found.params
    small, few, cost = found.small
    plain = denoiser(network, process)

    def led(inner: Denoiser) -> Denoiser:
        return guided(inner, 2.0, null=NULL)

    def features(forecaster, warmup=2):
        return lambda interval: led(cached_features(network, process, forecaster, every(interval, warmup)))

    def outputs(forecaster, warmup=2):
        return lambda interval: cached_outputs(led(plain), every(interval, warmup), forecaster)

    def both_ways(interval):
        """A guide that is asked at every second of the steps that are computed at all."""
        return cached_outputs(guide_reuse(2), every(interval, 2), taylor(1))

    def guide_reuse(interval):
        return guided_with_reuse(plain, 2.0, NULL, refresh=every(interval, 2))

    def stitched(share):
        return led(switched([small, cached_outputs(plain, every(3, 2), taylor(1))], by_share(share), (cost, 1.0)))

    made = [
        Family(PLAIN, lambda _: led(plain), _steps(plan), params, None, compiled=True),
        Family("TaylorSeer, m = 1", features(taylor(1)), _intervals(2, 3, 5, 8), params, grid),
        Family("FoCa", features(foca(), 3), _intervals(3, 5, 8), params, grid),
        Family("output reuse", outputs(reuse()), _intervals(2, 3, 5), params, grid),
        Family("output forecast, m = 1", outputs(taylor(1)), _intervals(2, 3, 4, 5, 7), params, grid),
        Family("output forecast, FoCa", outputs(foca(), 3), _intervals(3, 5, 7), params, grid),
        Family("output forecast, DMD", outputs(dmd(), 4), _intervals(2, 3, 4, 5, 7), params, grid),
        Family("SeaCache", partial(sea_cached, led(plain)), _thresholds(0.05, 0.1, 0.2, 0.4), params, grid),
        Family(
            "SeaCache, m = 1",
            partial(sea_cached, led(plain), forecaster=taylor(1)),
            _thresholds(0.05, 0.1, 0.2, 0.4),
            params,
            grid,
        ),
        Family(
            "CG-Taylor", lambda d: led(cg_taylor(network, process, d)), _thresholds(0.01, 0.03, 0.1, 0.3), params, grid
        ),
        Family("guide reuse", guide_reuse, _intervals(2, 3, 5), params, grid),
        Family("guide reuse + output forecast", both_ways, _intervals(2, 3, 5), params, grid),
        Family(
            "T-Stitch + output forecast",
            stitched,
            {f"r = {r:g}, N = 3": r for r in (0.2, 0.4, 0.6)},
            (few, params),
            grid,
        ),
    ]
    return [family._replace(name=GUIDED + family.name) for family in made]


def _plain_name(family: str) -> str:
    return f"{GUIDED}{PLAIN}" if family.startswith(GUIDED) else PLAIN


def _plain_of(measured: Sequence[Measured], one: Measured) -> list[Measured]:
    """The plain solver at all numbers of steps, the full run first, with which `one` is compared."""
    return [other for other in measured if other.family == _plain_name(one.family)]


def beating(measured: Sequence[Measured]) -> list[dict[str, bool]]:
    """Whether each setting is better than the plain solver at equal time in every round, by measure."""
    found = []
    for one in measured:
        plain = _plain_of(measured, one)
        found.append(
            {
                measure: one not in plain
                and all(
                    _below(one.seconds, value, [(other.seconds, other.errors[measure][i]) for other in plain])
                    for i, value in enumerate(values)
                )
                for measure, values in one.errors.items()
            }
        )
    return found


def _below(seconds: Sequence[float], error: float, curve: Sequence[tuple[Sequence[float], float]]) -> bool:
    """Whether the point lies below the curve; in less time than all of it, below its fastest point. A full run, which
    is without error by definition, is no point, and what takes as long as that beats nothing."""
    costs, errors = zip(*[(float(np.median(taken)), value) for taken, value in curve if value > 0], strict=True)
    cost = max(float(np.median(seconds)), min(costs))
    return cost <= max(costs) and error < metrics.error_at_cost(costs, errors, cost)
