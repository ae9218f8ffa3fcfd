"""Two answers to one question, the second of which can be skipped: the engine under every form of guidance.

A `Branches` asks for both answers, or for the main one alone: in one doubled batch of one network
(`in_one_batch`), or from two networks (`from_two_networks`). `steered` combines them by a `Rule` where the scale asks
for it, and runs a single evaluation elsewhere, through a `lax.cond` on a scalar: it is a decision for the whole batch,
taken when no sample wants the second answer. The rules themselves are in `guidance`.

In the doubled batch the two rows of a sample are neighbours (2i main, 2i + 1 guide), so that a batch that is sharded
over devices is doubled where it lies, without communication.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.denoisers.conditions import null_condition
from diffusion_jax.denoisers.scales import Number, Scale, check_interval, check_scale, inside, is_static, value_at
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.time_axes import batch_size, each, expand
from diffusion_jax.typing import Cost, Denoiser, Prediction


class Branches(NamedTuple):
    """A main answer and a guide's.

    alone: the denoiser that gives the main answer only, with a carry of its own.
    init:  (params, x, cond) -> carry
    both:  (params, carry, x, step, cond) -> (main, guide, carry)
    main:  (params, carry, x, step, cond) -> (main, carry)           leaves the guide's part of the carry behind
    renew: (params, carry, x, cond) -> carry      a carry in which nothing left behind by `main` is trusted
    """

    alone: Denoiser
    init: Callable[..., Any]
    both: Callable[..., tuple[Prediction, Prediction, Any]]
    main: Callable[..., tuple[Prediction, Any]]
    renew: Callable[..., Any]


class Rule(NamedTuple):
    """How the two answers become one.

    init: (x) -> state, one entry per sample
    combine: (state, main, guide, scale, x, step) -> (Prediction, state); the cost and extras it returns are ignored
    neutral: whether scale 1 is the main answer, so that the guide need not be asked there
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
    """One network asked with the condition and with its null, as one batch of 2B rows.

    The carry is the denoiser's own for 2B rows. Which axis of a leaf (of the carry, or of the extras) holds the
    batch is read off from its shape for B and for 2B rows; a leaf with one shape for both is shared by the branches.
    After an answer without the guide the carry starts afresh, for every row: a cache is never read that was not
    written at the last call.
    """

    def question(x, cond):
        size = batch_size(x)
        main = _per_sample_condition(cond, null, size)
        guide = null_condition(main, null, size)
        doubled = jax.tree.map(lambda a, b: _interleave(a, b, size), main, guide)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), x), doubled

    def init(params, x, cond):
        return denoiser.init(params, *question(x, cond))

    def single_carry(params, carry, x, cond):
        if not jax.tree.leaves(carry):
            return carry
        shapes = jax.eval_shape(lambda: denoiser.init(params, x, cond))
        return jax.tree.map(lambda leaf, like: _rows(leaf, like, batch_size(x), 0), carry, shapes)

    def both(params, carry, x, step, cond):
        size = batch_size(x)
        key = None if step.key is None else jnp.repeat(step.key, 2, axis=0)
        doubled_step = step._replace(t=_double_time(step.t, size), t_next=_double_time(step.t_next, size), key=key)
        doubled_x, doubled_cond = question(x, cond)
        prediction, new = denoiser.apply(params, carry, doubled_x, doubled_step, doubled_cond)
        extras = prediction.extras
        main_extras, guide_extras = extras, extras
        if jax.tree.leaves(extras):
            single = single_carry(params, carry, x, cond)
            like = jax.eval_shape(lambda: denoiser.apply(params, single, x, step, cond)[0].extras)
            main_extras, guide_extras = (
                jax.tree.map(lambda leaf, like, row=row: _rows(leaf, like, size, row), extras, like) for row in (0, 1)
            )
        halves = [jax.tree.map(lambda leaf, row=row: leaf[row::2], (prediction.x0, prediction.eps)) for row in (0, 1)]
        cost = cost_like(prediction.cost)
        return Prediction(*halves[0], main_extras, cost), Prediction(*halves[1], guide_extras, cost), new

    def main(params, carry, x, step, cond):
        prediction, new = denoiser.apply(params, single_carry(params, carry, x, cond), x, step, cond)
        return prediction, jax.tree.map(lambda old, leaf: _replace_rows(old, leaf, batch_size(x)), carry, new)

    def renew(params, carry, x, cond):
        return init(params, x, cond)

    return Branches(denoiser, init, both, main, renew)


def from_two_networks(main: Denoiser, guide: Denoiser, null: Any = None, guide_compute: Number = 1.0) -> Branches:
    """Two denoisers of the same process, with `params = {"main": ..., "guide": ...}`.

    null: when given, the guide is asked with this condition instead of the main one's.
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

    alone = Denoiser(
        lambda params, x, cond: main.init(of(params, "main"), x, cond),
        lambda params, carry, x, step, cond: main.apply(of(params, "main"), carry, x, step, cond),
        main.process,
    )
    return Branches(alone, init, both, only, renew)


def steered(
    branches: Branches,
    rule: Rule,
    scale: Scale,
    *,
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
) -> Denoiser:
    """Both answers combined by `rule`, where the scale asks for it; the main answer elsewhere.

    The guide is skipped, and not paid for, at steps where t lies outside of `interval` or where a neutral rule has
    scale 1, for every sample. A plain number is decided before compilation: without an interval no decision is
    compiled, and a neutral scale of 1 returns the main denoiser itself. Extras are those of the main answer.
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
        mask = None if interval is None else inside(step.t, *interval, interval_unit, process)

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

    return Denoiser(init, apply, process)


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
    if main is guide and np.shape(main)[:1] != (size,):
        return main
    if np.shape(main) != np.shape(guide):
        raise invalid("a shape in the null condition", np.shape(guide), f"it must be the condition's, {np.shape(main)}")
    pair = jnp.stack([jnp.asarray(main), jnp.asarray(guide)], axis=1)
    return pair.reshape(2 * size, *pair.shape[2:])


def _double_time(t, size):
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0) if jnp.ndim(leaf) and len(leaf) == size else leaf, t)


def _paired(leaf, like, size):
    """Opens the batch axis of a leaf for 2B rows into (B, 2, what is merged with the batch); the axis, or None."""
    for axis, (doubled, single) in enumerate(zip(leaf.shape, like.shape, strict=True)):
        if doubled != single:
            shape = (*leaf.shape[:axis], size, 2, single // size, *leaf.shape[axis + 1 :])
            return leaf.reshape(shape), axis + 1
    return leaf, None


def _rows(leaf, like, size, row):
    paired, axis = _paired(leaf, like, size)
    return leaf if axis is None else jax.lax.index_in_dim(paired, row, axis, keepdims=False).reshape(like.shape)


def _replace_rows(old, new, size):
    paired, axis = _paired(old, new, size)
    if axis is None:
        return new
    guide = jax.lax.index_in_dim(paired, 1, axis, keepdims=False)
    return jnp.stack([new.reshape(guide.shape), guide], axis=axis).reshape(old.shape)
