"""Gates within blocks: with which heads, groups of hidden units and tokens a block computes (Zhao et al. 2025, DyDiT).

Edits for `interception.intercepted`. Width gates are data, `[L, B or 1, K]` stacked over depth: whoever makes them
from the timestep (`adapters.routed`) leaves the network as it is. A gated head gives nothing to the output projection,
a gated group of hidden units is 0 before the activation, which both say what smaller weights would (`slicing`). Tokens
are chosen by a router within the block, from what the token is there. Every edit reports what it leaves to be computed
in the `ledger`, differentiably, and `executed_ratio` adds it up.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import invalid
from diffusion_jax.models.anatomy import module_params
from diffusion_jax.models.edits import of_condition
from diffusion_jax.models.interception import ByAnatomy, Edit, Site
from diffusion_jax.models.layers.attention import Attend
from diffusion_jax.models.layers.branches import Branch
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.models.layers.modulation import expand_vector
from diffusion_jax.models.paths import by_path
from diffusion_jax.typing import Network

GATES, ROUTER, LEDGER = "gates", "token_router", "ledger"
"""The collections of width gates and of the token routers' parameters, and the report of what they leave."""

_ATTENTION = ("attention", "temporal_attention")
_MLP = ("mlp", "temporal_mlp")


def gumbel_sigmoid_st(
    key: Any, logits: Float[Array, "..."], tau: float | int = 5.0, single: bool = False
) -> Float[Array, "..."]:
    """Gates 0 or 1 with the gradient of a sigmoid (Jang et al. 2017, Bengio et al. 2013): with u = logits + g1 - g2,

        value 1[sigmoid(u / tau) > 1/2],   gradient of sigmoid(u / tau)

    key: of the Gumbel noise g1, g2; None for none, as in evaluation. tau: temperature.
    single: without g2, as masks of weights are drawn (MaskUNet): P(1) = 1 - exp(-exp(logit)), 0.63 for logit 0.
    """
    if key is not None:
        # The difference of two Gumbel variables is logistic.
        noise = jax.random.gumbel if single else jax.random.logistic
        logits = logits + noise(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid(logits / tau)
    # In this order the value is exactly 0 or 1.
    return (logits > 0).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def width_gates(groups: int) -> tuple[Edit, Edit]:
    """Gates of heads and of groups of hidden units, `gates/.../gate [L, 1, K]`, all 1 to begin with.

    Self-attention (over space and over time) has a gate for each head; cross-attention is left alone. Feed-forward
    layers have `groups` gates, each of neighbouring hidden units.
    The batch axis of handed-in gates is B, or 1 where all samples share them. Raises InvalidInput, when the network
    runs, where `groups` does not divide the hidden width.
    """
    return Edit(attention_heads, _gated_heads, (GATES,), (LEDGER,)), Edit(
        hidden_units, lambda site, x: _gated_groups(site, x, groups), (GATES,), (LEDGER,)
    )


def token_router(capacity: float | int | None = None, tau: float | int = 5.0, bias: float | int = 35.0) -> Edit:
    """Feed-forward branches for chosen tokens only: `logit = W2 relu(W1 h + b1) + b2` of the residual stream that the
    branch reads, W1 of width / 16 rows; a token whose logit is not positive skips the branch.

    capacity: None computes all tokens and masks (training); a share rho gathers the k = ceil(rho N) tokens of the
        largest logits, computes those and scatters them back: equal to the mask where at most k tokens are chosen.
    tau: of the straight-through gradient. bias: of b2 at first: positive, so that every token is chosen.

    Gates are noisy where the network is given a `key`, each block and call with noise of its own.
    Parameters are in the collection `token_router`. Raises InvalidInput for a capacity outside (0, 1].
    """
    if capacity is not None and not 0 < capacity <= 1:
        raise invalid("capacity", capacity, "a share of the tokens above 0, at most 1, is needed")

    def apply(site: Site, h, c, side):
        noise = site.module.make_rng("dropout") if site.module.has_rng("dropout") else None
        gate = gumbel_sigmoid_st(noise, (scores := _scores(site, h, bias)), tau)
        count = math.prod(h.shape[1:-1])
        kept = count if capacity is None else math.ceil(capacity * count)
        share = jnp.mean(gate.reshape(h.shape[0], -1), axis=1)
        # Gathered tokens are all computed, whether they are then used or not.
        site.put(LEDGER, "kept", share if capacity is None else jnp.ones_like(share))
        site.put(LEDGER, "present", jnp.float32(count / kept))
        if site.initialising or kept == count:
            return _gated_tokens(site, gate, h, c, side)
        return _gathered(site, h, c, side, scores, gate, kept)

    return Edit(feed_forward_branches, apply, (ROUTER,), (LEDGER,))


def executed_ratio(ledger: Any) -> Float[Array, " B"]:
    """FLOPs of the routed modules of a call over those without gates, `[B]` (`[1]` if all samples share all gates):

        sum_l [mean_h(heads) F_a + mean_h(groups) mean_n(tokens) F_m] / sum_l [F_a + F_m]

    F_a and F_m are the costs of attention (projections and map) and of the feed-forward layer in block l.
    ledger: `extras["ledger"]` of the call. Differentiable in gates with a straight-through gradient.
    """
    costs = _costs(ledger)
    return sum(jnp.sum(leaf, axis=0) for leaf in costs.executed.values()) / costs.whole


def largest_gates(network: Network, params: Any, gates: Any, kept: int) -> Any:
    """Pruning by magnitude: gates `[L, 1, K]` that keep, in each module, the `kept` heads or groups with the largest
    rows of the output matrix, the same at all times. Routed widths have to beat them.

    params: of the network. gates: a tree with the gates' shapes, `routed.fill(params, t)["gates"]`. Fine-tune with
    `objectives.with_frozen(own(routed.opened), {"gates": gates}, "params")`.
    Raises InvalidInput for a number of gates that a module does not have.
    """
    weights = by_path(module_params(network, params))

    def one(path, leaf):
        depth, _, count = leaf.shape
        if not 1 <= kept <= count:
            raise invalid("kept", kept, f"a number of gates from 1 to {count} was expected")
        module = jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 2)[0]
        kernel = next(
            weights[f"{module}/{name}/kernel"] for name in ("out", "down") if f"{module}/{name}/kernel" in weights
        )
        norm = jnp.linalg.norm(kernel.reshape(depth, count, -1), axis=-1)
        rank = jnp.argsort(jnp.argsort(-norm, axis=1), axis=1)
        return (rank < kept)[:, None].astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(one, gates)


