"""What objectives do with a batch before the loss: draw times, give each example its keys, drop conditions.

A batch is a dict: `x0` (an array `[B, ...]` or a dict of those), optionally `cond` (a dict), `index [B]`, the global
index of each example, to which its randomness belongs, `missing`, which examples lack which modality, and `weight`,
how much each entry of the data counts. `noise`, where there is one, is the noise that belongs to each example, and
`base` what is noised in the place of x0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from diffusion_jax.denoisers import null_condition
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes import is_gaussian, safe_inverse
from diffusion_jax.randomness import fold, sample_keys, uniform
from diffusion_jax.time_axes import expand, where
from diffusion_jax.typing import Condition, Objective, Time


def batch_size(batch: Mapping[str, Any]) -> int:
    """B. Raises InvalidInput if the batch has no `x0`."""
    if "x0" not in batch:
        raise InvalidInput(f"the batch has no 'x0'; it has: {', '.join(sorted(batch)) or 'nothing'}.")
    return jax.tree.leaves(batch["x0"])[0].shape[0]


def example_keys(key: Key[Array, ""], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key per example: a function of the step's key and the example's index alone.

    What is folded into it: 0 to 2 by the losses themselves, 3 by `degraded`, 4 by drawn scales of guidance and by
    `conditioned_on_ends` (so of both together the draws depend on each other), 5 by `time_policy`, 6 by the times of
    `shortcut`. What is new needs a number of its own.
    """
    return sample_keys(fold(key, 1), index)


def drawn(
    draw: Any,
    state: Any,
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    axes: int | Mapping[str, int],
    missing_weight: float | int = 0.0,
) -> dict[str, Any]:
    """The batch with `index`, `t` and `t_weight`; times that it already has are kept, but for what is `missing`.

    axes: over how many leading axes of the data times vary. With a dict of draws each entry of `x0` has its own time
        (and its own number of axes, if there is a dict of those).
    missing_weight: see `without_missing`.
    """
    return without_missing(_drawn(draw, state, batch, key, axes), bool(jax.tree.leaves(state)), missing_weight)


def without_missing(batch: Mapping[str, Any], learned: bool = False, weight: float | int = 0.0) -> dict[str, Any]:
    """The batch with every missing modality at t = 1, where it is noise, with this weight; its x0 is ignored.

    missing: `{modality: bool [B]}` for joint data: clips without actions, images without captions (Zhu et al. 2025,
    UWM). The mean over the batch counts the missing as zeros: a modality's loss is a mean over all examples.
    Raises InvalidInput for a modality that x0 lacks, or one learned draw for several modalities.
    """
    missing = batch.get("missing")
    if not missing:
        return dict(batch)
    x0, size = batch["x0"], batch_size(batch)
    have = sorted(x0) if isinstance(x0, Mapping) else []
    if not set(missing) <= set(have):
        raise invalid("missing", sorted(missing), f"modalities of x0 were expected, which has {have or 'one array'}")
    if learned and not isinstance(batch["t"], Mapping):
        raise InvalidInput(
            "missing gives modalities different times, but one learned draw serves all: use a dict of draws."
        )

    def pinned(values, value):
        values = dict(values) if isinstance(values, Mapping) else dict.fromkeys(have, values)
        for name, flags in missing.items():
            old = jnp.asarray(values[name])
            flags = jnp.asarray(flags).reshape(size, *(1,) * max(0, old.ndim - 1))
            values[name] = jnp.where(flags, value, old)
        return values

    x0 = {
        **x0,
        **{name: where(jnp.asarray(flags), jnp.zeros_like(x0[name]), x0[name]) for name, flags in missing.items()},
    }
    return {**batch, "x0": x0, "t": pinned(batch["t"], 1.0), "t_weight": pinned(batch["t_weight"], weight)}


def _drawn(draw, state, batch, key, axes):
    size = batch_size(batch)
    batch = {"index": jnp.arange(size), **batch}
    if "t" in batch:
        return {"t_weight": jnp.float32(1.0) + jnp.zeros((size,)), **batch}
    x0 = batch["x0"]
    key = fold(key, 0)
    if isinstance(draw, Mapping):
        if not isinstance(x0, Mapping) or set(draw) != set(x0):
            have = sorted(x0) if isinstance(x0, Mapping) else "one array"
            raise invalid("draw", sorted(draw), f"a dict of draws needs the entries of x0, which has {have}")
        axes = axes if isinstance(axes, Mapping) else dict.fromkeys(draw, axes)
        pairs = {
            name: draw[name].draw(state[name], fold(key, i), _prefix(x0[name], axes[name]))
            for i, name in enumerate(sorted(draw))
            if not isinstance(draw[name], str)
        }
        pairs |= {name: pairs[other] for name, other in draw.items() if isinstance(other, str)}
        return {**batch, "t": {n: p[0] for n, p in pairs.items()}, "t_weight": {n: p[1] for n, p in pairs.items()}}
    # One time for all modalities varies over axes that they all have.
    leaves = jax.tree.leaves(x0)
    prefix = _prefix(leaves[0], axes)
    if any(_prefix(leaf, axes) != prefix for leaf in leaves):
        raise invalid("t_shape", axes, "modalities that share a time must agree in those axes; use a dict of draws")
    t, weight = draw.draw(state, key, prefix)
    return {**batch, "t": t, "t_weight": weight}


