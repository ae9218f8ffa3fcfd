"""Low-rank adaptation of frozen networks by interception (Hu et al. 2021): `W x + (alpha / rank) B A x`.

The factors live in a tree of their own with the paths of the network's parameters, stacked over depth like them, so
they are trained, stored, swapped and merged without touching the network. Reading and writing the files in which
others keep theirs is in `interop.lora_files`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.adapters.trees import FACTORS, largest_rank, merged, modules, scale_of, transplanted
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.anatomy import module_params, with_module_params
from diffusion_jax.models.interception import Edit, Select, Site, intercepted
from diffusion_jax.typing import Network


class Lora(NamedTuple):
    """Low-rank factors beside a network.

    init: (key, params, x, t, cond) -> lora           a tree of factors; the network is unchanged by it
    network: a `Network` whose parameters are `{"params": params, "lora": lora}`
    merge: (params, lora, strength=1.0) -> params     the adapted weights themselves, for the plain network, with the
        factors at a strength that may be traced: 0 is the network, below 0 is the other way. `params` may be those of
        any network with the same modules, such as a student distilled from the one beside which they were trained.
    scale: alpha / rank, by which the network multiplies the product of the factors.
    """

    init: Callable[..., Any]
    network: Network
    merge: Callable[..., Any]
    scale: int | float = 1.0


def lora(
    network: Network,
    rank: int = 8,
    alpha: int | float | None = None,
    select: Select = ("q", "k", "v", "out"),
    collection: str = "lora",
) -> Lora:
    """Factors A `[in, rank]` (normal, variance 1 / in) and B `[rank, out]` (zero) for the selected layers.

    Of a convolution, A is a convolution to `rank` channels, `[height, width, in, rank]`, and B as above.
    alpha: scale of the update times `rank`; `rank` when absent. select: see `models.interception.Select`; by default
    the projections of attention. Train with the gradient of the "lora" entry only:

        adapted = lora(network)
        factors = adapted.init(key, params, x, t, cond)
        jax.grad(lambda factors: loss(adapted.network.apply({"params": params, "lora": factors}, x, t, cond)))

    A slider (Gandikota et al. 2023) is trained by `objectives.slider` and added at any strength by `merge`.
    Factors of other ranks are swapped without compiling anew once `combined_adapters` has brought them to one rank.
    Raises InvalidInput for a rank or alpha that is not positive, and where `select` finds anything but Dense layers
    and convolutions.
    """
    scale = scale_of(rank, alpha)

    apply = partial(_with_factors, rank=rank, scale=scale, collection=collection)
    opened = intercepted(network, Edit(select, apply, (collection,)))

    def init(key, params, x, t, cond=None):
        return opened.init(key, params, x, t, cond)[collection]

    def merge(params, factors, strength=1.0):
        inner = module_params(network, params)
        return with_module_params(network, params, merged(inner, transplanted(factors, inner, strength * scale)))

    return Lora(init, opened.network, merge, scale)


def _with_factors(site: Site, x: Any, *, rank: int, scale: int | float, collection: str, run: Any = None) -> Any:
    """The layer's output, or that of `run`, and `scale A B` of its input."""
    module = site.module
    if not isinstance(module, nn.Dense | nn.Conv):
        kind = type(module).__name__
        raise InvalidInput(
            f"lora adapts Dense layers and convolutions, but {'/'.join(module.path)} is {kind}: narrow select."
        )
    y = site.run(x) if run is None else run(x)
    window = tuple(cast(Sequence[int], module.kernel_size)) if isinstance(module, nn.Conv) else ()
    fan_in = x.shape[-1]
    for size in window:
        fan_in *= size

    def down():
        return jax.random.normal(site.key(), (*window, x.shape[-1], rank)) * fan_in**-0.5

    a = site.get(collection, "a", down).astype(y.dtype)
    b = site.get(collection, "b", lambda: jnp.zeros((rank, y.shape[-1]))).astype(y.dtype)
    if window:
        narrow = module.clone(features=a.shape[-1], use_bias=False, parent=None, name=None)
        low = narrow.apply({"params": {"kernel": a}}, x.astype(y.dtype))
    else:
        low = x.astype(y.dtype) @ a
    return y + scale * (low @ b)


def attached(network: Network, like: Any) -> Network:
    """The network with a place for the entries of `like`: factors of its rank, at scale 1, and other changes.

    Its parameters are `{"params": params, "lora": factors}`; trees of the same shapes swap without compiling anew.
    Raises InvalidInput for a module that the network lacks, and for factors of what is no Dense layer or convolution.
    """
    rank = largest_rank(like)
    by_entries: dict[frozenset, list[str]] = {}
    for path, entries in modules(like):
        if not path:
            raise InvalidInput(f"{', '.join(entries)} belong to no layer of the network: merge them instead.")
        by_entries.setdefault(frozenset(entries), []).append(path)
    edits = [
        Edit(tuple(map(_exactly, paths)), partial(_with_changes, rank=rank, names=names), ("lora",))
        for names, paths in by_entries.items()
    ]
    return intercepted(network, *edits).network


def _exactly(path: str) -> Callable[[nn.Module], bool]:
    """Selects the module at a path, and none whose path only ends alike."""

    def select(module):
        return "/".join(module.path) == path

    select.__name__ = path
    return select


def _with_changes(site: Site, *args: Any, rank: int, names: frozenset) -> Any:
    def run(*args):
        change = {name: site.get("lora", name, partial(_zeros, site, name)) for name in sorted(names - set(FACTORS))}
        if site.initialising or not change:
            return site.run(*args)
        moved = {name: site.params[name] + leaf.astype(site.params[name].dtype) for name, leaf in change.items()}
        return site.run_with({**site.params, **moved}, *args)

    if "a" not in names:
        return run(*args)
    return _with_factors(site, *args, rank=rank, scale=1, collection="lora", run=run)


def _zeros(site, name):
    return jnp.zeros_like(site.params[name])
