"""Low-rank adaptation of frozen networks by interception (Hu et al. 2021): `W x + (alpha / rank) B A x`.

The factors live in a tree of their own with the paths of the network's parameters, stacked over depth like them, so
they are trained, stored, swapped and merged without touching the network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.interception import Edit, Select, Site, intercepted
from diffusion_jax.typing import Network


class Lora(NamedTuple):
    """Low-rank factors beside a network.

    init: (key, params, x, t, cond) -> lora           a tree of factors; the network is unchanged by it
    network: a `Network` whose parameters are `{"params": params, "lora": lora}`
    merge: (params, lora) -> params                   the adapted weights themselves, for the plain network
    """

    init: Callable[..., Any]
    network: Network
    merge: Callable[[Any, Any], Any]


def lora(
    network: Network,
    rank: int = 8,
    alpha: float | None = None,
    select: Select = ("q", "k", "v", "out"),
    collection: str = "lora",
) -> Lora:
    """Factors A `[in, rank]` (normal, variance 1 / in) and B `[rank, out]` (zero) for the selected Dense layers.

    alpha: scale of the update times `rank`; `rank` when absent. select: see `models.interception.Select`; by default
    the projections of attention. Train with the gradient of the "lora" entry only:

        adapted = lora(network)
        factors = adapted.init(key, params, x, t, cond)
        jax.grad(lambda factors: loss(adapted.network.apply({"params": params, "lora": factors}, x, t, cond)))

    Raises InvalidInput for a rank or alpha that is not positive, and where `select` finds anything but Dense layers.
    """
    if not isinstance(rank, int) or rank < 1:
        raise invalid("rank", rank, "it must be a positive integer")
    if alpha is not None and alpha <= 0:
        raise invalid("alpha", alpha, "it must be positive")
    scale = (rank if alpha is None else alpha) / rank

    def apply(site: Site, x):
        if not isinstance(site.module, nn.Dense):
            kind = type(site.module).__name__
            raise InvalidInput(f"lora adapts Dense layers, but {'/'.join(site.module.path)} is {kind}: narrow select.")
        y = site.run(x)

        def down():
            return jax.random.normal(site.key(), (x.shape[-1], rank)) * x.shape[-1] ** -0.5

        a = site.get(collection, "a", down)
        b = site.get(collection, "b", lambda: jnp.zeros((rank, y.shape[-1])))
        update = (x.astype(y.dtype) @ a.astype(y.dtype)) @ b.astype(y.dtype)
        return y + scale * update

    opened = intercepted(network, Edit(select, apply, (collection,)))

    def init(key, params, x, t, cond=None):
        return opened.init(key, params, x, t, cond)[collection]

    def merge(params, factors):
        merged = dict(params)
        for name, entry in factors.items():
            if name in ("a", "b"):
                continue
            merged[name] = merge(merged[name], entry)
        if "a" in factors and "kernel" in merged:
            merged["kernel"] = merged["kernel"] + scale * (factors["a"] @ factors["b"])
        return merged

    return Lora(init, opened.network, merge)
