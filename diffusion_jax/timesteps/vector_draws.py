"""Draws over frames, tokens or actions: times that are shared, mixed, ordered, pinned or taken from a plan.

Axis 1 of the shape `[B, N, ...]` is the one over which times are arranged. Distributions of a single t are in `draws`;
the plans with which one samples are in `plans`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.time_axes import expand
from diffusion_jax.timesteps.draws import fixed_draw
from diffusion_jax.timesteps.mapping import index_to_time
from diffusion_jax.typing import Number, Plan, TimestepDraw


def pinned(
    draw: TimestepDraw,
    entries: int | Sequence[bool] = 1,
    value: Number = 0.0,
    probability: Number = 1.0,
    weight: Number = 0.0,
) -> TimestepDraw:
    """Some entries have a given time: conditions are clean (value 0) or absent (value 1), the rest is drawn.

    entries: how many of the first frames or tokens (axis 1), or one boolean for each; for shapes `[B]` the example's
        only time.
    probability: share of the examples in which they are pinned.
    weight: loss weight of pinned entries; 0 leaves their loss out.
    """
    if not 0 <= value <= 1:
        raise invalid("value", value, "a time lies in [0, 1]")
    if not 0 <= probability <= 1:
        raise invalid("probability", probability, "it must lie in [0, 1]")
    if weight < 0:
        raise invalid("weight", weight, "it must not be negative")
    if isinstance(entries, int) and entries < 1:
        raise invalid("entries", entries, "at least one entry is pinned")

    def pattern(shape):
        if len(shape) < 2:
            return jnp.ones(shape, bool)
        if isinstance(entries, int):
            return jnp.arange(shape[1]) < entries
        if len(entries) != shape[1]:
            raise invalid("entries", tuple(entries), f"one boolean for each of the {shape[1]} frames is needed")
        return jnp.asarray(entries, bool)

    def drawn(state, key, shape):
        draw_key, choice_key = jax.random.split(key)
        t, drawn_weight = draw.draw(state, draw_key, shape)
        chosen = expand(jax.random.uniform(choice_key, shape[:1]) < probability, t)
        mask = pattern(shape)
        mask = chosen & (mask if len(shape) < 2 else mask.reshape((1, -1) + (1,) * (len(shape) - 2)))
        return jnp.where(mask, value, t), jnp.where(mask, weight, drawn_weight)

    return TimestepDraw(draw.init, drawn, draw.update)


def _axis1(shape):
    if len(shape) < 2:
        raise invalid(
            "shape", tuple(shape), "times shared or ordered over frames need a shape [B, F]; set t_shape to 2"
        )


def independent(draw: TimestepDraw) -> TimestepDraw:
    """Every frame has its own time (Chen et al. 2024, diffusion forcing): what draws do anyway, by name."""

    def drawn(state, key, shape):
        _axis1(shape)
        return draw.draw(state, key, shape)

    return TimestepDraw(draw.init, drawn, draw.update)


def blockwise(draw: TimestepDraw, block: int = 2) -> TimestepDraw:
    """Every block of so many neighbouring frames has its own time: diffusion forcing of block-causal networks.

    `independent` is a block of one frame, `shared` one of all. The blocks must divide the frames.
    """
    if block < 1:
        raise invalid("block", block, "at least one frame is needed")

    def drawn(state, key, shape):
        _axis1(shape)
        batch, count, *rest = shape
        if count % block:
            raise invalid("block", block, f"it must divide the {count} frames")
        t, weight = draw.draw(state, key, (batch, count // block, *rest))
        return jnp.repeat(t, block, axis=1), jnp.repeat(weight, block, axis=1)

    return TimestepDraw(draw.init, drawn, draw.update)


def shared(draw: TimestepDraw) -> TimestepDraw:
    """All frames of an example have one time."""

    def drawn(state, key, shape):
        _axis1(shape)
        like = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        t, weight = draw.draw(state, key, tuple(shape)[:1])
        return jnp.broadcast_to(expand(t, like), shape), jnp.broadcast_to(expand(weight, like), shape)

    return TimestepDraw(draw.init, drawn, draw.update)


def mixture(first: TimestepDraw, second: TimestepDraw, probability: Number = 0.5) -> TimestepDraw:
    """Each example is drawn from `first` with this probability, else from `second`.

    `mixture(independent(d), shared(d), 0.2)` is the probabilistic schedule of Liu et al. 2024 (FVDM). The state is the
    pair of both, and both learn from every loss.
    """
    if not 0 <= probability <= 1:
        raise invalid("probability", probability, "it must lie in [0, 1]")

    def init():
        return first.init(), second.init()

    def drawn(state, key, shape):
        first_key, second_key, choice_key = jax.random.split(key, 3)
        chosen = jax.random.uniform(choice_key, tuple(shape)[:1]) < probability
        t_a, weight_a = first.draw(state[0], first_key, shape)
        t_b, weight_b = second.draw(state[1], second_key, shape)
        chosen = expand(chosen, t_a)
        return jnp.where(chosen, t_a, t_b), jnp.where(chosen, weight_a, weight_b)

    def update(state, t, loss):
        return first.update(state[0], t, loss), second.update(state[1], t, loss)

    return TimestepDraw(init, drawn, update)


def monotone(draw: TimestepDraw) -> TimestepDraw:
    """Frames in order of noise: the drawn times of an example sorted along axis 1, the first frame the cleanest.

    Of independent uniform times that is the uniform distribution over non-decreasing sequences, in which the first
    frame is hardly ever noise; `anchored` sees to that. Weights move with their times.
    """

    def drawn(state, key, shape):
        _axis1(shape)
        t, weight = draw.draw(state, key, shape)
        order = jnp.argsort(t, axis=1)
        return jnp.take_along_axis(t, order, axis=1), jnp.take_along_axis(weight, order, axis=1)

    return TimestepDraw(draw.init, drawn, draw.update)


def anchored(num_steps: int | None = None) -> TimestepDraw:
    """Non-decreasing times along the frames, uniform given one of them: FoPP of AR-Diffusion (Sun et al. 2025).

    A frame `f*` and its time `t*` are uniform; the other frames are uniform over all sequences that rise through them:

        earlier frames = sorted iid U(0, t*),        later frames = sorted iid U(t*, 1)                            (1)

    so that every frame sees high and low noise, which `monotone` does not give. num_steps: T discrete times (k + 1) / T
    in place of [0, 1], uniform over the finitely many sequences: a non-decreasing sequence of n out of m levels is a
    random n-subset of m + n - 1, sorted, less 0 .. n - 1. Any T and number of frames; no tables of counts.
    """
    if num_steps is not None and num_steps < 1:
        raise invalid("num_steps", num_steps, "at least one time is needed")

    def continuous(key, rows, count):
        frame_key, time_key, other_key = jax.random.split(key, 3)
        anchor = jax.random.randint(frame_key, (rows, 1), 0, count)
        t = jax.random.uniform(time_key, (rows, 1))
        u = jax.random.uniform(other_key, (rows, count))
        frame = jnp.arange(count)
        # All that is earlier is smaller, so one sort orders both sides.
        return jnp.sort(jnp.where(frame == anchor, t, jnp.where(frame < anchor, t * u, t + (1.0 - t) * u)), axis=1)

    def discrete(key, rows, count, num_steps):
        def sequence(key):
            frame_key, level_key, before_key, after_key = jax.random.split(key, 4)
            frame = jax.random.randint(frame_key, (), 0, count)
            level = jax.random.randint(level_key, (), 0, num_steps)
            before = _rising(before_key, frame, level + 1, count)
            after = _rising(after_key, count - 1 - frame, num_steps - level, count)
            levels = jnp.concatenate([before, level[None], jnp.where(after < _NONE, level + after, _NONE)])
            return jnp.sort(levels)[:count]

        return index_to_time(jax.vmap(sequence)(jax.random.split(key, rows)), num_steps).astype(jnp.float32)

    def draw(key, shape):
        _axis1(shape)
        batch, count, *rest = shape
        rows = batch * int(np.prod(rest, dtype=int))
        times = continuous(key, rows, count) if num_steps is None else discrete(key, rows, count, num_steps)
        return jnp.moveaxis(times.reshape(batch, *rest, count), -1, 1)

    return fixed_draw(draw)


_NONE = 2**30


def _rising(key, number, levels, count):
    """A uniform non-decreasing sequence of `number < count` out of 0 .. levels - 1, then `_NONE`; `[count]`."""
    # Floyd's algorithm: a uniform subset without a list of what it is taken from.
    top = levels - 1 + jnp.arange(count)
    drawn = jax.random.randint(key, (count,), 0, top + 1)

    def add(i, chosen):
        value = jnp.where((chosen == drawn[i]).any(), top[i], drawn[i])
        return chosen.at[i].set(jnp.where(i < number, value, _NONE))

    chosen = jnp.sort(jax.lax.fori_loop(0, count, add, jnp.full((count,), _NONE, jnp.int32)))
    return jnp.where(jnp.arange(count) < number, chosen - jnp.arange(count), _NONE)


def on_rows(plan: Plan) -> TimestepDraw:
    """Each example has one row of a plan `[R + 1, 1, N]`, all but the last alike: exactly the times of a run.

    Entries at 0 have weight 0: there is nothing to predict. With `plans.chunk_staircase` these are the level vectors
    that a stream visits; `mixture(on_rows(plan), shared(uniform()), 0.8)` is the training of SDP (Høeg et al. 2024).
    """
    plan = jnp.asarray(plan, jnp.float32)
    if plan.ndim != 3 or plan.shape[0] < 2 or plan.shape[1] != 1:
        raise invalid("plan.shape", plan.shape, "a plan for the whole batch, [R + 1, 1, N], was expected")

    def drawn(state, key, shape):
        _axis1(shape)
        if shape[1] != plan.shape[2]:
            raise invalid(
                "plan.shape", plan.shape, f"times of the shape {tuple(shape)} need a plan of {shape[1]} entries"
            )
        rows = plan[jax.random.randint(key, shape[:1], 0, plan.shape[0] - 1), 0]
        t = jnp.broadcast_to(expand(rows, jax.ShapeDtypeStruct(tuple(shape), jnp.float32)), shape)
        return t, (t > 0).astype(jnp.float32)

    return TimestepDraw(lambda: (), drawn, lambda state, t, loss: state)
