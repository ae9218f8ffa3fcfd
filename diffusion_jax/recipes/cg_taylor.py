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

from diffusion_jax import acceleration, denoisers, metrics, pictures, processes, solvers
from diffusion_jax.acceleration import cached_features, either, every, first_and_last, gated, record_gate, taylor
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.config import build
from diffusion_jax.costs import carry_bytes
from diffusion_jax.metrics import Judged, endpoint_error, error_at_cost, errors_by_sample, feature_network
from diffusion_jax.models import staged
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Table, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.typing import Denoiser

SOLVER, VP = solvers.ddim(), processes.vp_linear(time="t")
STAGES = denoisers.analytic_stages(VP)
NEVER, ALWAYS = 10**6, np.inf
"""An interval that is longer than any run, and a threshold that trusts every forecast."""

TURNED = 0.5
"""An error that no sample reaches within its component of the mixture, and every one that ends in another exceeds."""


def judged(drawn: Drawn) -> Judged:
    return metrics.judged(feature_network("digits"), drawn.x, np.arange(len(drawn.x)) % CLASSES)


def apart(drawn: Drawn) -> np.ndarray:
    return errors_by_sample(drawn.x, drawn.reference)


MEASURES = {
    "error": lambda drawn: endpoint_error(drawn.x, drawn.reference),
    "typical": lambda drawn: float(np.median(apart(drawn))),
    "turned": lambda drawn: float(np.mean(apart(drawn) > TURNED)),
    "accuracy": lambda drawn: judged(drawn).accuracy,
}


def forecasting_last(network: Any, process: Any, config: ConfigDict, threshold: Any, interval: Any) -> Denoiser:
    """The last block forecast below `threshold` and between the steps of `interval`: the gate has the interval `NEVER`,
    the clock the threshold `ALWAYS`. Both begin with the same warm-up and compute the last step."""
    refresh = either(every(interval, config.warmup), first_and_last(config.warmup))
    return gated(network, process, threshold, refresh=refresh, **orders(config))


def orders(config: ConfigDict) -> dict[str, Any]:
    return {"probe": taylor(config.probe_order), "last": taylor(config.order)}


def setting(threshold: float, interval: int) -> tuple[Any, Any]:
    return np.float32(threshold), np.int32(interval)


def study(s: Study) -> Results:
    curves, rows = on_digits(s, s.config.digits)
    label = "work of a run, in full passes of the network"
    points = {name: tuple(np.mean(found, axis=0)) for name, found in curves.items()}
    pictures.save_curves(s.picture("frontier"), points, x_label=label, y_label="endpoint error, digits")
    captions = {
        s.picture("frontier"): "Digits: distance to the full run by work, skipped steps included: lower is better."
    }
    if "mixture" in s.config:
        more, seen = on_mixture(s, s.config.mixture)
        rows += more
        pictures.save_curves(s.picture("gate"), seen, x_label="t, from right to left", y_label="error of a forecast")
        captions[s.picture("gate")] = (
            "Mixture, one run: the error that the gate sees, and that of the last stage's forecast."
        )
    return Results(rows, captions, "the mixture's means and the noise; the transformer is trained once")


def on_mixture(s: Study, config: ConfigDict) -> tuple[list[Row], dict[str, Any]]:
    """The gate has the threshold that asks as often as the clock; it is found with other noise on the same mixture."""
    grid, start = build(config.grid), {"shape": (config.samples, config.dims)}
    denoiser = partial(forecasting_last, STAGES, VP, config)

    @jax.jit
    def traced(key, mixture, threshold, interval):
        trace = record_gate(key, denoiser(threshold, interval), mixture, SOLVER, grid, **start)
        return trace.full, acceleration.forecast_errors(STAGES, VP, mixture, trace, grid, **orders(config))

    def arms(seed):
        means = jax.random.normal(jax.random.key(1000 + seed), (config.components, config.dims))
        mixture, settings = denoisers.gaussian_mixture(means, config.std), {"full": (0.0, NEVER)}
        for interval in config.intervals:
            asked = partial(traced, jax.random.key(2000 + seed), mixture)
            count = int(asked(*setting(ALWAYS, interval))[0].sum())
            found = acceleration.threshold_for(lambda at, asked=asked: int(asked(*setting(at, NEVER))[0].sum()), count)
            settings |= {f"clock {interval}": (ALWAYS, interval), f"gate {interval}": (found, NEVER)}
        return {name: Arm(denoiser, mixture, SOLVER, grid, None, setting(*one)) for name, one in settings.items()}

    made = {seed: arms(seed) for seed in s.seeds}
    measures = {name: MEASURES[name] for name in ("error", "typical", "turned")}
    found = table(
        lambda seed: made[seed], s.seeds, measures, shape=(config.dims,), count=config.samples, reference="full"
    )
    chosen = [made[seed][f"gate {config.shown}"] for seed in s.seeds]
    traces = [
        traced(jax.random.key(seed), arm.params, *arm.settings) for seed, arm in zip(s.seeds, chosen, strict=True)
    ]
    ranks = [acceleration.gate_agreement(errors, full) for full, errors in traces]
    part = slice(config.warmup, -1)
    first, last = ((np.asarray(grid)[part], np.asarray(one)[config.warmup :]) for one in traces[0][1])
    return mixture_rows(found, ranks, config), {"first stage": first, "last stage": last}


