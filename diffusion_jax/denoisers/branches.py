"""Two predictions for one input, the second of which can be skipped: the common part of all forms of guidance.

`Branches` compute both predictions or the main one alone, in one doubled batch of one network (`in_one_batch`) or with
two networks (`from_two_networks`). `steered` combines them by a `Rule` where the scale requires both, and evaluates
only the main one elsewhere. This decision is a `lax.cond` on a scalar: the second prediction is skipped when no sample
of the batch needs it. The rules are in `guidance`.

In the doubled batch the two rows of a sample are neighbours (2i main, 2i + 1 guide), so that a batch that is sharded
over devices is doubled where it lies, without communication.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.denoisers.conditions import null_condition
from diffusion_jax.denoisers.scales import Scale, check_interval, check_scale, inside, is_static, value_at
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.time_axes import batch_axes, batch_size, each, expand, map_axes
from diffusion_jax.typing import BatchAxes, Cost, Denoiser, Number, Prediction


class Branches(NamedTuple):
    """A main prediction and that of a guide.

    alone: the denoiser of the main prediction only, with a carry of its own.
    init:  (params, x, cond) -> carry
    both:  (params, carry, x, step, cond) -> (main, guide, carry)
    main:  (params, carry, x, step, cond) -> (main, carry)           leaves the guide's part of the carry behind
    renew: (params, carry, x, cond) -> carry      a carry in which nothing left behind by `main` is trusted
    axes:  (carry) -> its batch axes, see `typing.BatchAxes`
    """

    alone: Denoiser
    init: Callable[..., Any]
    both: Callable[..., tuple[Prediction, Prediction, Any]]
    main: Callable[..., tuple[Prediction, Any]]
    renew: Callable[..., Any]
    axes: BatchAxes


class Rule(NamedTuple):
    """How the two predictions become one.

    init: (x) -> state, one entry per sample
    combine: (state, main, guide, scale, x, step) -> (Prediction, state); the cost and extras it returns are ignored
    neutral: whether scale 1 is the main prediction, so that the guide need not be evaluated there
    """

    init: Callable[[Any], Any]
    combine: Callable[..., tuple[Prediction, Any]]
    neutral: bool = True


class SteeredCarry(NamedTuple):
    """inner: the branches' carry. stale: whether the guide missed the last call. state: the rule's."""

    inner: Any
    stale: Any
    state: Any


def in_one_batch(denoiser: Denoiser, null: Any) -> Branches:
    """One network evaluated with the condition and with its null, as one batch of 2B rows.

    The carry is the denoiser's own for 2B rows, of which the main prediction has the even ones, along the batch axis
    that the denoiser names; leaves without one are shared by the branches. Leaves of the condition have the batch
    first; those that `null` leaves alone and that are not B long there are one for all samples, and stay as they are.
    Extras, which nobody names, have the batch where their shape is twice that of B rows. After a prediction without the
    guide the carry starts again, for every row: a cache is never read that was not written at the last call.
    """

    def question(x, cond):
        size = batch_size(x)
        main = _per_sample_condition(cond, null, size)
        guide = null_condition(main, null, size)
        doubled = jax.tree.map(lambda a, b: _interleave(a, b, size), main, guide)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), x), doubled

    def init(params, x, cond):
        return denoiser.init(params, *question(x, cond))

    def axes(carry):
        return batch_axes(denoiser, carry)

    def single_carry(carry, size):
        return map_axes(lambda axis, leaf: _rows(leaf, axis, size, 0), axes(carry), carry)

    def both(params, carry, x, step, cond):
        size = batch_size(x)
        key = None if step.key is None else jnp.repeat(step.key, 2, axis=0)
        doubled_step = step._replace(t=_double_time(step.t, size), t_next=_double_time(step.t_next, size), key=key)
        doubled_x, doubled_cond = question(x, cond)
        prediction, new = denoiser.apply(params, carry, doubled_x, doubled_step, doubled_cond)
        extras = prediction.extras
        main_extras, guide_extras = extras, extras
        if jax.tree.leaves(extras):
            single = single_carry(carry, size)
            like = jax.eval_shape(lambda: denoiser.apply(params, single, x, step, cond)[0].extras)
            where = {name: jax.tree.map(partial(_doubled_axis, name), extras[name], like[name]) for name in extras}
            main_extras, guide_extras = (
                map_axes(lambda axis, leaf, row=row: _rows(leaf, axis, size, row), where, extras) for row in (0, 1)
            )
        prediction = prediction._replace(extras={}, cost=cost_like(prediction.cost))
        first, second = (_half(prediction, row) for row in (0, 1))
        return first._replace(extras=main_extras), second._replace(extras=guide_extras), new

    def main(params, carry, x, step, cond):
        size = batch_size(x)
        prediction, new = denoiser.apply(params, single_carry(carry, size), x, step, cond)
        return prediction, map_axes(lambda axis, leaf, old: _replace_rows(old, leaf, axis, size), axes(new), new, carry)

    def renew(params, carry, x, cond):
        return init(params, x, cond)

    return Branches(denoiser, init, both, main, renew, axes)


def from_two_networks(main: Denoiser, guide: Denoiser, null: Any = None, guide_compute: Number = 1.0) -> Branches:
    """Two denoisers of the same process, with `params = {"main": ..., "guide": ...}`.

    null: when given, the guide gets this condition instead of the main one's.
    guide_compute: one forward pass of the guide in units of the main network's.
    """

    def of(params, name):
        if not isinstance(params, Mapping) or set(params) != {"main", "guide"}:
            raise InvalidInput("Guidance by a second network needs params={'main': ..., 'guide': ...}.")
        return params[name]

    def guide_condition(x, cond):
        return cond if null is None else null_condition(cond, null, batch_size(x))

    def init(params, x, cond):
        return {
            "main": main.init(of(params, "main"), x, cond),
            "guide": guide.init(of(params, "guide"), x, guide_condition(x, cond)),
        }

    def both(params, carry, x, step, cond):
        first, main_carry = main.apply(of(params, "main"), carry["main"], x, step, cond)
        second, guide_carry = guide.apply(of(params, "guide"), carry["guide"], x, step, guide_condition(x, cond))
        cost = Cost(second.cost.evaluations, guide_compute * second.cost.compute)
        return first, second._replace(cost=cost), {"main": main_carry, "guide": guide_carry}

    def only(params, carry, x, step, cond):
        prediction, main_carry = main.apply(of(params, "main"), carry["main"], x, step, cond)
        return prediction, {"main": main_carry, "guide": carry["guide"]}

    def renew(params, carry, x, cond):
        return {"main": carry["main"], "guide": guide.init(of(params, "guide"), x, guide_condition(x, cond))}

    def axes(carry):
        return {"main": batch_axes(main, carry["main"]), "guide": batch_axes(guide, carry["guide"])}

    alone = main._replace(
        init=lambda params, x, cond: main.init(of(params, "main"), x, cond),
        apply=lambda params, carry, x, step, cond: main.apply(of(params, "main"), carry, x, step, cond),
    )
    return Branches(alone, init, both, only, renew, axes)


def steered(
    branches: Branches,
    rule: Rule,
    scale: Scale,
    *,
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
) -> Denoiser:
    """Both predictions combined by `rule` where the scale requires both; the main prediction elsewhere.

    The guide is skipped, and not paid for, at steps where t lies outside of `interval` or where a neutral rule has
    scale 1, for every sample. A plain number is decided before compilation: without an interval no decision is
    compiled, and a neutral scale of 1 returns the main denoiser itself. Extras are those of the main prediction.
    """
    process = branches.alone.process
    check_scale("scale", scale)
    check_interval("interval", interval, interval_unit, process)
    fixed = is_static(scale)
    if fixed and rule.neutral and scale == 1:
        return branches.alone
    always = interval is None and (fixed or not rule.neutral)

    def init(params, x, cond):
        inner = branches.init(params, x, cond)
        stale = jnp.bool_(False) if jax.tree.leaves(inner) and not always else ()
        return SteeredCarry(inner, stale, rule.init(x))

    def apply(params, carry, x, step, cond):
        value = value_at(scale, step)
        mask = None if interval is None else inside(step.t, interval[0], interval[1], interval_unit, process)

        def both(carry):
            inner, stale, state = carry
            if not isinstance(stale, tuple):
                inner = jax.lax.cond(stale, lambda c: branches.renew(params, c, x, cond), lambda c: c, inner)
                stale = jnp.bool_(False)
            main, guide, inner = branches.both(params, inner, x, step, cond)
            combined, state = rule.combine(state, main, guide, value, x, step)
            x0, eps = combined.x0, combined.eps
            if mask is not None:
                x0, eps = each(_choose, main.x0, x0, main.x0, mask), each(_choose, main.x0, eps, main.eps, mask)
            cost = cost_like(main.cost + guide.cost)
            return Prediction(x0, eps, main.extras, cost), SteeredCarry(inner, stale, state)

        def one(carry):
            inner, stale, state = carry
            main, inner = branches.main(params, inner, x, step, cond)
            stale = stale if isinstance(stale, tuple) else jnp.bool_(True)
            return main._replace(cost=cost_like(main.cost)), SteeredCarry(inner, stale, state)

        if always:
            return both(carry)
        wanted = [] if mask is None else [_any(mask)]
        if rule.neutral and not fixed:
            wanted.append(_any(jax.tree.map(lambda v: v != 1, value)))
        return jax.lax.cond(jnp.all(jnp.stack(wanted)), both, one, carry)

    return Denoiser(init, apply, process, lambda carry: SteeredCarry(branches.axes(carry.inner), None, 0))


def _half(prediction, row):
    x0, eps = (jax.tree.map(lambda leaf: leaf[row::2], value) for value in (prediction.x0, prediction.eps))
    return prediction._replace(x0=x0, eps=eps)


def _choose(like, new, old, mask):
    return None if new is None else jnp.where(expand(mask, like), new, old)


def _any(tree):
    return jnp.any(jnp.stack([jnp.any(leaf) for leaf in jax.tree.leaves(tree)]))


def _per_sample_condition(cond, null, size):
    """The condition with every leaf that the two branches may not share per sample."""
    if not isinstance(cond, Mapping) or not cond:
        raise InvalidInput(
            f"Guidance needs a condition to guide towards, such as cond={{'label': ...}}; cond is {cond!r}."
        )

    def spread(leaf):
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf, (size,)) if leaf.ndim == 0 else leaf

    named = cond if callable(null) else null
    return {name: jax.tree.map(spread, value) if name in named else value for name, value in cond.items()}


def _interleave(main, guide, size):
    """The rows of both; a leaf that the null leaves alone and that is not B long is one for all samples, and stays."""
    if main is guide and np.shape(main)[:1] != (size,):
        return main
    if np.shape(main) != np.shape(guide):
        raise invalid("a shape in the null condition", np.shape(guide), f"it must be the condition's, {np.shape(main)}")
    pair = jnp.stack([jnp.asarray(main), jnp.asarray(guide)], axis=1)
    return pair.reshape(2 * size, *pair.shape[2:])


def _double_time(t, size):
    """Times of the doubled batch; the first axis of a time is the batch, or 1, which broadcasts and stays."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0) if jnp.ndim(leaf) and len(leaf) == size else leaf, t)


