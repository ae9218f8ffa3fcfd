"""Trees of adapters: what is added to the parameters of a network, at the paths of its modules.

At the path of a module stand `a` and `b`, factors whose product is added to its kernel (Hu et al. 2021), or a change of
one of its parameters under the parameter's own name: `kernel` (what is not of low rank: LoHa, LoKr, DoRA), `bias`,
`scale` of a norm, `embedding`. Everything is added, so adapters are scaled, summed and moved to other networks alike.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.paths import by_path

FACTORS = ("a", "b")


def scale_of(rank: int, alpha: Any) -> float:
    """`alpha / rank`, 1 without an alpha. Raises InvalidInput unless both are positive, and the rank an integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise invalid("rank", rank, "it must be a positive integer")
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise invalid("alpha", alpha, "it must be a positive number")
    return alpha / rank


def merged(params: Any, factors: Any, scale: Any = 1.0) -> Any:
    """The adapted parameters themselves, `W + scale A B`; whatever has no entry is shared with `params`.

    scale: see `at_scale`.
    """
    _check_scale(scale)
    result = dict(params)
    for name, entry in factors.items():
        if isinstance(entry, Mapping):
            result[name] = merged(result[name], entry, scale)
        elif name not in FACTORS:
            result[name] = _added(result[name], scale * entry)
    if "a" in factors:
        a, b, kernel = factors["a"], factors["b"], result["kernel"]
        # A convolution's B stands for a 1 x 1 window.
        b = b[..., None, None, :, :] if a.ndim == b.ndim + 2 else b
        result["kernel"] = _added(kernel, scale * (a @ b))
    return result


def _added(parameter, change):
    return parameter + change.astype(parameter.dtype)


def _check_scale(scale: Any) -> None:
    """Raises InvalidInput unless a scale that is known before a program runs is a finite number; it may be negative."""
    if isinstance(scale, jax.Array):
        return
    number = np.asarray(scale)
    if number.dtype.kind not in "iuf" or not np.isfinite(number).all():
        raise invalid("scale", scale, "the scale of an adapter is a finite number, below 0 for the opposite change")


def at_scale(params: Any, factors: Any, scale: Any = 1.0) -> dict[str, Any]:
    """The parameters of `Lora.network` with the update at `scale` times its trained size; 0 is the base, bit for bit.

    scale: a number, or a traced value: a sweep of scales is one program (Liu et al. 2025 sample at 1.4). Below 0 it is
        the opposite change. Raises InvalidInput for a number that is not finite.
    """
    _check_scale(scale)
    return {"params": params, "lora": _scaled(factors, scale)}


def _scaled(factors, scale):
    """All that is added, times `scale`: products by B alone."""
    return {
        name: _scaled(entry, scale) if isinstance(entry, Mapping) else entry if name == "a" else scale * entry
        for name, entry in factors.items()
    }


def relative_change(params: Any, factors: Any, scale: int | float = 1.0) -> dict[str, float]:
    """`|W' - W| / |W|` of each adapted module, by its path: where a network was changed, and by how much.

    Norms are those of Frobenius, over all changed parameters of the module and over all blocks at once where they are
    stacked over depth. scale: see `at_scale`.
    """
    before, after = by_path(params), by_path(merged(params, factors, scale))

    def change(path, names):
        weights = {f"{path}/{name}": jnp.asarray(before[f"{path}/{name}"]) for name in _changed(names)}
        moved = sum(jnp.sum((after[name] - weight) ** 2) for name, weight in weights.items())
        return math.sqrt(float(moved) / float(sum(jnp.sum(weight**2) for weight in weights.values())))

    return {path: change(path, entries) for path, entries in modules(factors)}


def _changed(names) -> set[str]:
    """The parameters that entries of these names change."""
    return {"kernel" if name in FACTORS else name for name in names}


