"""When a cache is computed anew: policies as pure functions of the step and of what happened since, inside the scan.

    refresh(step, history) -> bool []

Intervals, warm-ups and thresholds may be traced, and schedules are arrays: other values compile nothing. Whatever a
policy says, an empty cache is filled first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from diffusion_jax.clock import as_grid, clock, num_steps
from diffusion_jax.denoisers.conditions import sample_time
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.typing import Step


class RefreshHistory(NamedTuple):
    """What a cache has done since it was made. computed: how often it was filled. since: calls since the last time."""

    computed: Int[Array, ""]
    since: Int[Array, ""]


Refresh = Callable[[Step, RefreshHistory], Any]
"""See the module."""


def no_history() -> RefreshHistory:
    """The history of a cache that was not used yet."""
    return RefreshHistory(jnp.int32(0), jnp.int32(0))


def after(history: RefreshHistory, computed: Any) -> RefreshHistory:
    """The history after a call that computed anew, or did not."""
    computed = jnp.asarray(computed)
    return RefreshHistory(history.computed + computed, jnp.where(computed, 0, history.since + 1))


def every(interval: int | Int[Array, ""], warmup: int | Int[Array, ""] = 1) -> Refresh:
    """The first `warmup` calls, then each `interval`-th: W + floor((S - W) / N) of S calls (TaylorSeer's schedule).

    Raises InvalidInput for a plain interval or warm-up below 1.
    """
    for field, value in (("interval", interval), ("warmup", warmup)):
        if isinstance(value, int) and value < 1:
            raise invalid(field, value, "it must be at least 1")

    def refresh(step, history):
        return (history.computed < warmup) | (history.since >= interval - 1)

    return refresh


def on_schedule(schedule: Bool[Array, " S"] | Any) -> Refresh:
    """Where `schedule[step.index]` is True: a calibrated schedule `[S]`. Raises InvalidInput for other shapes."""
    table = jnp.asarray(schedule, bool)
    if table.ndim != 1:
        raise invalid("schedule.shape", table.shape, "one bool a step, [S], was expected")
    return lambda step, history: jnp.take(table, step.index, mode="clip")


def spread_schedule(steps: int, count: int) -> np.ndarray:
    """A schedule `[steps]` for `on_schedule` of `count` computed steps at equal distances, first and last among them.

    Raises InvalidInput for a count that is not in 2 .. steps.
    """
    if not 2 <= count <= steps:
        raise invalid("count", count, f"it must be in 2 .. {steps}, the steps of the run")
    schedule = np.zeros(steps, bool)
    schedule[np.round(np.linspace(0, steps - 1, count)).astype(int)] = True
    return schedule


def first_and_last(warmup: int | Int[Array, ""] = 1, last: bool = True) -> Refresh:
    """The first `warmup` calls and, with `last`, the last step of the run."""

    def refresh(step, history):
        warming_up = history.computed < warmup
        return warming_up | (step.index >= step.num_steps - 1) if last else warming_up

    return refresh


def either(*policies: Refresh) -> Refresh:
    """At the steps that any of `policies` chooses."""
    return lambda step, history: jnp.stack([jnp.asarray(policy(step, history)) for policy in policies]).any()


def due(refresh: Refresh, step: Step, history: RefreshHistory) -> Bool[Array, ""]:
    """Whether to compute now: as `refresh` says, and always where the cache is empty."""
    return jnp.asarray(refresh(step, history)) | (history.computed == 0)


def refresh_table(refresh: Refresh, grid: Any) -> Bool[Array, " S"]:
    """The steps of `grid` at which a cache with one call per step is filled: the schedule of a policy, before a run.

    Its sum is what the run will ask: how many steps the plain solver may have at the same evaluations.
    """
    ticks = clock(as_grid(grid))

    def body(history, index):
        now = due(refresh, ticks.step(index), history)
        return after(history, now), now

    return jax.lax.scan(body, no_history(), jnp.arange(num_steps(ticks.grid), dtype=jnp.int32))[1]


COORDINATES = ("index", "t", "log_snr")
"""What a feature is a function of: the step's index (as published), the time, or half the log-SNR within +-10. Solvers
that ask several times a step need one of the last two: their second question is at another time of the same index."""


def coordinate(name: str, step: Step, process: Any) -> Any:
    """The scalar s of a step; where t has more axes, its noisiest entry decides."""
    if name not in COORDINATES:
        raise unknown("coordinate", name, COORDINATES)
    if name == "index":
        return jnp.asarray(step.index, jnp.float32)
    t = jnp.max(sample_time(step.t))
    return t if name == "t" else jnp.clip(0.5 * process.log_snr(t), -10.0, 10.0)
