"""What sampling costs: network evaluations and seconds per sample, measured with the device's work waited for."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from diffusion_jax.errors import invalid

Name = TypeVar("Name")


class SamplingCost(NamedTuple):
    """nfe, compute: network evaluations per sample, and work in units of one full pass (nan when unknown).

    seconds_per_sample: median over the repeats. first_call_seconds: tracing and compiling included.
    """

    nfe: float
    compute: float
    seconds_per_sample: float
    images_per_second: float
    first_call_seconds: float


def sampling_cost(run: Callable[[], Any], num_samples: int, repeats: int = 3) -> SamplingCost:
    """Times `run()`, which draws `num_samples` samples; NFE and compute are read from its result's `cost`, if any."""
    if num_samples < 1 or repeats < 1:
        raise invalid("num_samples, repeats", (num_samples, repeats), "both must be at least 1")
    first, result = timed(run)
    seconds = statistics.median(timed(run)[0] for _ in range(repeats))
    cost = getattr(result, "cost", None)
    nan = float("nan")
    return SamplingCost(
        nfe=nan if cost is None else float(cost.evaluations),
        compute=nan if cost is None else float(cost.compute),
        seconds_per_sample=seconds / num_samples,
        images_per_second=num_samples / seconds,
        first_call_seconds=first,
    )


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `run()` takes, until its arrays are computed, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def interleaved(runs: Mapping[Name, Callable[[], Any]], repeats: int = 3) -> dict[Name, list[float]]:
    """Seconds of each of `runs`, taken in turns so that a machine that slows down slows all of them.

    Each is called once before, which compiles it; then `repeats` rounds are timed. Compare round by round.
    """
    if repeats < 1:
        raise invalid("repeats", repeats, "it must be at least 1")
    for run in runs.values():
        jax.block_until_ready(run())
    rounds = [{name: timed(run)[0] for name, run in runs.items()} for _ in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in runs}
