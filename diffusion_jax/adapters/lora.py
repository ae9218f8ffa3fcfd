"""Low-rank adaptation of frozen networks by interception (Hu et al. 2021): `W x + (alpha / rank) B A x`.

The factors live in a tree of their own with the paths of the network's parameters, stacked over depth like them, so
they are trained, stored, swapped and merged without touching the network. Reading and writing the files in which
others keep theirs is in `interop.lora_files`.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.anatomy import module_params, with_module_params
from diffusion_jax.models.interception import Edit, Select, Site, intercepted
from diffusion_jax.models.paths import by_path
from diffusion_jax.typing import Network


class Lora(NamedTuple):
    """Low-rank factors beside a network.

    init: (key, params, x, t, cond) -> lora           a tree of factors; the network is unchanged by it
    network: a `Network` whose parameters are `{"params": params, "lora": lora}`
    merge: (params, lora, strength=1.0) -> params     the adapted weights themselves, for the plain network, with the
        factors at a strength that may be traced: 0 is the network, below 0 is the other way. `params` may be those of
        any network with the same modules, such as a student distilled from the one beside which they were trained.
    """

    init: Callable[..., Any]
    network: Network
    merge: Callable[..., Any]


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
    if not isinstance(rank, int) or rank < 1:
        raise invalid("rank", rank, "it must be a positive integer")
    if alpha is not None and alpha <= 0:
        raise invalid("alpha", alpha, "it must be positive")
    scale = (rank if alpha is None else alpha) / rank

    def apply(site: Site, x):
        module = site.module
        if not isinstance(module, nn.Dense | nn.Conv):
            kind = type(module).__name__
            raise InvalidInput(
                f"lora adapts Dense layers and convolutions, but {'/'.join(module.path)} is {kind}: narrow select."
            )
        y = site.run(x)
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

    opened = intercepted(network, Edit(select, apply, (collection,)))

    def init(key, params, x, t, cond=None):
        return opened.init(key, params, x, t, cond)[collection]

    def merge(params, factors, strength=1.0):
        inner = module_params(network, params)
        return with_module_params(network, params, merged(inner, transplanted(factors, inner, strength * scale)))

    return Lora(init, opened.network, merge)


def merged(params: Any, factors: Any, scale: int | float = 1.0) -> Any:
    """The adapted weights `W + scale A B` themselves; whatever has no factors is shared with `params`."""
    result = dict(params)
    for name, entry in factors.items():
        if name in ("a", "b"):
            continue
        result[name] = merged(result[name], entry, scale)
    if "a" in factors:
        a, b, kernel = factors["a"], factors["b"], result["kernel"]
        # A convolution's B stands for a 1 x 1 window.
        b = b[..., None, None, :, :] if a.ndim == b.ndim + 2 else b
        result["kernel"] = kernel + (scale * (a @ b)).astype(kernel.dtype)
    return result


def at_scale(params: Any, factors: Any, scale: Any = 1.0) -> dict[str, Any]:
    """The parameters of `Lora.network` with the update at `scale` times its trained size; 0 is the base, bit for bit.

    scale: a number, or a traced value: a sweep of scales is one program (Liu et al. 2025 sample at 1.4).
    """
    return {"params": params, "lora": _scaled(factors, scale)}


def _scaled(factors, scale):
    return {
        name: _scaled(entry, scale) if isinstance(entry, Mapping) else scale * entry if name == "b" else entry
        for name, entry in factors.items()
    }


def relative_change(params: Any, factors: Any, scale: int | float = 1.0) -> dict[str, float]:
    """`|W' - W| / |W|` of each module that has factors, by its path: where a network was changed, and by how much.

    Norms are those of Frobenius, over all blocks at once where they are stacked over depth. scale: see `merged`.
    """
    before, after = by_path(params), by_path(merged(params, factors, scale))

    def change(path):
        weights = jnp.asarray(before[f"{path}/kernel"])
        return float(jnp.linalg.norm(after[f"{path}/kernel"] - weights) / jnp.linalg.norm(weights))

    return {path: change(path) for path in adapted_modules(factors)}


def adapted_modules(factors: Any) -> tuple[str, ...]:
    """The paths of the modules that have factors, as a `select` of `lora`."""
    paths: list[str] = []
    for name, entry in factors.items():
        if name == "a":
            paths.append("")
        elif name != "b":
            paths += [f"{name}/{path}".rstrip("/") for path in adapted_modules(entry)]
    return tuple(paths)


def attached(network: Network, like: Any) -> Network:
    """The network with a place for factors of the modules and the rank of `like`, at scale 1.

    Its parameters are `{"params": params, "lora": factors}`; factors of the same shapes swap without compiling anew.
    """
    rank = next(leaf.shape[-1] for path, leaf in by_path(like).items() if path.endswith("/a"))
    return lora(network, rank, select=adapted_modules(like)).network


def combined_adapters(weighted: Sequence[tuple[Any, Any]], rank: int, like: Any = None) -> Any:
    """One tree of factors for several adapters at once: `sum_i weight_i A_i B_i`, at exactly `rank`.

    weighted: `(factors, weight)` pairs, of any ranks; their factors stand side by side, and zeros fill the rank up. So
    the result always has the same shapes, and other adapters or weights do not compile anew.
    like: a tree of factors that says which modules there are, where adapters differ in that; modules that an adapter
    lacks are zero in it. Use with `attached`.
    Raises InvalidInput where the ranks add up to more than `rank`, and for a module that `like` lacks.
    """
    trees = [factors for factors, _ in weighted]
    if like is None:
        like = _union(trees)
    for tree in trees:
        if extra := sorted(set(adapted_modules(tree)) - set(adapted_modules(like))):
            raise InvalidInput(f"An adapter has factors for {', '.join(extra)}, which `like` lacks.")
    return _combined(like, [(tree, weight) for tree, weight in weighted], rank, "")


def transplanted(factors: Any, params: Any, scale: Any = 1.0, select: str | tuple[str, ...] = "*") -> Any:
    """`scale` times those factors whose module's path `select` matches, for a network with the parameters `params`.

    Factors trained beside one network serve any other with the same modules: a model distilled from it, for example
    (Gandikota & Bau 2025). They are scaled by B alone: 0 is the network itself, a negative scale the opposite update.
    scale: a number, or a traced value. select: patterns on the end of a path, see `models.interception.Select`.
    Raises InvalidInput where `params` lacks a module or has one of another shape, and where `select` selects nothing.
    """
    patterns = (select,) if isinstance(select, str) else tuple(select)
    weights, found = by_path(params), by_path(factors)
    chosen = [
        path
        for path in adapted_modules(factors)
        if any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}") for pattern in patterns)
    ]
    if not chosen:
        raise invalid("select", select, f"it selects no module; factors are of {', '.join(adapted_modules(factors))}")
    for path in chosen:
        there = weights.get(f"{path}/kernel")
        if there is None:
            raise InvalidInput(f"There are factors for {path}, which the network does not have.")
        a, b = found[f"{path}/a"].shape, found[f"{path}/b"].shape
        if (*a[:-1], b[-1]) != there.shape:
            raise invalid(f"factors of {path}", (a, b), f"those of a kernel {there.shape} were expected")

    def pruned(tree, path):
        result = {}
        for name, entry in tree.items():
            if isinstance(entry, Mapping):
                inner = pruned(entry, f"{path}/{name}".lstrip("/"))
                result |= {name: inner} if inner else {}
            elif path in chosen:
                result[name] = scale * entry if name == "b" else entry
        return result

    return pruned(factors, "")


def _union(trees):
    union: dict[str, Any] = {}
    for tree in trees:
        for name, entry in tree.items():
            union[name] = _union([union.get(name, {}), entry]) if isinstance(entry, Mapping) else entry
    return union


def _combined(like, weighted, rank, path):
    result: dict[str, Any] = {}
    for name, entry in like.items():
        if isinstance(entry, Mapping):
            inner = [(tree[name], weight) for tree, weight in weighted if name in tree]
            result[name] = _combined(entry, inner, rank, f"{path}/{name}".lstrip("/"))
    if "a" not in like:
        return result
    there = [(tree, weight) for tree, weight in weighted if "a" in tree]
    ranks = sum(tree["a"].shape[-1] for tree, _ in there)
    if ranks > rank:
        raise invalid("rank", rank, f"the adapters of {path} have {ranks} together")
    spare = rank - ranks
    a = [tree["a"] for tree, _ in there] + [jnp.zeros((*like["a"].shape[:-1], spare))]
    b = [weight * tree["b"] for tree, weight in there]
    b += [jnp.zeros((*like["b"].shape[:-2], spare, like["b"].shape[-1]))]
    return {**result, "a": jnp.concatenate(a, -1), "b": jnp.concatenate(b, -2)}