class Costs(NamedTuple):
    """executed: FLOPs by module and block, path -> `[L]` (`[L, B]` of a call). whole: the sum of all without gates."""

    executed: Any
    whole: Any


def width_costs(opened: Network, params: Any, x: Any, t: Any, cond: Any = None) -> Costs:
    """What each module of `gates` costs with all of its gates on; paths are those of the gates.

    opened: a network with `width_gates`, and with a `token_router` of some capacity if tokens are left out; a router
    without capacity saves nothing, so it counts nothing here.
    """

    x, t, cond = jax.tree.map(jnp.asarray, (x, t, cond))

    def ledger(params):
        gates = jax.tree.map(lambda leaf: jnp.ones((leaf.shape[0], 1, leaf.shape[2])), params[GATES])
        report = opened.apply({**params, GATES: gates}, x, t, cond)[1][LEDGER]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ones_like(leaf) if jax.tree_util.keystr(path[-1:], simple=True) == "kept" else leaf,
            report,
        )

    costs = _costs(jax.device_get(jax.jit(ledger)(params)))
    executed = {path: leaf.mean(axis=1) for path, leaf in costs.executed.items()}
    return Costs(executed, float(costs.whole))


def _costs(ledger):
    entries = by_path(ledger)

    def around(path, name):
        """What the modules around `path` say about all that is in them."""
        return math.prod(
            entries[other] for other in entries if other.endswith(f"/{name}") and path.startswith(other[: -len(name)])
        )

    executed, whole = {}, 0.0
    for path in entries:
        if path.endswith("/executed"):
            module = path.removesuffix("executed")
            executed[f"{module}gate"] = entries[path] * around(path, "kept")
            whole = whole + (entries[f"{module}whole"] * around(path, "present")).sum()
    return Costs(executed, whole)


def _is_within(module, anatomy, branches, above):
    path = module.path
    return len(path) >= above and path[-above] in branches and not of_condition(module, anatomy)


