"""CG-Taylor (Guan et al. 2025): the first block says at each step whether the last block's output may be forecast.

The gate is compared with a clock, the same forecast at fixed intervals, on the exact denoiser of a mixture, whose first
stage says which component it sees, and on a transformer for digits under guidance; there also with TaylorSeer, which
forecasts every module.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, pictures, processes, solvers
from diffusion_jax.acceleration import (
    cached_features,
    either,
    every,
    first_and_last,
    forecast_errors,
    gate_agreement,
    gated,
    record_gate,
    taylor,
    threshold_for,
)
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.config import build
from diffusion_jax.metrics import Judged, endpoint_error, error_at_cost, errors_by_sample, feature_network
from diffusion_jax.models import staged
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.typing import Denoiser

SOLVER, VP = solvers.ddim(), processes.vp_linear(time="t")
STAGES = denoisers.analytic_stages(VP)
NEVER, ALWAYS = 10**6, np.inf
"""An interval that is longer than any run, and a threshold that trusts every forecast."""


def judged(drawn: Drawn) -> Judged:
    return metrics.judged(feature_network("digits"), drawn.x, np.arange(len(drawn.x)) % CLASSES)


MEASURES = {
    "error": lambda drawn: endpoint_error(drawn.x, drawn.reference),
    "typical": lambda drawn: float(np.median(errors_by_sample(drawn.x, drawn.reference))),
    "accuracy": lambda drawn: judged(drawn).accuracy,
}


def forecasting_last(network: Any, process: Any, config: ConfigDict, threshold: Any, interval: Any) -> Denoiser:
    """The last block forecast below `threshold` and between the steps of `interval`: the gate has the interval `NEVER`,
    the clock the threshold `ALWAYS`. Both begin with the same warm-up and compute the last step."""
    refresh = either(every(interval, config.warmup), first_and_last(config.warmup))
    return gated(network, process, threshold, refresh=refresh, **orders(config))


def orders(config: ConfigDict) -> dict[str, Any]:
    return {"probe": taylor(config.probe_order), "last": taylor(config.order)}


def tracer(network: Any, process: Any, config: ConfigDict, shape: tuple[int, ...], cond: Any = None) -> Any:
    """The compiled `(key, params, threshold, interval) -> (full, errors of both forecasts)`, by step of a run."""
    grid = build(config.grid)

    @jax.jit
    def traced(key, params, threshold, interval):
        made = forecasting_last(network, process, config, threshold, interval)
        trace = record_gate(key, made, params, SOLVER, grid, shape=(config.samples, *shape), cond=cond)
        return trace.full, forecast_errors(network, process, params, trace, grid, cond, **orders(config))

    return lambda key, params, at, interval=NEVER: traced(key, params, np.float32(at), np.int32(interval))


def study(s: Study) -> Results:
    curves, rows = on_digits(s, s.config.digits)
    label = "work of a run, in full passes of the network"
    points = {name: tuple(np.mean(found, axis=0)) for name, found in curves.items()}
    title = "Digits: distance to the full run by work"
    pictures.save_curves(s.picture("frontier"), points, x_label=label, y_label="endpoint error", title=title)
    captions = {
        s.picture("frontier"): "Digits: distance to the full run by work, skipped steps included: lower is better."
    }
    if "mixture" in s.config:
        more, seen = on_mixture(s, s.config.mixture)
        rows += more
        title = "Mixture, one run: error of a forecast at each step"
        pictures.save_curves(s.picture("gate"), seen, x_label="t", y_label="error", title=title, falling=True)
        captions[s.picture("gate")] = "Mixture, one run: the error that the gate sees, and that of the last forecast."
    return Results(rows, captions, "the mixture's means and the noise; the transformer is trained once")


def on_mixture(s: Study, config: ConfigDict) -> tuple[list[Row], dict[str, Any]]:
    """The gate's threshold is found with other noise on the same mixture, for one evaluation less than the clock's."""
    grid, denoiser = build(config.grid), partial(forecasting_last, STAGES, VP, config)
    trace, thresholds, mixtures = tracer(STAGES, VP, config, (config.dims,)), {}, {}
    for seed in s.seeds:
        means = jax.random.normal(jax.random.key(1000 + seed), (config.components, config.dims))
        mixtures[seed] = denoisers.gaussian_mixture(means, config.std)
        asked = partial(trace, jax.random.key(2000 + seed), mixtures[seed])
        for interval in config.intervals:
            count = int(asked(ALWAYS, interval)[0].sum())
            thresholds[seed, interval] = threshold_for(lambda at, asked=asked: int(asked(at)[0].sum()), count - 1)

    def arms(seed):
        settings = {"full": (0.0, NEVER)} | {f"clock {interval}": (ALWAYS, interval) for interval in config.intervals}
        settings |= {f"gate {interval}": (thresholds[seed, interval], NEVER) for interval in config.intervals}
        at = {name: (np.float32(one), np.int32(other)) for name, (one, other) in settings.items()}
        return {name: Arm(denoiser, mixtures[seed], SOLVER, grid, None, both) for name, both in at.items()}

    measures = {name: MEASURES[name] for name in ("error", "typical")}
    found = table(arms, s.seeds, measures, shape=(config.dims,), count=config.samples, reference="full")
    traces = [trace(jax.random.key(seed), mixtures[seed], thresholds[seed, config.shown]) for seed in s.seeds]
    times, seen = np.asarray(grid)[config.warmup : -1], [np.asarray(one)[config.warmup :] for one in traces[0][1]]
    shown = {"first stage": (times, seen[0]), "last stage": (times, seen[1])}
    return mixture_rows(found, [gate_agreement(errors, full) for full, errors in traces], config), shown


def mixture_rows(found: Tabulated, ranks: list[float], config: ConfigDict) -> list[Row]:
    rows = []
    for interval, published in config.intervals.items():
        gate, clock = found[f"gate {interval}"], found[f"clock {interval}"]
        at = f"mixture, {np.mean(clock['evaluations']):.0f} evaluations: gate against clock"
        asked = f"the gate asks {np.mean(gate['evaluations']):.3g}"
        typical, whole = ((gate[name], clock[name], "lower", published) for name in ("typical", "error"))
        rows += [Row(f"{at}, typical", f"RMSE, median sample; {asked}", *typical), Row(f"{at}, all", "RMSE", *whole)]
    return [
        *rows,
        Row("mixture: the gate ranks the last stage's error", "Spearman", ranks, 0.0, "higher", "0.2 to 0.35"),
    ]


def on_digits(s: Study, config: ConfigDict) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Work and errors of gate, clock and TaylorSeer at their settings, one curve a seed; the gate without guidance."""
    base, cond = s.stage("digits", config.base), {"label": jnp.arange(config.samples) % CLASSES}
    network, process, params, grid = base.trained.network, base.trained.process, base.value, build(config.grid)

    def led(make, *at):
        return denoisers.guided(make(*at), config.guidance, NULL)

    def seer(interval):
        return cached_features(network, process, taylor(config.order), every(interval, config.warmup))

    gate = partial(forecasting_last, network, process, config, interval=NEVER)
    # The clock needs no probe, so its head is the entrance alone.
    clock = partial(forecasting_last, staged(network, 0), process, config, jnp.float32(ALWAYS))
    arms = {"full": Arm(led(denoisers.denoiser, network, process), params, SOLVER, grid, cond)}
    settings = {"gate": config.thresholds, "clock": config.intervals, "TaylorSeer": config.intervals}
    for name, make in {"gate": gate, "clock": clock, "TaylorSeer": seer}.items():
        guided, kind = partial(led, make), np.float32 if name == "gate" else np.int32
        arms |= {f"{name} {at:g}": Arm(guided, params, SOLVER, grid, cond, (kind(at),)) for at in settings[name]}
    measures = {name: MEASURES[name] for name in config.measures}
    found = table(arms, s.seeds, measures, shape=base.trained.shape, count=config.samples, reference="full")
    trace, ranks = tracer(network, process, config, base.trained.shape, cond), []
    for seed in s.seeds:
        full, errors = trace(jax.random.key(seed), params, config.chosen)
        ranks.append(gate_agreement(errors, full))
    curves = {}
    for cost in ("evaluations", "compute"):
        of = {name: [found[f"{name} {at:g}"] for at in values] for name, values in settings.items()}
        points = {name: [[np.divide(row[cost], 2).tolist(), row["error"]] for row in rows] for name, rows in of.items()}
        curves[cost] = {name: np.array(rows).transpose(2, 1, 0) for name, rows in points.items()}
    return curves["compute"], digit_rows(config, found, curves, ranks)


def digit_rows(config: ConfigDict, found: Tabulated, curves: Any, ranks: list[float]) -> list[Row]:
    full, gate, rows = found["full"], found[f"gate {config.chosen:g}"], []
    for cost, at, other, published in config.compared:
        told = f"{at:g} full evaluations" if cost == "evaluations" else f"{at:g} passes of work"
        ours, theirs = ([error_at_cost(xs, ys, at) for xs, ys in curves[cost][name]] for name in ("gate", other))
        rows.append(Row(f"digits, {told}: gate against {other}", "endpoint error", ours, theirs, "lower", published))
    if "accuracy" in gate:
        kept, told = (gate["accuracy"], full["accuracy"]), f"accuracy at {config.chosen:g}, up to 2 points less"
        rows.append(Row("digits: samples keep their class", told, *kept, "higher", "quality kept", margin=-0.02))
    speed, work = (np.divide(full[name], gate[name]).tolist() for name in ("seconds", "compute"))
    return [
        *rows,
        Row("digits: the gate ranks the last block's error", "Spearman, no guidance", ranks, 0.0, "higher"),
        Row("digits: skipped work is saved time", "times faster", speed, work, "higher", "2.36 times", factor=0.85),
    ]
