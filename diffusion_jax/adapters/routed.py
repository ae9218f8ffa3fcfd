"""Collections that are functions of the timestep alone, and what is made of them: routed widths and tokens (DyDiT).

A router reads the embedding of the time, before that of the label is added to it, and says for each block what its
modules do: E_t -> `[L, B, K]`. So all samples and labels that share t share the network, which is known before a run
begins: evaluated on a grid, the same routers give tables by step (`acceleration.dynamic`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.anatomy import anatomy_of, collects, module_params, required
from diffusion_jax.models.interception import intercepted, wrapped
from diffusion_jax.models.layers.embeddings import TimeEmbedding
from diffusion_jax.models.paths import at_path
from diffusion_jax.models.routing import GATES, ROUTER, gumbel_sigmoid_st, token_router, width_gates
from diffusion_jax.typing import Network


class Timed(NamedTuple):
    """A network with a collection that is a function of the time alone.

    init: (key, params, x, t, cond) -> what is learned beside the network's own parameters, a dict of entries
    fill: (params, t, train=False, key=None) -> the parameters of `opened`: the routers are replaced by what they say at
        the network's time `t`, stacked over depth, `[L, B, K]` a leaf
    opened: the network with the collection as data; it can be intercepted again
    network: `opened` behind `fill`, with parameters `{"params": params, **init(...)}`; `at_time` of several
    complete: the network without the collection, of the same parameters
    """

    init: Callable[..., dict[str, Any]]
    fill: Callable[..., dict[str, Any]]
    opened: Network
    network: Network
    complete: Network


def at_time(opened: Network, *fills: Callable[..., Any]) -> Network:
    """`opened` under the parameters that `fills`, one after the other, make of the time. Training alone is noisy."""

    def init(key, x, t, cond=None):
        raise InvalidInput(
            "A network with routers is begun with the `init` of its parts, beside a network's parameters."
        )

    def around(inner, params, x, t, cond, train, key):
        for fill in fills:
            params = fill(params, t, train, key)
        return inner(params, x, t, cond, train, key if train else None)

    return wrapped(opened, around, init)


def embedded_time(network: Network, params: Any, t: Any) -> Any:
    """The network's own embedding of its time, `t [B]` to `[B, C]`, without label or any other condition.

    Raises InvalidInput where it has no embedding of its own for all blocks, or where t is not one time a sample.
    """
    path = required(network, "time", "A router")
    entry = at_path(module_params(network, params), path)
    if "up" not in entry or entry["up"]["kernel"].ndim != 2:
        raise InvalidInput(f"Routers read the parameters {path}, one embedding for all blocks; there is none.")
    if isinstance(t, Mapping) or jnp.ndim(t) != 1:
        raise InvalidInput("Routers read one time a sample, [B]: make it of this network's times with clock=.")
    features, width = entry["up"]["kernel"].shape
    embedding = TimeEmbedding(width, features, anatomy_of(network).frequency_shift)
    return embedding.apply({"params": entry}, t)


def routers(key: Any, like: Any, width: int, bias: float | int = 0.0, fixed: int = 0) -> Any:
    """Linear routers, Xavier-uniform: kernel `[L, width, K - fixed]` and bias for each leaf `[L, 1, K]` of `like`."""
    leaves, tree = jax.tree.flatten(like)
    init = jax.nn.initializers.xavier_uniform(batch_axis=(0,))

    def one(key, leaf):
        depth, _, count = leaf.shape
        return {
            "kernel": init(key, (depth, width, count - fixed)),
            "bias": jnp.full((depth, count - fixed), bias, jnp.float32),
        }

    return tree.unflatten([one(k, leaf) for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)])


def routed_logits(routers: Any, embedding: Any) -> Any:
    """`E_t [B, C]` to a logit for each gate of each block, `[L, B, K]` a leaf."""

    def one(router):
        return jnp.einsum("bc,lck->lbk", embedding, router["kernel"]) + router["bias"][:, None]

    return jax.tree.map(one, routers, is_leaf=lambda node: isinstance(node, dict) and "kernel" in node)


def routed(
    network: Network,
    groups: int,
    *,
    tokens: bool = False,
    capacity: float | int | None = None,
    tau: float | int = 5.0,
    bias: float | int = 15.0,
    token_bias: float | int = 35.0,
    clock: Callable[[Any], Any] = lambda t: t,
) -> Timed:
    """DyDiT (Zhao et al. 2025): heads and hidden groups by the timestep, feed-forward tokens by what they are.

    groups: into how many groups hidden units are cut. The first head and the first group are always on.
    tokens: whether tokens are routed; capacity: see `routing.token_router`.
    tau: temperature of the straight-through gradient. bias, token_bias: of the routers at first, so large that
        everything is on: the network is `network` itself.
    clock: the one time a sample, `[B]`, that routers read, of the network's times: `lambda t: t["image"]`.

    The entries are "routers" and, with tokens, "token_router". Gates are noisy in training (`train` with a `key`);
    without, they are deterministic. `extras["ledger"]` is what a call executed; see `routing.executed_ratio`. Train it
    by any objective of yours to a budget:

        objectives.budgeted(own(routed.network), target=0.5, complete=own(routed.complete))
    """
    edits = width_gates(groups) + ((token_router(capacity, tau, token_bias),) if tokens else ())
    opened = intercepted(network, *edits)

    def init(key, params, x, t, cond=None):
        first, second = jax.random.split(key)
        made, width = dict(opened.init(first, params, x, t, cond)), required(network, "width", "routed")
        return {"routers": routers(second, made.pop(GATES), width, bias, fixed=1), **made}

    def fill(params, t, train=False, key=None):
        rest = {name: entry for name, entry in params.items() if name != "routers"}
        logits = routed_logits(params["routers"], embedded_time(opened.network, params, clock(t)))
        leaves, tree = jax.tree.flatten(logits)
        gates = [_gates(_folded(key, i) if train else None, leaf, tau) for i, leaf in enumerate(leaves)]
        return {**rest, GATES: tree.unflatten(gates)}

    def plain(inner, params, *inputs):
        own = {name: entry for name, entry in params.items() if name not in ("routers", ROUTER)}
        return inner(own if collects(network) else own["params"], *inputs)

    complete = wrapped(network, plain, at=() if collects(network) else ("params",))
    return Timed(init, fill, opened.network, at_time(opened.network, fill), complete)


def _folded(key, number):
    if key is None:
        return None
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None)) if key.ndim else jax.random.fold_in
    return fold(key, number)


def _gates(key, logits, tau):
    """Gates `[L, B, 1 + K]` of logits `[L, B, K]`, the first of them always on; noise belongs to a sample."""
    if key is None or not key.ndim:
        gates = gumbel_sigmoid_st(key, logits, tau)
    else:
        gates = jax.vmap(gumbel_sigmoid_st, in_axes=(0, 1, None), out_axes=1)(key, logits, tau)
    return jnp.concatenate([jnp.ones_like(gates[..., :1]), gates], axis=-1)
