"""Token-wise caching: between two refreshes only some tokens are computed, and the others keep their last outputs.

What a module says of one token may be stale while it still holds of another. So a skipped step runs the module for the
k tokens with the highest score, and puts what it says of them in the place of what was kept (Zou et al. 2024, ToCa):

    score = |F| / mean |F| + staleness a,        k = ceil(ratio N)                                             (1)

with F the kept output of a token and a the number of steps since it was computed. The publication adds the age to the
attention that a token receives, which fused kernels do not tell; its successor (Zou et al. 2024, DuCa) takes a norm of
features instead, as here. k is static: a skipped step costs a known share of the products, whichever tokens it is for.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.acceleration.features import cost_of, flops_share, traced_once
from diffusion_jax.acceleration.refresh import Refresh, RefreshHistory, after, due, no_history
from diffusion_jax.clock import network_inputs, some_step, to_prediction
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import depth_axes, inner_modules, intercepted, taps
from diffusion_jax.models.interception import Edit, Select, Site
from diffusion_jax.models.layers.attention import Attention
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.typing import Denoiser, Network

_KEPT = "kept"


class Kept(NamedTuple):
    """The last output of a module for each token, `[B, ..., C]`, and how many steps ago, `[B, ...]`."""

    value: Float[Array, "B ..."]
    age: Int[Array, "B ..."]


class Tokens(NamedTuple):
    """The carry. kept: a `Kept` for each module, stacked over depth. history: when all tokens were computed."""

    kept: Any
    history: RefreshHistory


def cached_tokens(
    network: Network,
    process: Any,
    refresh: Refresh,
    ratio: float = 0.1,
    *,
    attention: float | None = None,
    staleness: Any = 1.0,
    select: Select = inner_modules,
) -> Denoiser:
    """A denoiser that computes all tokens at the steps of `refresh`, and at others those with the highest score (1).

    ratio: the share of tokens that feed-forward layers compute at skipped steps, in [0, 1].
    attention: the same for attention, where the chosen tokens ask all others; `ratio` when None, 0 as published for
        DiT. Attention that tells its tokens apart by more than their features (rotary angles, a bias, a mask by
        query) is computed for all of them or for none.
    staleness: of equation (1); may be traced. 1 is about what is published for DiT, 0.25 N / 4 of a unit vector.
    select: whose outputs are kept. What is neither a feed-forward layer nor attention is reused, unless `ratio` is 1.

    With `ratio` 1 it is the plain denoiser, with 0 `cached_features` with `reuse()`. The carry holds one output of each
    selected module. A skipped step counts no evaluation, and as compute the share of the operations that it still runs.
    Raises InvalidInput for a share outside of [0, 1].
    """
    attention = ratio if attention is None else attention
    for field, value in (("ratio", ratio), ("attention", attention)):
        if not 0 <= value <= 1:
            raise invalid(field, value, "a share of the tokens, in [0, 1], was expected")
    tapped = intercepted(network, taps(select, lambda output, *args: Kept(output, _ages(output))))

    def renew(site: Site, *args):
        kept = _renewed(site, site.get(_KEPT, "output", dict), ratio, attention, staleness, *args)
        site.put(_KEPT, "output", kept)
        return kept.value

    partly = intercepted(network, Edit(select, renew, (_KEPT,)))

    @traced_once
    def computed(params, x, t, cond):
        output, extras, _ = tapped.apply(params, {}, x, t, cond)
        return (output, {name: extras[name] for name in extras if name != "taps"}), extras["taps"]

    @traced_once
    def renewed(params, kept, x, t, cond):
        output, extras, collections = partly.apply(params, {_KEPT: kept}, x, t, cond)
        return (output, extras), collections[_KEPT]

    def init(params, x, cond):
        shapes = jax.eval_shape(computed, params, *network_inputs(process, x, some_step(x).t), cond)[1]
        return Tokens(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), no_history())

    def apply(params, carry, x, step, cond):
        inputs = (*network_inputs(process, x, step.t), cond)
        now = due(refresh, step, carry.history)
        (output, extras), kept = jax.lax.cond(
            now, lambda kept: computed(params, *inputs), lambda kept: renewed(params, kept, *inputs), carry.kept
        )
        rest = flops_share(renewed, computed, (params, carry.kept, *inputs), (params, *inputs))
        prediction = to_prediction(process, output, x, step.t, extras, cost_of(now, rest))
        return prediction, Tokens(kept, after(carry.history, now))

    return Denoiser(init, apply, process, lambda carry: Tokens._make((depth_axes(carry.kept), None)))


def _renewed(site, kept, ratio, attention, staleness, *args):
    """What is kept after a skipped step."""
    is_attention = isinstance(site.module, Attention)
    apart = is_attention or isinstance(site.module, FeedForward)
    shape = kept.age.shape
    batch, tokens = shape[0], math.prod(shape[1:])
    wanted = attention if is_attention else ratio if apart else math.floor(ratio)
    # Rounded first: 0.1 of 30 is 3, whatever its last bit.
    count = math.ceil(round(wanted * tokens, 6))
    if count == 0:
        return Kept(kept.value, kept.age + 1)
    if count == tokens:
        return Kept(site.run(*args).astype(kept.value.dtype), jnp.zeros_like(kept.age))
    if is_attention:
        _check_alike(*args[2:])

    values, ages = kept.value.reshape(batch, tokens, -1), kept.age.reshape(batch, tokens)
    size = jnp.linalg.norm(values.astype(jnp.float32), axis=-1)
    score = size / jnp.maximum(size.mean(axis=1, keepdims=True), 1e-12) + staleness * ages
    chosen = jax.lax.top_k(score, count)[1]
    inputs = args[0].reshape(batch, tokens, -1)
    fresh = site.run(jnp.take_along_axis(inputs, chosen[..., None], axis=1), *args[1:])
    rows = jnp.arange(batch)[:, None]
    values = values.at[rows, chosen].set(fresh.astype(values.dtype))
    ages = (ages + 1).at[rows, chosen].set(0)
    return Kept(values.reshape(kept.value.shape), ages.reshape(shape))


def _check_alike(mask, rotary, bias=None):
    if rotary is not None or bias is not None or (mask is not None and mask.shape[-2] > 1):
        raise InvalidInput(
            "Attention with rotary angles, a bias or a mask by query cannot be asked for some of its tokens: give "
            "attention=0 or attention=1."
        )


def _ages(output):
    return jnp.zeros(output.shape[:-1], jnp.int32)