def mixture_rows(found: Table, ranks: list[float], config: ConfigDict) -> list[Row]:
    rows = [Row("mixture: the gate ranks the last stage's error", "Spearman", ranks, 0.0, "higher", "0.2 to 0.35")]
    for interval, published in config.intervals.items():
        gate, clock = found[f"gate {interval}"], found[f"clock {interval}"]
        at, measured = f"mixture, {np.mean(clock['evaluations']):.0f} evaluations", {"error": "RMSE to the full run"}
        measured |= {"typical": "RMSE, median sample", "turned": f"share beyond {TURNED:g}"}
        for name, title in (("typical", "nearer"), ("error", "nearer in all"), ("turned", "fewer end elsewhere")):
            published = published if name != "turned" else ""
            rows.append(
                Row(f"{at}: {title} than the clock", measured[name], gate[name], clock[name], "lower", published)
            )
        asked = gate["evaluations"], clock["evaluations"]
        rows.append(Row(f"{at}: the gate asks no more", "evaluations", *asked, "lower", "equal", margin=0.5))
    return rows


def on_digits(s: Study, config: ConfigDict) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Work and errors of gate, clock and TaylorSeer at their settings, one curve a seed; the gate without guidance."""
    base, grid, cond = (
        s.stage("digits", config.base),
        build(config.grid),
        {"label": jnp.arange(config.samples) % CLASSES},
    )
    network, process, params, shape = base.trained.network, base.trained.process, base.value, base.trained.shape

    def seer(interval):
        return cached_features(network, process, taylor(config.order), every(interval, config.warmup))

    gate = partial(forecasting_last, network, process, config)
    # The clock needs no probe, so its head is the entrance alone.
    clock = partial(forecasting_last, staged(network, 0), process, config, jnp.float32(ALWAYS))
    families = {"gate": lambda at: gate(at, NEVER), "clock": clock, "TaylorSeer": seer}
    settings = {"gate": config.thresholds, "clock": config.intervals, "TaylorSeer": config.intervals}
    arms = {"full": Arm(led(denoisers.denoiser(network, process), config), params, SOLVER, grid, cond)}
    for name, make in families.items():
        guided = partial(lambda make, at: led(make(at), config), make)
        for at in settings[name]:
            value = np.float32(at) if name == "gate" else np.int32(at)
            arms[f"{name} {at:g}"] = Arm(guided, params, SOLVER, grid, cond, (value,))
    measures = {name: MEASURES[name] for name in config.measures}
    found = table(arms, s.seeds, measures, shape=shape, count=config.samples, reference="full")

    @jax.jit
    def traced(key):
        trace = record_gate(
            key, gate(config.chosen, NEVER), params, SOLVER, grid, shape=(config.samples, *shape), cond=cond
        )
        return acceleration.forecast_errors(network, process, params, trace, grid, cond, **orders(config)), trace.full

    ranks = [acceleration.gate_agreement(*traced(jax.random.key(seed))) for seed in s.seeds]
    curves = {name: {} for name in ("compute", "evaluations")}
    for cost, of in curves.items():
        for name, values in settings.items():
            rows = [found[f"{name} {at:g}"] for at in values if at]
            of[name] = np.array([[np.divide(row[cost], 2).tolist(), row["error"]] for row in rows]).transpose(2, 1, 0)
    x, label = jax.ShapeDtypeStruct((1, *shape), jnp.float32), {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    held = [float(carry_bytes(made, params, x, label)) for made in (gate(0.0, NEVER), seer(1))]
    return curves["compute"], digit_rows(config, found, curves, ranks, held)


def led(denoiser: Denoiser, config: ConfigDict) -> Denoiser:
    return denoisers.guided(denoiser, config.guidance, NULL)


def digit_rows(config: ConfigDict, found: Table, curves: Any, ranks: list[float], held: list[float]) -> list[Row]:
    full, gate, none = found["full"], found[f"gate {config.chosen:g}"], found["gate 0"]["error"]
    compared = [("evaluations", at, "clock", "at least as good") for at in config.full]
    compared += [("compute", at, "clock", "at least as good") for at in config.work]
    compared += [("compute", at, "TaylorSeer", "2.36x, TaylorSeer 2.77x (DiT-XL/2)") for at in config.work]
    rows = []
    for cost, at, other, published in compared:
        told = f"{at:g} full evaluations" if cost == "evaluations" else f"{at:g} passes of work"
        ours, theirs = ([error_at_cost(xs, ys, at) for xs, ys in curves[cost][name]] for name in ("gate", other))
        rows.append(Row(f"digits, {told}: gate against {other}", "endpoint error", ours, theirs, "lower", published))
    speed, work = (np.divide(full[name], gate[name]).tolist() for name in ("seconds", "compute"))
    if "accuracy" in gate:
        kept, told = (gate["accuracy"], full["accuracy"]), f"accuracy at {config.chosen:g}, up to 2 points less"
        rows.append(Row("digits: samples keep their class", told, *kept, "higher", "quality kept", margin=-0.02))
    return [
        *rows,
        Row("digits: the gate ranks the last block's error", "Spearman, no guidance", ranks, 0.0, "higher"),
        Row("digits: skipped work is saved time", "times faster", speed, work, "higher", "2.36 times", factor=0.85),
        Row("digits: threshold 0 is the full run", "endpoint error", none, 0.0, "equal", "exact", margin=1e-4),
        Row(
            "digits: two tables, not two a block",
            "bytes of a sample",
            held[0],
            held[1],
            "lower",
            "one, not 2 L",
            factor=0.5,
        ),
    ]
