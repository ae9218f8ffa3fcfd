"""Runs that forecast the last block where a gate says so, where a clock says so, and what forecasts were really worth.

The analytic network is the exact denoiser of a Gaussian mixture in two stages: the head says which component it sees,
the body what noise that means. Its features need no training and are exact at every t.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from diffusion_jax.acceleration import either, every, first_and_last, forecasting, gated, taylor
from diffusion_jax.acceleration.gated import relative_error
from diffusion_jax.costs import count_bytes
from diffusion_jax.denoisers import recorded
from diffusion_jax.models import Staged
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser


def mixture_stages(process: Any) -> Staged:
    """The exact denoiser of a `GaussianMixture` with diagonal covariances, its parameters, in stages.

    process: predicts epsilon and feeds its network t itself (`time="t"`). Head: log p(component | x_t) but for a
    constant, `[B, K]` with mean zero: a constant would count in relative errors and means nothing.
    """

    def parts(mixture, x, t):
        alpha, sigma = (expand(level(t), x)[:, None] for level in (process.alpha, process.sigma))
        variance = alpha**2 * mixture.variances + sigma**2
        return x[:, None] - alpha * mixture.means, variance, sigma

    def head(mixture, x, t, cond=None):
        away, variance, _ = parts(mixture, x, t)
        log_density = -0.5 * (away**2 / variance + jnp.log(variance)).reshape(*away.shape[:2], -1).sum(-1)
        logits = mixture.log_weights + log_density
        return logits - logits.mean(axis=1, keepdims=True)

    def body(mixture, h, x, t, cond=None):
        away, variance, sigma = parts(mixture, x, t)
        return (expand(jax.nn.softmax(h, axis=1), away) * sigma / variance * away).sum(axis=1)

    return Staged(head, body, lambda mixture, z, x, t, cond=None: (z, {}), None)


Curve = Sequence[Mapping[str, float]]
"""One arm of one seed: `full` evaluations, `compute` and endpoint `error` of each of its settings."""


class Found(NamedTuple):
    """Samples of a run, its full evaluations and work by sample; for gated runs the errors and decisions `[S]`."""

    x: Any
    full: Any
    compute: Any
    error: Any
    steps: Any


class GateSettings(NamedTuple):
    """What both arms share. probe_order: of the head's forecast. order: of the last block's. warmup: full steps."""

    probe_order: int = 3
    order: int = 1
    warmup: int = 3


def last_block(network: Any, process: Any, settings: GateSettings, head: int = 1) -> Callable[[Any, Any], Denoiser]:
    """`(threshold, interval) -> denoiser`: the last block is forecast below the threshold and between intervals.

    The gate alone has an interval longer than the run, the clock alone an infinite threshold; both begin with the same
    warm-up and compute the last step.
    """

    def make(threshold, interval):
        refresh = either(every(interval, settings.warmup), first_and_last(settings.warmup))
        return gated(
            network,
            process,
            threshold,
            probe=taylor(settings.probe_order),
            last=taylor(settings.order),
            refresh=refresh,
            head=head,
        )

    return make


def run_of(
    make: Callable[..., Denoiser], solver: Any, grid: Any, shape: tuple[int, ...], around: Any = None
) -> Callable[..., Found]:
    """The compiled `(key, params, *settings, cond=None) -> Found` of the denoiser `make(*settings)`.

    shape: of all samples. around: a transformation of the denoiser, e.g. guidance, which asks twice a step.
    """
    length = len(grid) - 1

    def read(prediction, x, step):
        whole = jnp.bool_(True), jnp.float32(jnp.nan)
        full, error = (prediction.extras.get(name, other) for name, other in zip(("gate_full", "gate_error"), whole))
        return {"full": full, "error": error, "x": x}

    @jax.jit
    def run(key, params, *settings, cond=None):
        inner = make(*settings)
        denoiser = recorded(inner if around is None else around(inner), length, read)
        found = sample(key, denoiser, params, solver, grid, shape=shape, cond=cond)
        kept, asked = found.run.carry.values, 1 if around is None else 2
        cost = found.cost
        return Found(found.x, cost.evaluations / asked, cost.compute / asked, kept["error"], (kept["full"], kept["x"]))

    return run


def matched(run: Callable[[Any], Found], count: float, low: float = 1e-4, high: float = 2.0, rounds: int = 14) -> Found:
    """The gated run of the lowest threshold with at most `count` full evaluations, by bisection of its logarithm."""
    best = run(high)
    for _ in range(rounds):
        middle = (low * high) ** 0.5
        found = run(middle)
        if float(found.full) <= count:
            best, high = found, middle
        else:
            low = middle
    return best


def true_errors(
    stages: Staged, process: Any, params: Any, found: Found, grid: Any, settings: GateSettings, cond: Any = None
) -> tuple[Any, Any]:
    """Relative errors `[S]` of both forecasts along a gated run, the true features computed at every step.

    The tables are filled where the run filled them. Where nothing can be forecast yet the errors are infinite.
    """
    probe, last = taylor(settings.probe_order), taylor(settings.order)
    full, xs = found.steps

    def features(x, t):
        inputs = process.network_input(x, t), process.network_time(jnp.broadcast_to(t, x.shape[:1])), cond
        h = stages.head(params, *inputs)
        return h, stages.body(params, h, *inputs)

    def body(tables, entry):
        index, x, t, now = entry
        values = features(x, t)
        errors, new = [], []
        for forecaster, table, value in zip((probe, last), tables, values):
            error = relative_error(forecasting.predict(forecaster, table, index), value, value)
            errors.append(jnp.where(table.count == 0, jnp.inf, error))
            fresh = forecasting.update(forecaster, table, value, index)
            new.append(jax.tree.map(lambda a, b: jnp.where(now, a, b), fresh, table))
        return tuple(new), tuple(errors)

    shapes = jax.eval_shape(features, xs[0], grid[0])
    tables = tuple(forecasting.init(forecaster, one) for forecaster, one in zip((probe, last), shapes))
    steps = jnp.arange(len(xs))
    return jax.lax.scan(body, tables, (steps, xs, jnp.asarray(grid)[:-1], full))[1]


def cache_bytes(denoiser: Denoiser, params: Any, shape: tuple[int, ...], cond: Any) -> float:
    """Bytes of what a denoiser carries from step to step."""
    return float(count_bytes(jax.eval_shape(denoiser.init, params, jax.ShapeDtypeStruct(shape, jnp.float32), cond)))


def correlation(errors: tuple[Any, Any], full: Any) -> float:
    """Spearman's, between the errors of both forecasts at the steps that were skipped."""
    probe, last = (np.asarray(one)[~np.asarray(full)] for one in errors)
    return float(np.nan_to_num(np.asarray(spearmanr(probe, last))[0])) if probe.size > 2 else 0.0


def error_at(curve: Curve, name: str, value: float) -> float:
    """The error of an arm where its `name` is `value`: the logarithm lies on the line between two settings."""
    points = sorted((one[name], np.log(max(one["error"], 1e-12))) for one in curve)
    settings, errors = zip(*points, strict=True)
    return float(np.exp(np.interp(value, settings, errors)))


def median_error(x: Any, reference: Any) -> float:
    """The median over samples of their root mean square error: what samples that end in another mode leave alone."""
    by_sample = np.mean((np.asarray(x) - np.asarray(reference)).reshape(len(x), -1) ** 2, axis=1)
    return float(np.median(np.sqrt(by_sample)))
