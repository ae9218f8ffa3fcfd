"""TaylorSeer (Liu et al. 2025): between refreshes, what layers would say is forecast from what they said before.

Two worlds: the exact denoiser of a mixture, whose noise itself is forecast, and a transformer on digits under guidance,
whose attention and feed-forward outputs are. In each, forecasts of several orders are compared with reuse and with
fewer steps of the plain solver at equal evaluations, by how far samples end from those of the full run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import acceleration, denoisers, metrics, pictures, processes, solvers, timesteps
from diffusion_jax.acceleration import every, newton, on_schedule, refresh_table, reuse, taylor
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.config import build
from diffusion_jax.recipes.study import Arm, Drawn, Results, Study, Tabulated, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.typing import Condition, Denoiser, Params

RULES = {"reuse": reuse(), "order 1": taylor(1), "order 2": taylor(2), "order 3": taylor(3), "Newton 2": newton(2)}
FEWER = "fewer steps"
TURNED = 0.5
"""An error that no sample reaches within its component of the mixture, and every one that ends in another exceeds."""


def judged(drawn: Drawn) -> metrics.Judged:
    return metrics.judged(metrics.feature_network("digits"), drawn.x, np.arange(len(drawn.x)) % CLASSES)


def apart(drawn: Drawn) -> np.ndarray:
    return metrics.errors_by_sample(drawn.x, drawn.reference)


MEASURES: dict[str, Callable[[Drawn], float]] = {
    "error": lambda drawn: metrics.endpoint_error(drawn.x, drawn.reference),
    "relative": lambda drawn: metrics.endpoint_error(drawn.x, drawn.reference, relative=True),
    "typical": lambda drawn: float(np.median(apart(drawn))),
    "turned": lambda drawn: float(np.mean(apart(drawn) > TURNED)),
    "accuracy": lambda drawn: judged(drawn).accuracy,
    "distance": lambda drawn: judged(drawn).distance,
}


class World(NamedTuple):
    """What is sampled. cached: (forecaster, warm-up, interval) -> Denoiser. params: of a seed."""

    plain: Denoiser
    cached: Callable[..., Denoiser]
    shape: tuple[int, ...]
    params: Callable[[int], Params]
    cond: Condition = None


def mixture(s: Study) -> World:
    """The exact denoiser of narrow components, whose means each seed draws anew."""
    config, exact = s.config.mixture, denoisers.analytic(processes.vp_linear())

    def params(seed):
        means = jax.random.normal(jax.random.key(1000 + seed), (config.components, config.dims))
        return denoisers.gaussian_mixture(means, config.std)

    def cached(rule, warmup, interval):
        return acceleration.cached_outputs(exact, every(interval, warmup), rule, prediction="epsilon")

    return World(exact, cached, (config.dims,), params)


def digits(s: Study) -> World:
    config, base = s.config.digits, s.stage("digits", s.config.digits.base)
    network, process, cond = base.trained.network, base.trained.process, {"label": jnp.arange(config.samples) % CLASSES}

    def cached(rule, warmup, interval):
        made = acceleration.cached_features(network, process, rule, every(interval, warmup))
        return denoisers.guided(made, config.guidance, NULL)

    plain = denoisers.guided(denoisers.denoiser(network, process), config.guidance, NULL)
    return World(plain, cached, base.trained.shape, lambda seed: base.value, cond)


WORLDS = {"digits": digits, "mixture": mixture}


def compared(s: Study, world: World, config: ConfigDict) -> Tabulated:
    """The full run, and at each interval every rule and the plain solver with as many evaluations."""
    grid, solver, steps = build(config.grid), solvers.ddim(), config.grid.steps
    rules = {rule: partial(world.cached, RULES[rule], config.warmup) for rule in config.rules}

    def fewer(computed):
        """The plain solver; steps that stand still at the end of a padded grid ask nothing."""
        return acceleration.cached_outputs(world.plain, on_schedule(computed))

    def arms(seed):
        params = world.params(seed)
        found = {"full": Arm(world.plain, params, solver, grid, world.cond)}
        for interval in config.intervals:
            count = int(refresh_table(every(interval, config.warmup), grid).sum())
            short = timesteps.padded(timesteps.linspace(count, config.grid.num_train_steps), steps)
            computed = (np.arange(steps) < count,)
            found[f"{FEWER} {interval}"] = Arm(fewer, params, solver, short, world.cond, computed)
            for rule, denoiser in rules.items():
                found[f"{rule} {interval}"] = Arm(denoiser, params, solver, grid, world.cond, (np.int32(interval),))
        return found

    measures = {name: MEASURES[name] for name in config.measures}
    return table(arms, s.seeds, measures, shape=world.shape, count=config.samples, reference="full")


def study(s: Study) -> Results:
    found, captions = {}, {}
    for name, world in ((name, world) for name, world in WORLDS.items() if name in s.config):
        config, found[name] = s.config[name], compared(s, world(s), s.config[name])
        curves = {rule: curve(found[name], rule, config) for rule in (FEWER, *config.rules)}
        labels: dict[str, Any] = {"x_label": "evaluations of the network", "y_label": "error to the full run"}
        pictures.save_curves(s.picture(name), curves, **labels, title=f"Distance to the full run: {name}")
        captions[s.picture(name)] = (
            f"Distance of samples to those of the full run by evaluations, {name}: lower is better."
        )
    config, samples = s.config.digits, found["digits"].samples
    shown = ("full", *(f"{rule} {config.far}" for rule in (FEWER, "reuse", "order 1", config.ours)))
    strips = {name: samples[name][: 2 * CLASSES] for name in shown}
    pictures.save_strips(s.picture("samples"), strips, title=f"A refresh every {config.far} steps")
    captions[s.picture("samples")] = f"The same noise in full and with a refresh every {config.far} steps."
    rows = digit_rows(found["digits"], config)
    rows += mixture_rows(found["mixture"], s.config.mixture) if "mixture" in found else []
    return Results(rows, captions, "the mixture's means and the noise; the transformer is trained once")


def curve(found: Tabulated, rule: str, config: ConfigDict) -> tuple[list[float], list[float]]:
    """Means over seeds: evaluations and errors at each interval."""
    rows, error = [found[f"{rule} {interval}"] for interval in config.intervals], config.measures[0]
    return [float(np.mean(row["evaluations"])) for row in rows], [float(np.mean(row[error])) for row in rows]


def digit_rows(found: Tabulated, config: ConfigDict) -> list[Row]:
    """Near: how far single samples end from the full run. Far: how good they are as a set."""
    full, near, far, ours = found["full"], config.near, config.far, config.ours
    error, seconds = f"relative L2 to the full run, N = {near}", (found[f"{ours} {near}"]["seconds"], full["seconds"])
    cached, reused, fewer, first = (found[f"{rule} {near}"]["relative"] for rule in (ours, "reuse", FEWER, "order 1"))
    rows = [
        Row(f"digits: {ours} is nearer than {FEWER}", error, cached, fewer, "lower", "no figure"),
        Row("digits: order 1 halves the error of reuse", error, first, reused, "lower", "no figure", factor=0.5),
        Row(
            f"digits: {ours} takes half the time", "seconds", *seconds, "lower", "3.53 times faster (FLUX)", factor=0.5
        ),
    ]
    if "distance" in config.measures:
        good, fid = f"Fréchet distance, N = {far}, within 5 %", "FID 2.32, 2.65 at N = 5; reuse 6.58"
        ours, reused, fewer = (found[f"{rule} {far}"] for rule in (ours, "reuse", FEWER))
        told, label = "accuracy, up to 2 points less", (ours["accuracy"], full["accuracy"])
        rows += [
            Row("digits: forecast samples are as good", good, ours["distance"], full["distance"], "lower", fid, 1.05),
            Row("digits: reused ones are not", good, reused["distance"], full["distance"], "higher", fid, 1.05),
            Row(f"digits: those of {FEWER} are not", good, fewer["distance"], full["distance"], "higher", "", 1.05),
            Row("digits: forecast samples keep their label", told, *label, "higher", "", margin=-0.02),
        ]
    return rows


def mixture_rows(found: Tabulated, config: ConfigDict) -> list[Row]:
    """The card's prototype: at each interval the order that it used, and its errors by reuse and by that order."""
    rows = []
    for interval, (order, published) in config.prototype.items():
        told, error, typical = f"mixture, N = {interval}: order {order}", "RMSE to the full run", "RMSE, median sample"
        ours, reused, fewer = (found[f"{rule} {interval}"] for rule in (f"order {order}", "reuse", FEWER))
        turned, share = (ours["turned"], reused["turned"]), f"share beyond {TURNED:g}; reuse"
        rows += [
            Row(
                f"{told} has a third of reuse's error", error, ours["error"], reused["error"], "lower", published, 1 / 3
            ),
            Row(f"{told} is nearer than {FEWER}", error, ours["error"], fewer["error"], "lower", published),
            Row(f"{told} is nearer than reuse, typically", typical, ours["typical"], reused["typical"], "lower"),
            Row(f"{told}, fewer samples end elsewhere", share, *turned, "lower"),
        ]
    return rows
