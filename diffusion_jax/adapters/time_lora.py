"""TD-LoRA: low-rank factors whose up-projection is a mixture that the timestep decides (Zhao et al. 2025, DyDiT++).

    y = W x + (alpha / rank) sum_k pi_k(E_t) B_k A x,        pi = softmax(linear(E_t)) in each adapted layer

At a fixed t it is one matrix, so on a grid of steps it costs nothing. K = 1 is `lora`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.adapters.routed import at_time, embedded_time, routed_logits, routers
from diffusion_jax.adapters.trees import merged, scale_of
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.anatomy import collects, module_params, required, with_module_params
from diffusion_jax.models.interception import Edit, Select, Site, intercepted
from diffusion_jax.models.layers.modulation import expand_vector
from diffusion_jax.typing import Network

LORA, MIXTURE = "lora", "mixture"


class TimeLora(NamedTuple):
    """Factors beside a network, mixed by time; the functions of `routed.Timed`, and

    merge: (params, t) -> the network's own parameters with the update at the network's time `t []` in them.
    """

    init: Callable[..., dict[str, Any]]
    fill: Callable[..., dict[str, Any]]
    opened: Network
    network: Network
    merge: Callable[[Any, Any], Any]


def time_lora(
    network: Network,
    rank: int = 8,
    experts: int = 4,
    alpha: int | float | None = None,
    select: Select = ("q", "k", "v", "out"),
    clock: Callable[[Any], Any] = lambda t: t,
) -> TimeLora:
    """For each of the selected Dense layers factors A `[in, rank]` (normal, variance 1 / in), K = `experts` factors B_k
    `[rank, out]` (zero) and a linear router (Xavier; it breaks the symmetry of the B_k).

    alpha: scale of the update times `rank`; `rank` when absent. select: see `models.interception.Select`.
    clock: the one time a sample that routers read, of the network's times.

    The parameters are `{"params": params, "lora": factors, "mixers": routers}`; freeze the first to train the others.
    Raises InvalidInput for a rank, alpha or number of experts that is not positive, and for layers that are not Dense.
    """
    if not isinstance(experts, int) or experts < 1:
        raise invalid("experts", experts, "it must be a positive integer")
    scale = scale_of(rank, alpha)

    def apply(site: Site, x):
        if not isinstance(site.module, nn.Dense):
            kind = type(site.module).__name__
            raise InvalidInput(f"time_lora adapts Dense layers, but {'/'.join(site.module.path)} is {kind}.")
        y = site.run(x)
        a = site.get(LORA, "a", lambda: jax.random.normal(site.key(), (x.shape[-1], rank)) * x.shape[-1] ** -0.5)
        b = site.get(LORA, "b", lambda: jnp.zeros((experts, rank, y.shape[-1])))
        weights = site.get(MIXTURE, "weights", lambda: jnp.full((1, experts), 1 / experts, jnp.float32))
        low = x.astype(y.dtype) @ a.astype(y.dtype)
        # Mixing the narrow features costs K times as little as mixing the matrices of each sample.
        low = (expand_vector(weights, low)[..., None] * low[..., None, :]).reshape(*low.shape[:-1], experts * rank)
        return y + scale * (low.astype(y.dtype) @ b.reshape(experts * rank, -1).astype(y.dtype))

    opened = intercepted(network, Edit(select, apply, (LORA, MIXTURE)))

    def init(key, params, x, t, cond=None):
        first, second = jax.random.split(key)
        made = opened.init(first, params, x, t, cond)
        return {LORA: made[LORA], "mixers": routers(second, made[MIXTURE], required(network, "width", "time_lora"))}

    def fill(params, t, train=False, key=None):
        rest = {name: entry for name, entry in params.items() if name != "mixers"}
        logits = routed_logits(params["mixers"], embedded_time(opened.network, params, clock(t)))
        return {**rest, MIXTURE: jax.tree.map(jax.nn.softmax, logits)}

    def merge(params, t):
        filled = fill(params, jnp.reshape(jnp.asarray(t, jnp.float32), (1,)))
        new = merged(module_params(opened.network, params), _mixed(params[LORA], filled[MIXTURE]), scale)
        own = {name: params[name] for name in params if name not in (LORA, "mixers")}
        return with_module_params(network, own if collects(network) else own["params"], new)

    return TimeLora(init, fill, opened.network, at_time(opened.network, fill), merge)


def _mixed(factors, weights):
    """The tree of `lora` for weights `[L, 1, K]`: B is the mixture."""
    if "a" in factors:
        return {"a": factors["a"], "b": jnp.einsum("...k,...kro->...ro", weights["weights"][..., 0, :], factors["b"])}
    return {name: _mixed(entry, weights[name]) for name, entry in factors.items()}
