"""Gates: the first block is always run, and its forecast error decides whether the other blocks are skipped.

    h = head(x, t);        error = mean |h - expected(h)| / mean |expected or h|                               (1)
    z = forecast of z where the gate trusts the error, else body(h);        output = tail(z, t)

The probe is the quantity that is watched. A gate is a refresh policy that also sees its error. With a Taylor
forecast of the probe this is CG-Taylor (Guan et al. 2025), with its last value the first-block cache (ParaAttention;
`FirstBlockCache` of diffusers). The error is one scalar for the batch, so the skipped blocks really are skipped. A
decision that each sample takes for itself (`scope="sample"`) cannot leave out work that its neighbour needs, but makes
a sample independent of its batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.features import cost_of, flops_share, traced_once
from diffusion_jax.acceleration.forecasting import Forecaster, Table, reuse, taylor
from diffusion_jax.acceleration.refresh import (
    Refresh,
    RefreshHistory,
    after,
    coordinate,
    due,
    first_and_last,
    no_history,
)
from diffusion_jax.clock import network_inputs, some_step, to_prediction
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models import Staged, staged
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser, Network, Number

SCOPES = ("batch", "sample")
"""Who decides: all samples together, as published, or each for itself."""


class Gated(NamedTuple):
    """The carry. probe, last: tables of what the head and the last block say. error: (1) at the last call.

    Decided by the sample, every leaf has a first axis of samples `[B]`.
    """

    probe: Table
    last: Table
    history: RefreshHistory
    error: Float[Array, " *scope"]


def gated(
    network: Network | Staged,
    process: Any,
    threshold: Number | Float[Array, ""],
    *,
    probe: Forecaster,
    last: Forecaster,
    refresh: Refresh | None = None,
    head: int = 1,
    residual: bool = False,
    relative_to: str = "value",
    along: str = "index",
    scope: str = "batch",
    axis: str | tuple[str, ...] | None = None,
) -> Denoiser:
    """A denoiser that runs only its first blocks at steps where the forecast of their output is good enough.

    network: the network, or its stages as `models.staged` cuts them, e.g. of something that is no stack of blocks.
    threshold: the forecast of the last block is trusted where the error (1) is below it; 0 trusts nothing.
    probe, last: forecasters of the head's output, and of the input of the last norm.
    refresh: where everything is computed whatever the error; `first_and_last()` when None.
    head: blocks that are always run; stages that are given have their own.
    residual: watches what the head adds, and forecasts what the body adds, in place of the features themselves.
    relative_to: "value" divides the error by the mean of the head's output, "expected" by that of the forecast.
    along: see `refresh.COORDINATES`.
    scope: "batch", one decision, or "sample", one for each: the others keep their forecasts and tables at a step that
        is computed because a neighbour needs it. Batches split by `shard_map` then decide by the device.
    axis: the mesh axes over which `shard_map` splits the batch: the error is then a mean over all devices, which so
        take the same decision. Under `jit` alone means are global as they are.

    Both tables are filled at each full step, after the error was taken, and at no other. `extras["gate_error"]` is (1),
    without a derivative, and `extras["gate_full"]` whether the step was full; `[]`, or `[B]` by the sample. A skipped
    step counts no evaluation; as compute it counts the head and the tail. Raises InvalidInput for a negative plain
    threshold, for a network that `models.staged` cannot cut, and for residuals of given stages: what enters their head
    is not known.
    """
    if isinstance(threshold, float | int) and not threshold >= 0:
        raise invalid("threshold", threshold, "it must not be negative; 0 computes every step")
    if relative_to not in ("value", "expected"):
        raise invalid("relative_to", relative_to, "'value' or 'expected' was expected")
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if isinstance(network, Staged):
        if residual:
            raise InvalidInput("gated: residual=True needs the network itself, not its stages.")
        stages, entrance = network, None
    else:
        stages, entrance = staged(network, head), staged(network, 0) if residual else None
    refresh = first_and_last() if refresh is None else refresh
    stages = stages._replace(**{name: traced_once(getattr(stages, name)) for name in ("head", "body", "tail")})
    by_sample = scope == "sample"

    def lifted(function, in_axes: Any = 0) -> Callable[..., Any]:
        """Tables, decisions and errors of one sample, or of the whole batch as if it were one."""
        return jax.vmap(function, in_axes) if by_sample else function

    def watched(params, x, t, cond):
        """What the head says, and what of it is watched."""
        h = stages.head(params, x, t, cond)
        return h, h - entrance.head(params, x, t, cond) if entrance else h

    def finished(params, h, x, t, cond):
        z = stages.body(params, h, x, t, cond)
        return z, z - h if residual else z

    def empty(seen, kept):
        tables = forecasting.init(probe, seen), forecasting.init(last, kept)
        return Gated(*tables, no_history(), jnp.float32(jnp.inf))

    def init(params, x, cond):
        inputs = (*network_inputs(process, x, some_step(x).t), cond)
        h, seen = jax.eval_shape(watched, params, *inputs)
        _, kept = jax.eval_shape(finished, params, h, *inputs)
        seen, kept = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree) for tree in (seen, kept))
        return lifted(empty)(seen, kept)

    def decided(carry, seen, step, at):
        expected = forecasting.predict(probe, carry.probe, at)
        # A decision has no derivative, and that of a ratio to nothing would be NaN.
        expected, seen = jax.lax.stop_gradient((expected, seen))
        error = relative_error(expected, seen, seen if relative_to == "value" else expected, axis)
        error = jnp.where(carry.history.computed == 0, jnp.inf, error)
        return error, due(refresh, step, carry.history) | ~(error < threshold)

    def refreshed(tables, seen, kept, at):
        return tuple(map(forecasting.update, (probe, last), tables, (seen, kept), (at, at)))

    def apply(params, carry, x, step, cond):
        inputs, at = (*network_inputs(process, x, step.t), cond), coordinate(along, step, process)
        h, seen = watched(params, *inputs)
        error, now = lifted(decided, in_axes=(0, 0, None, None))(carry, seen, step, at)

        def skip(tables):
            kept = lifted(lambda table: forecasting.predict(last, table, at))(tables[1]).astype(h.dtype)
            return h + kept if residual else kept, tables

        def full(tables):
            z, kept = finished(params, h, *inputs)
            found = z, lifted(refreshed, in_axes=(0, 0, 0, None))(tables, seen, kept, at)
            if not by_sample:
                return found
            return jax.tree.map(lambda new, old: jnp.where(expand(now, new), new, old), found, skip(tables))

        z, tables = jax.lax.cond(now.any() if by_sample else now, full, skip, (carry.probe, carry.last))
        output, extras = stages.tail(params, z, *inputs)
        cost = cost_of(now.any(), _rest(stages, network, params, z, inputs))
        extras = {**extras, "gate_error": error, "gate_full": now}
        prediction = to_prediction(process, output, x, step.t, extras, cost)
        return prediction, Gated(tables[0], tables[1], lifted(after)(carry.history, now), error)

    def axes(carry):
        return 0 if by_sample else Gated._make((forecasting.table_axes(), forecasting.table_axes(), None, None))

    return Denoiser(init, apply, process, axes)


def _rest(stages, network, params, z, inputs):
    """The share of the network's operations that run at a skipped step."""

    def ends(params, z, *inputs):
        return stages.head(params, *inputs), stages.tail(params, z, *inputs)[0]

    def whole(params, *inputs):
        if not isinstance(network, Staged):
            return network.apply(params, *inputs)[0]
        z = stages.body(params, stages.head(params, *inputs), *inputs)
        return stages.tail(params, z, *inputs)[0]

    return flops_share(ends, whole, (params, z, *inputs), (params, *inputs))


