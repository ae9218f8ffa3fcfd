"""A curriculum of times: training begins with the noisiest interval and takes in the next once the loss has settled.

With intervals C_1 (least noise, hardest) .. C_N (most noise, easiest), stage n draws from the base distribution given
that t lies in C_N, ..., C_{N - n + 1} (Kim et al. 2024, denoising task difficulty-based curriculum). The stage advances
when the smoothed loss has not been below its best for `patience` losses; in the last stage it is the base draw.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.errors import invalid
from diffusion_jax.timesteps.clusters import checked_edges
from diffusion_jax.timesteps.draws import numbers_between, quantile_of, uniform
from diffusion_jax.typing import Number, TimestepDraw


class Pacing(NamedTuple):
    """stage: 1 .. N. smoothed: mean loss of late, not yet known (NaN) at first. best: its least in this stage.
    waited: losses since then."""

    stage: Int[Array, ""]
    smoothed: Float[Array, ""]
    best: Float[Array, ""]
    waited: Int[Array, ""]


def paced(pacing: Pacing, loss: Any, stages: int, patience: int, smoothing: Number = 0.99) -> Pacing:
    """The pacing after one more loss; one that is not finite changes nothing."""
    known = jnp.isfinite(pacing.smoothed)
    smoothed = jnp.where(known, smoothing * pacing.smoothed + (1.0 - smoothing) * loss, loss)
    better = smoothed < pacing.best
    waited = jnp.where(better, 0, pacing.waited + 1)
    advances: Bool[Array, ""] = (waited >= patience) & (pacing.stage < stages)
    # A new interval has another loss: the best of the stage before says nothing of it.
    new = Pacing(
        pacing.stage + advances,
        smoothed,
        jnp.where(advances, jnp.inf, jnp.minimum(smoothed, pacing.best)),
        jnp.where(advances, 0, waited),
    )
    finite = jnp.isfinite(loss)
    return Pacing(*(jnp.where(finite, after, before) for after, before in zip(new, pacing, strict=True)))


def curriculum(
    edges: Any,
    base: TimestepDraw | None = None,
    patience: int = 200,
    smoothing: Number = 0.99,
    easy_first: bool = True,
) -> TimestepDraw:
    """A draw whose support grows, by the recorded losses, from the interval of most noise to all of [0, 1].

    edges: `[N + 1]`, rising (`interval_clusters`, or N equal parts). base: the distribution in the end, uniform by
        default; one with a quantile function. patience: how many losses without a better one end a stage; 0 or less
        is refused. smoothing: of the loss; 0 takes it as it comes. easy_first: False grows from the least noise
        upwards, the reversed curriculum that the method is compared with.

    The state is a `Pacing`; it is saved with the run and never compiles anew. With gradient accumulation each part of
    the batch counts as one loss. Raises InvalidInput for edges that do not rise from 0 to 1, and for a base
    without quantiles.
    """
    checked = checked_edges(edges)
    if checked[0] != 0 or checked[-1] != 1:
        raise invalid("edges", checked.tolist(), "a curriculum needs edges from 0 to 1")
    if patience < 1:
        raise invalid("patience", patience, "it must be at least 1")
    if not 0 <= smoothing < 1:
        raise invalid("smoothing", smoothing, "it must lie in [0, 1)")
    base = uniform() if base is None else base
    quantile, stages = quantile_of(base), len(checked) - 1
    at = jnp.asarray(checked, jnp.float32)
    low, high = numbers_between(quantile, *((at[-2::-1], 1.0) if easy_first else (0.0, at[1:])))

    def draw(state, key, shape):
        first, last = low[state.stage - 1], high[state.stage - 1]
        t = quantile.function(first + (last - first) * quantile.numbers(key, shape))
        return t, jnp.ones_like(t)

    def init():
        return Pacing(jnp.int32(1), jnp.float32(jnp.nan), jnp.float32(jnp.inf), jnp.int32(0))

    def update(state, t, loss):
        return paced(state, jnp.mean(loss).astype(jnp.float32), stages, patience, smoothing)

    return TimestepDraw(init, draw, update)