def corrupted(process: Any, keys: Key[Array, " B"], batch: Mapping[str, Any], t: Time) -> tuple[Any, Any]:
    """x_t and its noise: drawn, or that of the batch where it has "noise", of the shape of x0.

    With "base", of the shape of x0 too, `x_t = alpha base + sigma eps`, and its noise is the one that leads to x0,

        eps* = (x_t - alpha x0) / sigma = eps + alpha / sigma (base - x0),

    so a target that is made of x0 and eps* asks for the true data. Without noise, at sigma = 0, eps* is eps.
    Raises InvalidInput for another shape of either, or a process that is not Gaussian.
    """
    x0, noise, base = batch["x0"], batch.get("noise"), batch.get("base")
    for name, given in (("noise", noise), ("base", base)):
        if given is not None and (not is_gaussian(process) or jnp.shape(given) != jnp.shape(x0)):
            shape = jax.tree.map(jnp.shape, given)
            raise invalid(f"the shape of {name!r} in the batch", shape, "that of x0, of a Gaussian process, is needed")
    begin = x0 if base is None else jnp.asarray(base, x0.dtype)
    x_t, noise = process.corrupt(keys, begin, t) if noise is None else (process.marginal(begin, noise, t), noise)
    if base is None:
        return x_t, noise
    ratio = process.alpha(t) * safe_inverse(process.sigma(t))
    return x_t, noise + expand(ratio, x0) * (begin - x0)


def entry_weights(batch: Mapping[str, Any]) -> Any:
    """`weight` of a batch, of a prefix of the shape of its data, or for joint data a dict; 1.0 where it says nothing.

    Raises InvalidInput for a modality that x0 lacks, or another shape.
    """
    x0, given = batch["x0"], batch.get("weight")
    joint = isinstance(x0, Mapping)
    if given is None:
        return dict.fromkeys(x0, 1.0) if joint else 1.0
    if isinstance(given, Mapping) != joint or (joint and not set(given) <= set(x0)):
        have = f"x0 has {sorted(x0)}" if joint else "x0 is one array"
        raise invalid("weight", sorted(given) if isinstance(given, Mapping) else "one array", have)
    for name, weight in given.items() if joint else [("", given)]:
        shape, like = jnp.shape(weight), (x0[name] if joint else x0).shape
        if not shape or any(a not in (1, b) for a, b in zip(shape, like)) or len(shape) > len(like):
            raise invalid(f"weight{[name] if name else ''}.shape", shape, f"a prefix of the data's, {like}, is needed")
    return {name: given.get(name, 1.0) for name in x0} if joint else given


def refuse_weight(batch: Mapping[str, Any], what: str) -> None:
    """Raises InvalidInput where a batch weighs its entries and the loss `what` would not."""
    if batch.get("weight") is not None:
        raise InvalidInput(f"The batch weighs its entries ('weight'), which {what} does not: leave it out of the data.")


def refuse_gradient(objective: Objective, what: str) -> None:
    """Raises InvalidInput where an objective has a rule for its gradient that is lost in `what`."""
    if objective.gradient is not None:
        raise InvalidInput(f"The objective combines its own gradients, which {what} would lose: combine outside of it.")


def distinct_draws(draw: Mapping[str, Any]) -> dict[str, Any]:
    """The draws of modalities that have one; the others have the name of one of these in its place.

    Raises InvalidInput for a name that has no draw.
    """
    draws = {name: one for name, one in draw.items() if not isinstance(one, str)}
    for name, other in draw.items():
        if isinstance(other, str) and other not in draws:
            raise unknown(f"draw[{name!r}]", other, draws)
    return draws


def _prefix(leaf: Any, axes: int) -> tuple[int, ...]:
    if leaf.ndim < axes:
        raise invalid("t_shape", axes, f"the data of shape {leaf.shape} has fewer axes")
    return leaf.shape[:axes]


def updated(draw: Any, state: Any, t: Time, losses: Any) -> Any:
    """The draws' states after they have seen the losses `[B]` (a dict of losses for a dict of draws)."""
    losses = jax.lax.stop_gradient(losses)
    if isinstance(draw, Mapping):
        # Times that the batch brought along may be one array for all modalities.
        return {
            name: one.update(state[name], t[name] if isinstance(t, Mapping) else t, losses[name])
            for name, one in distinct_draws(draw).items()
        }
    return draw.update(state, t, losses)


def drop_condition(keys: Key[Array, " B"], cond: Condition, null: Mapping[str, Any] | None, rate: float) -> Any:
    """Replaces the condition of a share `rate` of the examples, whole examples at a time, by `null`.

    Entries that `null` lacks are kept. Raises InvalidInput if `null` has an entry that the condition lacks.
    """
    if not rate:
        return cond
    if cond is None:
        raise InvalidInput("cond_dropout is set, but the batch has no 'cond'.")
    dropped = uniform(keys, (keys.shape[0],)) < rate
    return {**cond, **{name: where(dropped, value, cond[name]) for name, value in null_condition(cond, null).items()}}
