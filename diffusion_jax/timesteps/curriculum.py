"""A curriculum of times: training begins with the noisiest interval and takes in the next once the loss has settled.

With intervals C_1 (least noise, hardest) .. C_N (most noise, easiest), stage n draws from the base distribution given
that t lies in

    U_n = C_N, ..., C_{N - n + 1}                                                                              (1)

(Kim et al. 2024, denoising task difficulty-based curriculum). A stage ends when its mean loss has not been below its
best for `patience` losses; in the last stage the draw is the base. `metrics.difficulty` measures which times are hard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.errors import invalid
from diffusion_jax.timesteps.clusters import checked_edges
from diffusion_jax.timesteps.draws import numbers_between, quantile_of, uniform
from diffusion_jax.typing import Number, Numbers, Quantile, TimestepDraw


class Pacing(NamedTuple):
    """Where a curriculum is; every number is finite, as in all states of training.

    stage: 1 .. N. smoothed: the mean loss of the stage. best: the least of that. waited: losses since then. seen:
    losses of the stage; before its first, smoothed and best mean nothing.
    """

    stage: Int[Array, ""]
    smoothed: Float[Array, ""]
    best: Float[Array, ""]
    waited: Int[Array, ""]
    seen: Int[Array, ""]


def paced(
    pacing: Pacing,
    loss: Any,
    stages: int,
    patience: int | Int[Array, ""] | None,
    smoothing: Number | Float[Array, ""] = 0.99,
    longest: int | Int[Array, ""] | None = None,
) -> Pacing:
    """The pacing after one more loss; one that is not finite changes nothing. For the arguments see `curriculum`.

    The mean is that of all losses of the stage until those are 1 / (1 - smoothing), and exponential from then on. It
    begins anew with each stage: a harder interval raises the loss, and a mean that still climbs would look settled. The
    mean of a few losses is no yardstick either, so until then the best follows it, up and down.
    """
    seen = pacing.seen + 1
    begins = pacing.seen == 0
    share = jnp.maximum(1.0 - smoothing, 1.0 / seen)
    smoothed = jnp.where(begins, loss, pacing.smoothed + share * (loss - pacing.smoothed))
    better = begins | (smoothed < pacing.best)
    best = jnp.where(better | (seen * (1.0 - smoothing) < 1.0), smoothed, pacing.best)
    waited = jnp.where(better, 0, pacing.waited + 1)
    settled: Bool[Array, ""] = jnp.bool_(False) if patience is None else waited >= patience
    if longest is not None:
        settled = settled | (seen >= longest)
    advances = settled & (pacing.stage < stages)
    within = (jnp.where(advances, jnp.zeros_like(after), after) for after in (smoothed, best, waited, seen))
    new = Pacing(pacing.stage + advances, *within)
    finite = jnp.isfinite(loss)
    return Pacing(*(jnp.where(finite, after, before) for after, before in zip(new, pacing, strict=True)))


def curriculum(
    edges: Numbers | Sequence[Number] | int = 20,
    base: TimestepDraw | None = None,
    patience: int | None = 200,
    smoothing: Number = 0.99,
    longest: int | None = None,
    easy_first: bool = True,
) -> TimestepDraw:
    """A draw whose support grows, by the recorded losses, from the interval of most noise to all of [0, 1]: equation
    (1).

    edges: `[N + 1]`, rising from 0 to 1 (`interval_clusters`); or N, for intervals that are equally likely under the
        base: equal parts of [0, 1] under uniform t, quantiles of a log-normal.
    base: the distribution in the end, uniform by default; one with a quantile function. With `by_cluster(edges)` the
        intervals so far are drawn equally often, as `objectives.multitask` needs it.
    patience: how many losses without a better mean end a stage; None waits for `longest` alone.
    smoothing: of the loss; 0 takes it as it comes.
    longest: how many losses a stage has at most; with patience=None it has exactly so many, whatever the loss is.
    easy_first: False grows from the least noise upwards, the reversed curriculum that the method is compared with.

    The stages should take a tenth or two of a training, not more: times that are left out are not learned. The state is
    a `Pacing`; it is saved with the run and never compiles anew. Losses count without the weight of the draw, and the
    loss of a batch is its mean over all devices, which so go on together; with gradient accumulation each part of the
    batch counts as one loss. Raises InvalidInput for edges that do not rise from 0 to 1, for a base without quantiles
    and for numbers below 1.
    """
    base = uniform() if base is None else base
    quantile = quantile_of(base)
    if patience is None and longest is None:
        raise invalid("patience, longest", (None, None), "one of them must end the stages")
    for name, value in (("patience", patience), ("longest", longest)):
        if value is not None and not 1 <= value < 2**31:
            raise invalid(name, value, "it must be at least 1 and less than 2^31")
    if not 0 <= smoothing < 1:
        raise invalid("smoothing", smoothing, "it must lie in [0, 1)")
    numbers, times = _supports(edges, quantile, easy_first)
    stages = len(numbers)

    def draw(state, key, shape):
        (first, last), (low, high) = numbers[state.stage - 1], times[state.stage - 1]
        t = quantile.function(first + (last - first) * quantile.numbers(key, shape))
        # In the tail of a distribution neighbouring numbers are times that lie apart.
        return jnp.clip(t, low, high), jnp.ones_like(t)

    def init():
        return Pacing(jnp.int32(1), jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))

    def update(state, t, loss):
        return paced(state, jnp.mean(loss).astype(jnp.float32), stages, patience, smoothing, longest)

    return TimestepDraw(init, draw, update)


def _supports(edges: Any, quantile: Quantile, easy_first: bool) -> tuple[Any, Any]:
    """The ranges of the quantile's numbers and of the times in each stage, `[N, 2]`; (0, 1) exactly in the last."""
    if isinstance(edges, int):
        if edges < 1:
            raise invalid("edges", edges, "edges from 0 to 1, or a number of intervals of at least 1, are needed")
        shares = jnp.arange(1, edges + 1, dtype=jnp.float32) / edges
        rises = quantile.function(jnp.float32(0.75)) >= quantile.function(jnp.float32(0.25))
        from_above = rises == easy_first
        numbers = jnp.where(from_above, 1.0 - shares, 0.0), jnp.where(from_above, 1.0, shares)
        return jnp.stack(numbers, axis=1), jnp.broadcast_to(jnp.asarray([0.0, 1.0]), (edges, 2))
    checked = checked_edges(edges)
    if checked[0] != 0 or checked[-1] != 1:
        raise invalid("edges", checked.tolist(), "a curriculum needs edges from 0 to 1")
    at = jnp.asarray(checked, jnp.float32)
    times = jnp.broadcast_arrays(*((at[-2::-1], 1.0) if easy_first else (0.0, at[1:])))
    return jnp.stack(numbers_between(quantile, *times), axis=1), jnp.stack(times, axis=1)
