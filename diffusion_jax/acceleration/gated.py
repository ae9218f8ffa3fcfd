"""Steps that are skipped when a cheap probe says so: the first block is always run, and decides about the others.

    h = head(x, t);        error = mean |h - expected(h)| / mean |expected or h|                               (1)
    z = forecast of z where the gate trusts the error, else body(h);        output = tail(z, t)

A probe is what is watched and what it is compared with; a gate is a policy that also sees the error. With a Taylor
forecast of the probe this is CG-Taylor (Guan et al. 2025), with its last value the first-block cache (ParaAttention;
`FirstBlockCache` of diffusers). The error is one scalar for the batch, so the skipped blocks really are skipped: a
decision that each sample takes for itself cannot leave out work that its neighbour needs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.features import cost_of, network_inputs, share
from diffusion_jax.acceleration.forecasting import Forecaster, Table, reuse, taylor
from diffusion_jax.acceleration.refresh import History, Refresh, after, begun, coordinate, due, first_and_last
from diffusion_jax.denoisers.base import some_step
from diffusion_jax.errors import invalid
from diffusion_jax.models import staged
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Denoiser, Network

Number = float | int | Float[Array, ""]


class Gated(NamedTuple):
    """The carry. probe, last: tables of what the head and the last block say. error: (1) at the last call."""

    probe: Table
    last: Table
    history: History
    error: Float[Array, ""]


def gated(
    network: Network,
    process: Any,
    threshold: Number,
    *,
    probe: Forecaster,
    last: Forecaster,
    refresh: Refresh | None = None,
    head: int = 1,
    residual: bool = False,
    relative_to: str = "value",
    along: str = "index",
    axis: str | tuple[str, ...] | None = None,
) -> Denoiser:
    """A denoiser that leaves out all but its first blocks at steps where a forecast of those was right.

    threshold: the forecast of the last block is trusted where the error (1) is below it; 0 trusts nothing.
    probe, last: forecasters of what the head says, and of what enters the last norm.
    refresh: where everything is computed whatever the error; `first_and_last()` when None.
    head: blocks that are always run.
    residual: watches what the head adds, and forecasts what the body adds, in place of the features themselves.
    relative_to: "value" divides the error by the mean of what the head says, "expected" by that of the forecast.
    along: see `refresh.COORDINATES`.
    axis: the mesh axes over which `shard_map` splits the batch: the error is then a mean over all devices, which so
        take the same decision.

    Both tables are filled at each full step, after the error was taken, and at no other. Works on every network that
    `models.staged` can cut. A skipped step counts no evaluation; as compute it counts the head and the tail.
    Raises InvalidInput for a negative plain threshold.
    """
    if isinstance(threshold, float | int) and threshold < 0:
        raise invalid("threshold", threshold, "it must not be negative; 0 computes every step")
    if relative_to not in ("value", "expected"):
        raise invalid("relative_to", relative_to, "'value' or 'expected' was expected")
    refresh = first_and_last() if refresh is None else refresh
    stages, entrance = staged(network, head), staged(network, 0)

    def watched(params, x, t, cond):
        """What the head says, and what of it is watched."""
        h = stages.head(params, x, t, cond)
        return h, h - entrance.head(params, x, t, cond) if residual else h

    def finished(params, h, x, t, cond):
        z = stages.body(params, h, x, t, cond)
        return z, z - h if residual else z

    def init(params, x, cond):
        inputs = (*network_inputs(process, x, some_step(x)), cond)
        h, seen = jax.eval_shape(watched, params, *inputs)
        _, kept = jax.eval_shape(finished, params, h, *inputs)
        return Gated(forecasting.init(probe, seen), forecasting.init(last, kept), begun(), jnp.float32(jnp.inf))

    def apply(params, carry, x, step, cond):
        inputs, at = (*network_inputs(process, x, step), cond), coordinate(along, step, process)
        h, seen = watched(params, *inputs)
        expected = forecasting.predict(probe, carry.probe, at)
        error = relative_error(expected, seen, seen if relative_to == "value" else expected, axis)
        now = due(refresh, step, carry.history) | ~(error < threshold)

        def full(tables):
            z, kept = finished(params, h, *inputs)
            update = forecasting.update
            return z, (update(probe, tables[0], seen, at), update(last, tables[1], kept, at))

        def skip(tables):
            kept = forecasting.predict(last, tables[1], at).astype(h.dtype)
            return h + kept if residual else kept, tables

        z, tables = jax.lax.cond(now, full, skip, (carry.probe, carry.last))
        output, extras = stages.tail(params, z, *inputs)
        prediction = process.predict(output, x, fill(step.t, x))
        cost = cost_of(now, _rest(stages, network, params, z, inputs))
        error = jnp.where(carry.history.computed == 0, jnp.inf, error)
        carry = Gated(*tables, after(carry.history, now), error)
        return prediction._replace(extras={**extras, "gate_error": error}, cost=cost), carry

    return Denoiser(init, apply, process)


def _rest(stages, network, params, z, inputs):
    """The share of the network's operations that run at a skipped step."""

    def ends(params, z, *inputs):
        return stages.head(params, *inputs), stages.tail(params, z, *inputs)[0]

    return share(ends, lambda *all: network.apply(*all)[0], (params, z, *inputs), (params, *inputs))


def relative_error(
    expected: Array, value: Array, like: Array, axis: str | tuple[str, ...] | None = None
) -> Float[Array, ""]:
    """`mean |value - expected| / mean |like|`, over the batch and, with `axis`, over the devices of those mesh axes."""
    means = [jnp.mean(jnp.abs(one.astype(jnp.float32))) for one in (value - expected, like)]
    if axis is not None:
        means = [jax.lax.pmean(one, axis) for one in means]
    return means[0] / jnp.maximum(means[1], jnp.finfo(jnp.float32).tiny)


def cg_taylor(
    network: Network,
    process: Any,
    threshold: Number = 0.008,
    *,
    probe_order: int = 3,
    order: int = 1,
    warmup: int = 3,
    **options: Any,
) -> Denoiser:
    """CG-Taylor (Guan et al. 2025): the first block's Taylor forecast is the gate, the last block's the answer.

    The first `warmup` steps and the last are computed; defaults are those of DiT-XL/2 at 50 steps (the released code).
    options: `head`, `along`, `axis` of `gated`.
    """
    refresh = first_and_last(warmup)
    return gated(network, process, threshold, probe=taylor(probe_order), last=taylor(order), refresh=refresh, **options)


def first_block_cached(network: Network, process: Any, threshold: Number = 0.1, **options: Any) -> Denoiser:
    """First-block cache: what the other blocks add is reused while what the first one adds changes less than that.

    The change is relative to the last computed step. options: `refresh`, `head`, `axis` of `gated`; nothing but the
    first call is computed whatever the change, as in diffusers, unless `refresh` says more.
    """
    options = {"refresh": first_and_last(1, last=False), **options}
    watch = {"probe": reuse(), "last": reuse(), "residual": True, "relative_to": "expected"}
    return gated(network, process, threshold, **watch, **options)
