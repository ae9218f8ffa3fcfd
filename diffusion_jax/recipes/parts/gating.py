"""Runs that forecast the last block where a gate says so, and where a clock says so."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.acceleration import either, every, first_and_last, gated, taylor, threshold_for
from diffusion_jax.denoisers import recorded
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Grid, Solver


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


def last_block(
    network: Any, process: GaussianProcess, settings: GateSettings, head: int = 1
) -> Callable[[Any, Any], Denoiser]:
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
    make: Callable[..., Denoiser], solver: Solver, grid: Grid, shape: tuple[int, ...], around: Any = None
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


def matched(run: Callable[[Any], Found], count: float) -> Found:
    """The gated run of the lowest threshold with at most `count` full evaluations."""
    return run(threshold_for(lambda at: float(run(at).full), count))
