"""Sampling with networks whose width depends on the timestep: gates are tables by step, and weights are cut to them.

Routers that read the timestep alone (`adapters.routed`) are evaluated on a grid once (`tabulated`). With the tables as
data a run is the gated network, which saves nothing (`tables_by_time`); with the steps in a few buckets, in each of
which every block has the weights that some step uses, it costs its share (`static_widths`), still as one scan. Both
are denoisers, so whatever nests around denoisers nests around them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.denoisers import denoiser
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import Costs, by_path
from diffusion_jax.typing import Cost, Denoiser, Network

Fill = Callable[..., Any]
"""`(params, t) -> params` with the collections that depend on the time; see `adapters.Timed.fill`."""


def tabulated(fill: Fill, params: Any, process: Any, times: Any, collection: str = "gates") -> Any:
    """The collection at each of the times `[S]`, in evaluation: `[S, L, 1, K]` a leaf."""
    filled = jax.jit(lambda params, t: fill(params, t)[collection])(params, process.network_time(jnp.asarray(times)))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0)[:, :, None], filled)


def tables_by_time(inner: Denoiser, times: Any) -> Denoiser:
    """`inner` with parameters that depend on the step: `{**params, **tables at the time that is nearest}`.

    times: `[S]`, those of the tables. The parameters are those of `inner` but for what the tables hold, and in "tables"
    a dict of collections with a leading axis S. An entry "compute" `[S]` is the work of one evaluation, in units in
    which the cost is reported.
    Raises InvalidInput where steps have more than one time.
    """
    times = jnp.asarray(times, jnp.float32)

    def at(params, index):
        params = dict(params)
        tables = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), params.pop("tables"))
        compute = tables.pop("compute", 1.0)
        return {**params, **tables}, compute

    def init(params, x, cond):
        return inner.init(at(params, 0)[0], x, cond)

    def apply(params, carry, x, step, cond):
        if isinstance(step.t, dict) or jnp.size(step.t) != 1:
            raise InvalidInput("Tables by time need one time for the whole batch, as a grid [S + 1] gives.")
        index = jnp.argmin(jnp.abs(times - jnp.reshape(step.t, ())))
        params, compute = at(params, index)
        prediction, carry = inner.apply(params, carry, x, step, cond)
        cost = Cost(prediction.cost.evaluations, compute * prediction.cost.compute)
        return prediction._replace(cost=cost), carry

    return inner._replace(init=init, apply=apply)


def by_nearest_time(opened: Network, times: Any) -> Network:
    """The gated network with, for each sample, the gates of that time of a table which is nearest to its own.

    opened: of `adapters.routed`. times: `[S]`, the network's times (`process.network_time`) of the table. Parameters
    are `{"params": params, "table": gates}`, gates as `tabulated` gives them: for losses, whose samples have times of
    their own, and for tables that no router made.
    """
    times = jnp.asarray(times, jnp.float32)

    def around(inner, params, x, t, cond, train, key):
        index = jnp.argmin(jnp.abs(times - t[:, None]), axis=1)
        gates = jax.tree.map(lambda leaf: jnp.moveaxis(leaf[index, :, 0], 0, 1), params["table"])
        return inner({"params": params["params"], "gates": gates}, x, t, cond, train, key)

    return models.wrapped(opened, around)


class StaticWidths(NamedTuple):
    """A run with cut weights.

    denoiser: with the parameters `prepare({"params": params})`, which also hold "token_router" if tokens are routed.
    ratio: `[S]`, the executed share of the routed modules at each time; needed: without what the buckets add to it.
    bucket: int `[S]`, the bucket of each time.
    """

    denoiser: Denoiser
    prepare: Callable[[Any], Any]
    ratio: Any
    needed: Any
    bucket: Any


def static_widths(network: Network, process: Any, times: Any, gates: Any, costs: Costs, buckets: int) -> StaticWidths:
    """The gated network at the times `[S]` as cut weights in at most `buckets` buckets of neighbouring times.

    network: the one that was routed, with a `token_router` of a capacity if tokens are routed.
    gates: concrete tables of `tabulated`. costs: `models.width_costs` of the network with width gates.
    Equal to `tables_by_time` of the gated network to rounding. Solvers that ask between the times get the nearest
    table. Raises InvalidInput for fewer than one bucket.
    """
    on = jax.tree.map(lambda leaf: np.asarray(leaf)[:, :, 0] > 0, gates)
    ranges = partition(on, costs, buckets)
    unions = [_any(on, first, last) for first, last in ranges]
    bucket = np.concatenate([np.full(last - first, i, np.int32) for i, (first, last) in enumerate(ranges)])
    ratio = np.array([executed_share(unions[i], costs) for i in bucket], np.float32)
    needed = executed_share(on, costs).astype(np.float32)
    cut = models.sliced(network, unions)
    tables = {"gates": gates, "bucket": jnp.asarray(bucket), "compute": jnp.asarray(ratio)}

    def prepare(params):
        inner = params if set(params) - {"params"} else params["params"]
        return {**params, "slices": cut.cut(inner), "tables": tables}

    return StaticWidths(tables_by_time(denoiser(cut.network, process), times), prepare, ratio, needed, bucket)


def _any(on, first, last):
    """What any of the steps first .. last - 1 uses."""
    return jax.tree.map(lambda leaf: leaf[first:last].any(axis=0), on)


def executed_share(on: Any, costs: Costs) -> np.ndarray:
    """The executed share of the routed modules, `sum F mean(mask) / sum F`, for masks `[L, K]` a leaf: `[]`; for those
    of S steps, `[S, L, K]`, or for the tables `[S, L, 1, K]` of `tabulated`, it is `[S]`."""
    masks = {path: np.asarray(leaf) for path, leaf in by_path(on).items()}
    masks = {path: leaf[:, :, 0] if leaf.ndim == 4 else leaf for path, leaf in masks.items()}
    executed = [(flops * masks[path].mean(axis=-1)).sum(axis=-1) for path, flops in costs.executed.items()]
    return np.asarray(np.sum(executed, axis=0) / costs.whole)


def partition(on: Any, costs: Costs, buckets: int) -> Sequence[tuple[int, int]]:
    """The cut of S steps, masks `[S, L, K]` a leaf, into at most `buckets` ranges `(first, last)` of least total cost,
    where each range computes what any of its steps uses: exact, by dynamic programming over the ends of ranges."""
    if buckets < 1:
        raise invalid("buckets", buckets, "it must be at least 1")
    masks = by_path(on)
    flops = np.concatenate(
        [np.repeat(costs.executed[path] / masks[path].shape[2], masks[path].shape[2]) for path in masks]
    )
    rows = np.concatenate([masks[path].reshape(len(masks[path]), -1) for path in masks], axis=1)
    count = len(rows)
    cost = np.full((count + 1, count + 1), np.inf)
    for first in range(count):
        unions = np.logical_or.accumulate(rows[first:], axis=0) @ flops
        cost[first, first + 1 :] = unions * np.arange(1, count - first + 1)
    best, cuts = cost[0], []
    for _ in range(1, min(buckets, count)):
        through = best[:, None] + cost
        cuts.append(np.argmin(through, axis=0))
        # A further range is opened only where it saves something.
        cuts[-1] = np.where(through.min(axis=0) < best, cuts[-1], -1)
        best = np.minimum(best, through.min(axis=0))
    ranges, last = [], count
    for choice in reversed(cuts):
        if choice[last] >= 0:
            ranges.append((int(choice[last]), last))
            last = int(choice[last])
    return [(0, last), *reversed(ranges)]