@ByAnatomy
def feed_forward_branches(module, anatomy):
    return isinstance(module, Branch) and _is_within(module, anatomy, _MLP, 1)


@ByAnatomy
def attention_heads(module, anatomy):
    return isinstance(module, Attend) and _is_within(module, anatomy, _ATTENTION, 3)


@ByAnatomy
def hidden_units(module, anatomy):
    inner = module.name == "up" and isinstance(module.parent, FeedForward)
    return inner and _is_within(module, anatomy, _MLP, 3)


def _gate(site, count):
    return site.get(GATES, "gate", lambda: jnp.ones((1, count)))


def _report(site, gate, flops):
    """FLOPs of a sample (of the batch, where all samples share the gates)."""
    site.put(LEDGER, "executed", jnp.mean(gate, axis=1) * (flops / gate.shape[0]))
    site.put(LEDGER, "whole", jnp.float32(flops / gate.shape[0]))


def over_rows(gate, rows):
    """A gate for each row of `[B F, ...]`, where frames or tokens were folded into the batch."""
    return gate if gate.shape[0] in (1, rows) else jnp.repeat(gate, rows // gate.shape[0], axis=0)


def _gated_heads(site, q, k, v, *seen):
    batch, queries, heads, channels = q.shape
    gate = _gate(site, heads)
    # The four projections, of as many channels as the heads have together, and the two products with the map.
    flops = 2 * batch * heads * channels * (4 * queries * heads * channels + 2 * queries * k.shape[1])
    _report(site, gate, flops)
    out = site.run(q, k, v, *seen)
    return out * over_rows(gate, batch)[:, None, :, None].astype(out.dtype)


def _gated_groups(site, x, groups):
    out = site.run(x)
    layer = site.module.parent
    gate = _gate(site, groups)
    if out.shape[-1] % gate.shape[1]:
        raise invalid("groups", gate.shape[1], f"it must divide the hidden width, {out.shape[-1]}")
    matrices = 3 if layer.swiglu or layer.gated else 2
    _report(site, gate, 2 * matrices * math.prod(x.shape) * out.shape[-1])
    gate = jnp.repeat(over_rows(gate, x.shape[0]), out.shape[-1] // gate.shape[1], axis=1)
    return out * expand_vector(gate, out).astype(out.dtype)


def _scores(site, h, bias):
    width, hidden = h.shape[-1], max(h.shape[-1] // 16, 1)
    xavier = nn.initializers.xavier_uniform()
    w1 = site.get(ROUTER, "w1", lambda: xavier(site.key(), (width, hidden)))
    b1 = site.get(ROUTER, "b1", lambda: jnp.zeros(hidden))
    w2 = site.get(ROUTER, "w2", lambda: xavier(site.key(), (hidden, 1)))
    b2 = site.get(ROUTER, "b2", lambda: jnp.full((1,), bias, jnp.float32))
    return (jax.nn.relu(h.astype(jnp.float32) @ w1 + b1) @ w2 + b2)[..., 0]


def _gated_tokens(site, gate, h, c, side):
    """The branch with gated tokens. The gate stands within it, before the gate of the modulation: there a gate of 1 is
    the branch without gates bit for bit, because XLA then adds it to the residual stream as it does without."""

    def gated(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, FeedForward) and context.method_name == "__call__":
            return out * gate[..., None].astype(out.dtype)
        return out

    with nn.intercept_methods(gated):
        return site.run(h, c, side)


def _gathered(site, h, c, side, scores, gate, kept):
    batch, width = h.shape[0], h.shape[-1]
    _, index = jax.lax.top_k(scores.reshape(batch, -1), kept)

    def gather(values):
        return jnp.take_along_axis(values.reshape(batch, -1, values.shape[-1]), index[..., None], axis=1)

    if c.ndim > 2:
        # A vector for each token goes with its token.
        c = gather(jnp.broadcast_to(expand_vector(c, h), (*h.shape[:-1], c.shape[-1])))
    out = _gated_tokens(site, gather(gate[..., None])[..., 0], gather(h), c, side)
    spread = jnp.zeros((batch, math.prod(h.shape[1:-1]), width), out.dtype)
    return spread.at[jnp.arange(batch)[:, None], index].set(out).reshape(h.shape)
