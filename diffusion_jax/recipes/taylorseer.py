"""TaylorSeer: at most steps, what attention and feed-forward layers would say is forecast from what they said before.

A feature of a network, seen along a run, is a smooth curve, so that between two computed steps a short Taylor series
comes nearer to it than its last value (Liu et al. 2025). First the exact denoiser of a mixture, whose noise itself is
forecast; then the transformer for digits that is shared by all recipes about cheaper sampling.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import acceleration, denoisers, pictures, processes, solvers, timesteps
from diffusion_jax.acceleration import every, hermite, newton, reuse, taylor
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.costs import count_bytes
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.metrics import endpoint_error, sampling_cost
from diffusion_jax.recipes import Claim, Results, claim, seeds, trained
from diffusion_jax.recipes.parts.digits import judged
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Params

RULES = {
    "reuse": reuse(),
    **{f"Taylor {order}": taylor(order) for order in (1, 2, 3, 4)},
    "Newton 2": newton(2),
    "Hermite 2": hermite(2),
}
"""Forecasters by the name that pictures give them."""

PROTOTYPE = {3: (1, 0.085, 0.019, 0.088), 5: (2, 0.138, 0.024, 0.125)}
"""By interval what a prototype measured on 256 samples: order, the RMSE of reuse, of that order and of fewer steps."""

TURNED = 0.5
"""An RMSE that no sample reaches within a component of the mixture, and every one that ends in another exceeds."""

FEWER = "fewer steps"
"""The name of DDIM on as many steps as a cached run has evaluations."""

Make = Callable[[Any], Denoiser]
"""A denoiser of a refresh interval, which may be traced."""


def drawer(make: Make, steps: int) -> Callable[..., Any]:
    """`(key, params, shape, cond, interval) -> Samples` by DDIM: one program for all keys and intervals."""
    grid = timesteps.linspace(steps, 1000)

    def draw(key, params, shape, cond, interval):
        return sample(key, make(interval), params, solvers.ddim(), grid, shape=shape, cond=cond)

    compiled = jax.jit(draw, static_argnums=2)
    return lambda key, params, shape, cond=None, interval=1: compiled(key, params, shape, cond, jnp.int32(interval))


def asked(steps: int, interval: int, warmup: int) -> int:
    """Evaluations of a run: W + floor((S - W) / N)."""
    return warmup + (steps - warmup) // interval


def run(config: ConfigDict, workdir: Path) -> Results:
    experiment = prepare(config.base)
    params = trained(experiment, "digits-transformer")
    exact, digits = exact_draws(config.mixture), digit_draws(config, experiment)
    claims = exact_claims(config, exact, list(seeds(config)))
    strips, more = trained_claims(config, experiment, params, digits)
    files = [workdir / name for name in ("mixture.png", "errors.png", "samples.png")]
    found = exact_errors(config, exact, [config.seed], config.rules, config.intervals)
    curves = {name: (costs, [rms(errors[0]) for errors in every]) for name, (costs, every) in found.items()}
    pictures.save_curves(files[0], curves, x_label="evaluations", y_label="RMSE to the full run, mixture")
    curves = trained_errors(config, experiment, params, digits)
    pictures.save_curves(files[1], curves, x_label="evaluations", y_label="relative error, digits")
    pictures.save_strips(files[2], strips)
    return Results(claims + more, files)


class Draws(NamedTuple):
    """Each a program that is made once. plain: by the number of steps. cached: by the name of a rule."""

    plain: Callable[[int], Callable[..., Any]]
    cached: Callable[[str], Callable[..., Any]]


def exact_draws(config: ConfigDict) -> Draws:
    """The exact denoiser of a mixture, and its noise forecast."""
    exact = denoisers.analytic(processes.vp_linear())

    def make(rule, interval):
        refresh = every(interval, config.warmup)
        return acceleration.cached_outputs(exact, refresh, RULES[rule], prediction="epsilon")

    return Draws(
        cache(lambda steps: drawer(lambda interval: exact, steps)),
        cache(lambda rule: drawer(partial(make, rule), config.steps)),
    )


def exact_errors(
    config: ConfigDict, draws: Draws, numbers: list[int], rules: Sequence[str], intervals: Sequence[int]
) -> dict[str, tuple[list[int], list[list[np.ndarray]]]]:
    """By rule, and for DDIM on fewer steps: evaluations, and by interval and seed the error of each sample, `[B]`.

    The error is the RMSE to what the full run makes of the same noise.
    """
    compare_fewer, config = config.fewer, config.mixture
    shape = config.samples, config.size
    costs = [asked(config.steps, interval, config.warmup) for interval in intervals]
    curves = {name: (costs, [[] for _ in costs]) for name in (*rules, *[FEWER] * compare_fewer)}
    for seed in numbers:
        key, means_key = jax.random.split(jax.random.key(seed))
        means = jax.random.normal(means_key, (config.components, config.size))
        mixture = denoisers.gaussian_mixture(means, config.std)
        reference = np.asarray(draws.plain(config.steps)(key, mixture, shape).x)
        for at, (interval, cost) in enumerate(zip(intervals, costs)):
            runs = {name: draws.cached(name)(key, mixture, shape, None, interval) for name in rules}
            if compare_fewer:
                runs[FEWER] = draws.plain(cost)(key, mixture, shape)
            for name, result in runs.items():
                curves[name][1][at].append(rms(np.asarray(result.x) - reference, axis=1))
    return curves


def rms(values: Any, axis: int | None = None) -> Any:
    """The root of the mean square."""
    return np.sqrt(np.mean(np.square(values), axis=axis))


def exact_claims(config: ConfigDict, draws: Draws, numbers: list[int]) -> list[Claim]:
    intervals, steps = config.mixture.intervals, config.mixture.steps
    rules = ["reuse", *(f"Taylor {PROTOTYPE[interval][0]}" for interval in intervals)]
    errors = {name: values for name, (_, values) in exact_errors(config, draws, numbers, rules, intervals).items()}
    claims = []
    for at, interval in enumerate(intervals):
        order, reuse_error, error, fewer_error = PROTOTYPE[interval]
        ours, setting = f"Taylor {order}", f"mixture, N = {interval}, S = {steps}"
        whole, typical, turned = (
            {name: [float(measure(one)) for one in errors[name][at]] for name in errors}
            for measure in (rms, np.median, lambda one: np.mean(one > TURNED))
        )
        metric = f"RMSE to the full run, {setting}"
        claims.append(
            claim(
                f"Order {order} is three times as near as reuse, N = {interval}",
                metric,
                whole["reuse"],
                whole[ours],
                "lower",
                f"{reuse_error} by reuse, {error} by order {order} (a prototype with 256 samples)",
                factor=1 / 3,
                reason="nearly all of this error is that of the few samples that end in another component; of 256 "
                "samples one that does is 0.088, all that the prototype saw by reuse at N = 3",
            )
        )
        if config.fewer:
            claims.append(
                claim(
                    f"Order {order} is nearer than {FEWER}, N = {interval}",
                    f"{metric}; the baseline is DDIM with as many evaluations",
                    whole[FEWER],
                    whole[ours],
                    "lower",
                    f"{fewer_error} with as many evaluations (a prototype with 256 samples)",
                    reason="a few samples end in another component, whichever way steps are saved",
                )
            )
        claims += [
            claim(
                f"Order {order} is nearer than reuse for a typical sample, N = {interval}",
                f"RMSE of one sample to the full run, median, {setting}",
                typical["reuse"],
                typical[ours],
                "lower",
                "no figure",
            ),
            claim(
                f"Fewer samples end in another component, N = {interval}",
                f"share of samples further than {TURNED:g} from the full run, {setting}; order {order} against reuse",
                turned["reuse"],
                turned[ours],
                "lower",
                "no figure",
                reason="samples near the border of two components turn at the smallest error",
            ),
        ]
    return claims


def forecasting(experiment: Experiment, rule: Any, warmup: int, scale: float = 1.0) -> Make:
    """The transformer with its features forecast by `rule`, guided by `scale`."""

    def make(interval):
        cached = acceleration.cached_features(experiment.network, experiment.process, rule, every(interval, warmup))
        return denoisers.guided(cached, scale, NULL)

    return make


def computing(experiment: Experiment, scale: float = 1.0) -> Make:
    """The transformer, always computed."""
    plain = denoisers.denoiser(experiment.network, experiment.process)
    return lambda interval: denoisers.guided(plain, scale, NULL)


def digit_draws(config: ConfigDict, experiment: Experiment, scale: float = 1.0) -> Draws:
    """The transformer, always computed or with its features forecast, guided by `scale`."""
    return Draws(
        cache(lambda steps: drawer(computing(experiment, scale), steps)),
        cache(lambda rule: drawer(forecasting(experiment, RULES[rule], config.warmup, scale), config.steps)),
    )


def labels_in_turn(count: int) -> dict[str, Any]:
    return {"label": np.arange(count) % CLASSES}


def trained_errors(
    config: ConfigDict, experiment: Experiment, params: Params, draws: Draws
) -> dict[str, tuple[list[int], list[float]]]:
    """By rule: evaluations, and the relative L2 distance of samples to those of the full run; of the first seed."""
    key, cond = jax.random.key(config.seed), labels_in_turn(config.curve_samples)
    shape = (config.curve_samples, *experiment.shape)
    reference = draws.plain(config.steps)(key, params, shape, cond).x
    costs = [asked(config.steps, interval, config.warmup) for interval in config.intervals]
    curves = {}
    for name in config.rules:
        runs = [draws.cached(name)(key, params, shape, cond, interval).x for interval in config.intervals]
        curves[name] = costs, [endpoint_error(x, reference, relative=True) for x in runs]
    if config.fewer:
        runs = [draws.plain(cost)(key, params, shape, cond).x for cost in costs]
        curves[FEWER] = costs, [endpoint_error(x, reference, relative=True) for x in runs]
    return curves


def trained_claims(
    config: ConfigDict, experiment: Experiment, params: Params, unguided: Draws
) -> tuple[dict[str, Any], list[Claim]]:
    """What runs at the chosen interval lose and save, and the same samples by each of them, by name, at the last of
    `config.scales`."""
    shape, cond = (config.samples, *experiment.shape), labels_in_turn(config.samples)
    cost, ours = asked(config.steps, config.interval, config.warmup), f"Taylor {config.order}"
    claims, strips = [], {}
    for scale in config.scales:
        how = "without guidance" if scale == 1.0 else f"guided by {scale:g}"
        programs = unguided if scale == 1.0 else digit_draws(config, experiment, scale)
        draws = {"full": programs.plain(config.steps)}
        if config.fewer:
            draws[FEWER] = programs.plain(cost)
        draws |= {name: programs.cached(name) for name in ("reuse", "Taylor 1", ours)}
        error, quality, counted = ({name: [] for name in draws} for _ in range(3))
        for seed in seeds(config):
            runs = {
                name: draw(jax.random.key(seed), params, shape, cond, config.interval) for name, draw in draws.items()
            }
            for name, result in runs.items():
                error[name].append(endpoint_error(result.x, runs["full"].x, relative=True))
                quality[name].append(judged(result.x, cond["label"]))
                counted[name].append(float(result.cost.evaluations))
            if seed == config.seed:
                strips = {f"{name}, {int(counted[name][0])}": result.x[:20] for name, result in runs.items()}
        claims += guided_claims(config, how, ours, error, quality)
        if scale == 1.0:
            claims += exactly(config, experiment, params, draws, counted[ours])
    return strips, claims


def guided_claims(config: ConfigDict, how: str, ours: str, error: Any, quality: Any) -> list[Claim]:
    """Errors, accuracy and distance of the runs at equal evaluations; `how` they are guided."""
    metric = f"relative L2 to the full run, {how}, N = {config.interval}"
    accuracy, distance = (
        {name: [getattr(one, field) for one in every] for name, every in quality.items()}
        for field in ("accuracy", "distance")
    )
    margins, table = config.margins, "FID 2.32 in full, 2.65 at N = 5, m = 3; reuse 6.58"
    claims = [
        claim(
            f"Order 1 halves the error of reuse, {how}",
            metric,
            error["reuse"],
            error["Taylor 1"],
            "lower",
            table,
            factor=0.5,
            reason="the features of so small a network turn too much between two computed steps",
        )
    ]
    if config.fewer:
        claims.append(
            claim(
                f"Nearer than {FEWER} at equal evaluations, {how}",
                f"{metric}; {ours}; the baseline is DDIM with as many evaluations",
                error[FEWER],
                error[ours],
                "lower",
                "no figure",
                reason="DDIM on fewer steps is exact in what it computes, and this ODE is nearly straight",
            )
        )
    return [
        *claims,
        claim(
            f"The accuracy of the full run, {how}",
            f"share of samples read as their label; {ours}, at most {100 * margins.accuracy:g} points lower",
            accuracy["full"],
            accuracy[ours],
            "higher",
            table,
            margin=-margins.accuracy,
        ),
        claim(
            f"The distance of the full run, {how}",
            f"Fréchet distance to held-out digits; {ours}, within a factor {margins.distance:g}",
            distance["full"],
            distance[ours],
            "lower",
            table,
            factor=margins.distance,
            reason="the forecast moves samples more than the judge tolerates",
        ),
        claim(
            f"Reuse does not reach that distance, {how}",
            f"Fréchet distance to held-out digits; reuse, more than a factor {margins.distance:g} above the full run",
            distance["full"],
            distance["reuse"],
            "higher",
            table,
            factor=margins.distance,
            reason="what reuse changes in each sample leaves the set of samples as good as it was",
        ),
    ]


def exactly(
    config: ConfigDict, experiment: Experiment, params: Params, draws: Any, counted: list[float]
) -> list[Claim]:
    """What the cached runs ask, hold and take; `counted` evaluations."""
    ours = f"Taylor {config.order}"
    shape, cond = (config.curve_samples, *experiment.shape), labels_in_turn(config.curve_samples)
    key = jax.random.key(config.seed)
    full, same = (draws[name](key, params, shape, cond, 1).x for name in ("full", ours))
    kept = jax.eval_shape(
        forecasting(experiment, RULES[ours], config.warmup)(1).init, params, jnp.zeros(shape), cond
    ).table.values
    anatomy = experiment.network.anatomy
    tokens = (shape[1] // anatomy.patch) * (shape[2] // anatomy.patch)
    features = 2 * anatomy.depth * shape[0] * tokens * anatomy.width
    seconds = {
        name: sampling_cost(
            lambda name=name: draws[name](key, params, shape, cond, config.interval), shape[0], config.repeats
        ).seconds_per_sample
        for name in ("full", ours)
    }
    return [
        claim(
            "Refreshed at every step it is the plain run",
            "largest difference of any pixel",
            0.0,
            float(np.abs(np.asarray(same) - np.asarray(full)).max()),
            "equal",
            "exact by construction",
        ),
        claim(
            "A run asks W + floor((S - W) / N) times",
            f"network evaluations, counted; N = {config.interval}, W = {config.warmup}, S = {config.steps}",
            float(asked(config.steps, config.interval, config.warmup)),
            counted,
            "equal",
            "4.53 times fewer operations at N = 5",
        ),
        claim(
            "The carry holds m + 1 outputs of every module",
            f"bytes of {shape[0]} samples in float32, m = {config.order}",
            float(4 * (config.order + 1) * features),
            float(count_bytes(kept)),
            "equal",
            "(m + 1) times that of reuse",
        ),
        claim(
            "At least twice as fast",
            f"seconds per sample, median of {config.repeats}; {ours}, N = {config.interval}",
            seconds["full"],
            seconds[ours],
            "lower",
            "3.53 times on FLUX at 4.99 times fewer operations",
            factor=0.5,
            reason="what is left of a skipped step, embeddings, gates and the last layer, weighs more in so small a "
            "network",
        ),
    ]
