"""Feature caching: outputs of attention and feed-forward layers are forecast between the steps that compute them.

A full step runs the network and stores the outputs of its inner modules, before their gates. A skipped step takes
forecasts in their place and runs only the rest: embeddings, modulation, gates, the last layer. The choice is one
`lax.cond` around the whole network, so a skipped step contains no norm, no attention and no copy of the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.acceleration import forecasting
from diffusion_jax.acceleration.forecasting import Forecaster, Table
from diffusion_jax.acceleration.outputs import check_along
from diffusion_jax.acceleration.refresh import Refresh, RefreshHistory, after, coordinate, due, no_history
from diffusion_jax.clock import network_inputs, some_step, to_prediction
from diffusion_jax.costs import count_flops
from diffusion_jax.models import depth_axes, inner_modules, intercepted, replaced, taps
from diffusion_jax.models.interception import Select
from diffusion_jax.typing import Cost, Denoiser, Network


class Features(NamedTuple):
    """The carry. table: what is known of each feature. history: when they were computed."""

    table: Table
    history: RefreshHistory


def cached_features(
    network: Network,
    process: Any,
    forecaster: Forecaster,
    refresh: Refresh,
    *,
    select: Select = inner_modules,
    along: str = "index",
) -> Denoiser:
    """A denoiser whose inner features are computed at the steps that `refresh` chooses, and forecast at the others.

        h <- h + gate(t) * (F(h, t) or its forecast)

    Gates, modulation and the last layer are exact at every step. With `taylor(m)` and `every(N, W)` this is TaylorSeer
    (Liu et al. 2025), with `reuse()` interval reuse of features (FORA, Selvaraju et al. 2024); `every(1)` is the plain
    denoiser, bit for bit.

    select: the modules whose outputs are stored: by default attention, feed-forward and convolutional residuals.
    along: the coordinate in which features are extrapolated, one of `refresh.COORDINATES`.

    The carry holds (order + 1) outputs of each selected module. A skipped step counts as no evaluation; its compute is
    the share of the network's operations that it still runs. Raises InvalidInput for an unknown coordinate, and for
    log-SNRs of joint data.
    """
    check_along(along, process)
    tapped = intercepted(network, taps(select))

    @traced_once
    def computed(params, x, t, cond):
        output, extras, _ = tapped.apply(params, {}, x, t, cond)
        return (output, {name: extras[name] for name in extras if name != "taps"}), extras["taps"]

    @traced_once
    def forecast(params, values, weights, x, t, cond):
        edit = replaced(select, lambda kept: forecasting.combine(kept, weights), "kept")
        output, extras, _ = intercepted(network, edit).apply(params, {"kept": values}, x, t, cond)
        return output, extras

    def init(params, x, cond):
        inputs = network_inputs(process, x, some_step(x).t)
        features = jax.eval_shape(computed, params, *inputs, cond)[1]
        table = forecasting.init(forecaster, features, depth_axes(features, network.anatomy))
        return Features(table, no_history())

    def apply(params, carry, x, step, cond):
        inputs, at = (*network_inputs(process, x, step.t), cond), coordinate(along, step, process)

        def kept(table):
            return forecasting.summands(forecaster, table, at, depth_axes(table.values, network.anatomy))

        # Skipped modules report nothing, so what they would is left out of the extras of full steps as well.
        like = jax.eval_shape(kept, carry.table)
        told = jax.eval_shape(forecast, params, *like, *inputs)[1]

        def full(table):
            (output, extras), features = computed(params, *inputs)
            answer = output, {name: extras[name] for name in told}
            axes = depth_axes(features, network.anatomy)
            return answer, forecasting.update(forecaster, table, features, at, axes)

        def skip(table):
            return forecast(params, *kept(table), *inputs), table

        now = due(refresh, step, carry.history)
        (output, extras), table = jax.lax.cond(now, full, skip, carry.table)
        rest = flops_share(forecast, computed, (params, *like, *inputs), (params, *inputs))
        prediction = to_prediction(process, output, x, step.t, extras, cost_of(now, rest))
        return prediction, Features(table, after(carry.history, now))

    def axes(carry):
        return Features._make((forecasting.table_axes(depth_axes(carry.table.values)), None))

    return Denoiser(init, apply, process, axes)


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced only once for inputs of one shape, however often it is called, counted or run.

    The traced program becomes a part of its caller, as if `function` had been called there.
    """
    return jax.jit(function, inline=True)


def flops_share(part: Callable[..., Any], whole: Callable[..., Any], part_inputs: tuple, whole_inputs: tuple) -> float:
    """Operations of `part` as a share of those of `whole`, by their shapes."""
    return count_flops(part, *part_inputs) / max(count_flops(whole, *whole_inputs), 1.0)


def cost_of(now: Any, rest: float) -> Cost:
    """One evaluation where everything was computed, else none and `rest` of the work."""
    now = jnp.asarray(now, jnp.float32)
    return Cost(now, jnp.where(now > 0, 1.0, jnp.float32(rest)))