def modules(factors: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and entries of each module that is adapted."""
    own = {name: entry for name, entry in factors.items() if not isinstance(entry, Mapping)}
    if own:
        yield path, own
    for name, entry in factors.items():
        if isinstance(entry, Mapping):
            yield from modules(entry, f"{path}/{name}".lstrip("/"))


def adapted_modules(factors: Any) -> tuple[str, ...]:
    """The paths of the modules that are adapted, as a `select` of `lora`."""
    return tuple(path for path, _ in modules(factors))


def largest_rank(factors: Any) -> int:
    """The largest rank of the factors; 0 where there are none."""
    return max((entries["a"].shape[-1] for _, entries in modules(factors) if "a" in entries), default=0)


def combined_adapters(weighted: Sequence[tuple[Any, Any]], rank: int, like: Any = None) -> Any:
    """One tree for several adapters at once: `sum_i weight_i A_i B_i`, at exactly `rank`, and sums of other changes.

    weighted: `(factors, weight)` pairs, of any ranks; their factors stand side by side, and zeros fill the rank up. So
    the result always has the same shapes, and other adapters or weights do not compile anew.
    like: a tree that says which entries there are, where adapters differ in that; what an adapter lacks is zero in it.
    Use with `attached`.
    Raises InvalidInput where the ranks add up to more than `rank`, for an entry that `like` lacks, and for a weight
    that is not finite.
    """
    trees = [factors for factors, _ in weighted]
    for _, weight in weighted:
        _check_scale(weight)
    if like is None:
        like = _union(trees)
    places = by_path(like)
    for tree in trees:
        if extra := sorted({path.removesuffix("/a").removesuffix("/b") for path in set(by_path(tree)) - set(places)}):
            raise InvalidInput(f"An adapter has factors for {', '.join(extra)}, which `like` lacks.")
    return _combined(like, weighted, rank, "")


def _union(trees):
    union: dict[str, Any] = {}
    for tree in trees:
        for name, entry in tree.items():
            union[name] = _union([union.get(name, {}), entry]) if isinstance(entry, Mapping) else entry
    return union


def _combined(like, weighted, rank, path):
    result: dict[str, Any] = {}
    for name, entry in like.items():
        there = [(tree[name], weight) for tree, weight in weighted if name in tree]
        if isinstance(entry, Mapping):
            result[name] = _combined(entry, there, rank, f"{path}/{name}".lstrip("/"))
        elif name not in FACTORS:
            result[name] = sum((weight * change for change, weight in there), jnp.zeros_like(entry))
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


def transplanted(factors: Any, params: Any, scale: Any = 1.0, select: str | tuple[str, ...] = "*") -> Any:
    """`scale` times those entries whose module's path `select` matches, for a network with the parameters `params`.

    Factors trained beside one network serve any other with the same modules: a model distilled from it, for example
    (Gandikota & Bau 2025). Products are scaled by B alone: 0 is the network itself, a negative scale the opposite
    update. scale: see `at_scale`. select: patterns on the end of a path, see `models.interception.Select`.
    Raises InvalidInput where `params` lacks a module or has one of another shape, and where `select` selects nothing.
    """
    _check_scale(scale)
    patterns = (select,) if isinstance(select, str) else tuple(select)
    weights, found = by_path(params), dict(modules(factors))
    chosen = [
        path
        for path in found
        if any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}") for pattern in patterns)
    ]
    if not chosen:
        raise invalid("select", select, f"it selects no module; factors are of {', '.join(adapted_modules(factors))}")
    for path in chosen:
        for name in _changed(found[path]):
            if f"{path}/{name}".lstrip("/") not in weights:
                raise InvalidInput(f"There are factors for {path}, which the network does not have.")
        _check_shapes(path, found[path], weights)

    def pruned(tree, path):
        result = {}
        for name, entry in tree.items():
            if isinstance(entry, Mapping):
                inner = pruned(entry, f"{path}/{name}".lstrip("/"))
                result |= {name: inner} if inner else {}
            elif path in chosen:
                result[name] = entry
        return result

    return _scaled(pruned(factors, ""), scale)


def _check_shapes(path, entries, weights):
    there = {name: weights[f"{path}/{name}".lstrip("/")].shape for name in _changed(entries)}
    for name in set(entries) - set(FACTORS):
        if entries[name].shape != there[name]:
            expected = f"that of a parameter {there[name]} was expected"
            raise invalid(f"the change of {path}/{name}", entries[name].shape, expected)
    if "a" in entries:
        a, b = entries["a"].shape, entries["b"].shape
        if (*a[:-1], b[-1]) != there["kernel"]:
            raise invalid(f"factors of {path}", (a, b), f"those of a kernel {there['kernel']} were expected")