def relative_error(
    expected: Array, value: Array, like: Array, axis: str | tuple[str, ...] | None = None
) -> Float[Array, ""]:
    """`mean |value - expected| / mean |like|`, over the batch and, with `axis`, over the devices of those mesh axes."""
    means = [jnp.mean(jnp.abs(one.astype(jnp.float32))) for one in (value - expected, like)]
    if axis is not None:
        means = [jax.lax.pmean(one, axis) for one in means]
    return means[0] / jnp.maximum(means[1], jnp.finfo(jnp.float32).tiny)


def cg_taylor(
    network: Network | Staged,
    process: Any,
    threshold: Number | Float[Array, ""] = 0.008,
    *,
    probe_order: int = 3,
    order: int = 1,
    warmup: int | Int[Array, ""] = 3,
    **options: Any,
) -> Denoiser:
    """CG-Taylor (Guan et al. 2025): the first block's Taylor forecast is the gate, the last block's is used.

    The first `warmup` steps and the last are computed; defaults are those of DiT-XL/2 at 50 steps (the released code).
    options: `head`, `along`, `scope`, `axis` of `gated`.
    """
    refresh = first_and_last(warmup)
    return gated(network, process, threshold, probe=taylor(probe_order), last=taylor(order), refresh=refresh, **options)


def first_block_cached(
    network: Network, process: Any, threshold: Number | Float[Array, ""] = 0.1, **options: Any
) -> Denoiser:
    """First-block cache: what the other blocks add is reused while what the first one adds changes less than that.

    The change is relative to the last computed step. options: `refresh`, `head`, `scope`, `axis` of `gated`. Nothing
    but the first call is computed whatever the change, as in diffusers, unless `refresh` says more.
    """
    options = {"refresh": first_and_last(1, last=False), **options}
    watch = {"probe": reuse(), "last": reuse(), "residual": True, "relative_to": "expected"}
    return gated(network, process, threshold, **watch, **options)