def _doubled_axis(name, doubled, single):
    """The axis of an extra that is twice as long for the doubled batch, or None where its shape is the same."""
    axes = [axis for axis, sizes in enumerate(zip(doubled.shape, single.shape)) if sizes[0] != sizes[1]]
    if not axes:
        return None
    if len(axes) > 1 or doubled.shape[axes[0]] != 2 * single.shape[axes[0]]:
        raise invalid(
            f"extras[{name!r}].shape", single.shape, f"one axis with the batch was expected; doubled: {doubled.shape}"
        )
    return axes[0]


def _paired(leaf, axis, size):
    """The batch axis of a leaf for 2B rows opened into (B, 2, what is merged with the batch); None if it broadcasts."""
    if leaf.ndim <= axis or leaf.shape[axis] == 1:
        return None
    if leaf.shape[axis] % (2 * size):
        raise InvalidInput(
            f"A leaf {list(leaf.shape)} of what a denoiser remembers has no batch of {2 * size} in axis {axis}, where "
            "its axes put it; name the axis, or None for what all samples share."
        )
    return leaf.reshape(*leaf.shape[:axis], size, 2, -1, *leaf.shape[axis + 1 :])


def _merged(leaf, axis):
    return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])


def _rows(leaf, axis, size, row):
    paired = _paired(leaf, axis, size)
    return leaf if paired is None else _merged(jax.lax.index_in_dim(paired, row, axis + 1, keepdims=False), axis)


def _replace_rows(old, new, axis, size):
    paired = _paired(old, axis, size)
    if paired is None:
        return new
    guide = jax.lax.index_in_dim(paired, 1, axis + 1, keepdims=False)
    return jnp.stack([new.reshape(guide.shape), guide], axis=axis + 1).reshape(old.shape)
