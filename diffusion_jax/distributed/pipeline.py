"""The timestep pipeline: every device of a mesh axis owns one noise level, and blocks of data pass from level to level.

A stage is one step at one level. It may keep something there from block to block (keys and values of the past at that
level), but sees nothing of other levels, so all levels can work at once on different blocks (Live Avatar). Here are the
order of the work, the same on one device and on many, and the sequential schedule that it equals. Nothing here knows
networks, denoisers or solvers; `pipelined` makes stages of those.

    stage(params, carry, x, level, cond, index) -> (x, carry)                                                      (1)

level: int32, 0 for the first step (of pure noise) .. T - 1 for the last. carry: what that level keeps. x, cond: one
block, any pytrees; index: its number in the stream, int32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from diffusion_jax.distributed.mesh import automatic
from diffusion_jax.errors import invalid, unknown

NOTHING = -1
"""The index of a bubble: no block."""


class Flight(NamedTuple):
    """A pipeline between two ticks, a pytree whose leaves have a first axis of T levels.

    carry: what each level keeps. x: what each level has made of its block. cond, index: of that block.
    """

    carry: Any
    x: Any
    cond: Any
    index: Any


class TimestepPipeline(NamedTuple):
    """A pipeline as pure functions, to be jitted by the caller.

    init: (carry, x, cond=None) -> Flight                                     empty, for blocks like x and cond
    advance: (params, flight, x [n, ...], cond [n, ...], index [n]) -> (flight, x [n, ...], index [n])
                                                                              n ticks: at each one block enters (or
                                                                              `NOTHING`) and one leaves (or nothing)
    run: (params, carry, x [M, ...], cond [M, ...]=None, start=0) -> (x [M, ...], carry)
                                                                              M blocks in `ticks(M)` ticks
    ticks: (M) -> M + T - 1: at tick i level k works on block i - k; the last block leaves with the last tick
    """

    init: Callable[..., Flight]
    advance: Callable[..., tuple[Flight, Any, Any]]
    run: Callable[..., tuple[Any, Any]]
    ticks: Callable[[int], int]


def sequential(stage: Callable, levels: int) -> Callable:
    """The schedule that a pipeline equals: `run(params, carry, x, cond=None, start=0) -> (x, carry)`.

    Block after block, each through all levels: M T evaluations one after the other.
    """

    def run(params, carry, x, cond=None, start=0):
        def block(carry, entry):
            x, cond, index = entry

            def one(x, own):
                level, carry = own
                return stage(params, carry, x, level, cond, index)

            x, carry = jax.lax.scan(one, x, (jnp.arange(levels), carry))
            return carry, x

        carry, x = jax.lax.scan(block, carry, (x, cond, start + jnp.arange(_count(x))))
        return x, carry

    return run


def timestep_pipeline(
    stage: Callable, levels: int, *, mesh: Mesh | None = None, axis: str = "pipe", batched: bool = False
) -> TimestepPipeline:
    """All T = `levels` stages at work at once, each on a block of its own; equal to `sequential`.

    stage: see (1); in a bubble it does not run, and nothing that a level keeps is changed.
    mesh: device k of `axis` owns level k, its carry and a copy of the parameters, and sends its block on to device
        k + 1 (`shard_map` and `ppermute` in one `lax.scan` over ticks). Other axes of the mesh are left to the
        compiler: a batch that is sharded along them stays so. None runs the same ticks on one device, one level after
        the other, or (batched) as one batch: then stages run in bubbles too, to no effect.

    Throughput is one block a tick, whatever T; the first block takes T ticks as ever. A stream without an end calls
    `advance` with what enters. A caller who changes what levels keep according to an early block (a sink) runs that
    block alone first: M + 2 (T - 1) ticks in all.
    Raises InvalidInput for an axis that the mesh lacks, and if it does not have T devices.
    """
    if levels < 1:
        raise invalid("levels", levels, "it must be at least 1")
    if mesh is not None:
        if axis not in mesh.axis_names:
            raise unknown("axis", axis, mesh.axis_names)
        if mesh.shape[axis] != levels:
            raise invalid(f"mesh.{axis}", mesh.shape[axis], f"one device a level is needed, {levels}")
        mesh = automatic(mesh)

    def guarded(params, carry, x, level, cond, index):
        def work(carry, x):
            made, new = stage(params, carry, x, level, cond, index)
            return jax.tree.map(lambda a, b: a.astype(b.dtype), (new, made), (carry, x))

        return jax.lax.cond(index != NOTHING, work, lambda carry, x: (carry, x), carry, x)

    def entered(old, new):
        """What levels 0 .. T - 1 work on next: the new block, and what each level before has."""
        return jax.tree.map(lambda old, new: jnp.concatenate([new[None].astype(old.dtype), old[:-1]]), old, new)

    def here(params, flight, x, cond, index):
        def tick(flight, entry):
            x, cond, index = (entered(old, new) for old, new in zip(flight[1:], entry))
            own = (flight.carry, x, jnp.arange(levels), cond, index)
            if batched:
                carry, x = jax.vmap(partial(guarded, params))(*own)
            else:
                _, (carry, x) = jax.lax.scan(lambda _, own: (None, guarded(params, *own)), None, own)
            return Flight(carry, x, cond, index), (jax.tree.map(lambda leaf: leaf[-1], x), index[-1])

        flight, (x, index) = jax.lax.scan(tick, flight, (x, cond, index))
        return flight, x, index

    def on_device(params, flight, xs, conds, indices):
        level = jax.lax.axis_index(axis)
        onward = [(i, i + 1) for i in range(levels - 1)]
        own = jax.tree.map(lambda leaf: leaf[0], (flight.carry, flight.x))

        def tick(state, entry):
            (carry, x), cond, index = state
            received = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, onward), x) if onward else x
            x = jax.tree.map(lambda new, got: jnp.where(level == 0, new.astype(got.dtype), got), entry[0], received)
            # Conditions are small and known beforehand: each device has those of all blocks in flight.
            cond, index = entered(cond, entry[1]), entered(index, entry[2])
            carry, x = guarded(params, carry, x, level, jax.tree.map(lambda leaf: leaf[level], cond), index[level])
            return ((carry, x), cond, index), (x, index[-1])

        (own, cond, index), (x, out) = jax.lax.scan(tick, (own, flight.cond, flight.index), (xs, conds, indices))
        carry, last = jax.tree.map(lambda leaf: leaf[None], own)
        return Flight(carry, last, cond, index), jax.tree.map(lambda leaf: leaf[None], x), out

    def across(params, flight, x, cond, index):
        split = Flight(P(axis), P(axis), P(), P())
        mapped = jax.shard_map(
            on_device, mesh=mesh, in_specs=(P(), split, P(), P(), P()), out_specs=(split, P(axis), P()),
            axis_names={axis}, check_vma=False,
        )  # fmt: skip
        flight, x, index = mapped(params, flight, x, cond, index)
        return flight, jax.tree.map(lambda leaf: leaf[-1], x), index

    def init(carry, x, cond=None):
        x, cond = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (levels, *jnp.shape(leaf))), (x, cond))
        return Flight(carry, x, cond, jnp.full((levels,), NOTHING))

    advance = here if mesh is None else across

    def run(params, carry, x, cond=None, start=0):
        def lengthened(leaf):
            return jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (levels - 1, *leaf.shape[1:]))])

        count = _count(x)
        flight = init(carry, *jax.tree.map(lambda leaf: leaf[0], (x, cond)))
        index = jnp.concatenate([start + jnp.arange(count), jnp.full((levels - 1,), NOTHING)])
        x, cond = jax.tree.map(lengthened, (x, cond))
        flight, x, _ = advance(params, flight, x, cond, index)
        return jax.tree.map(lambda leaf: leaf[levels - 1 :], x), flight.carry

    return TimestepPipeline(init, advance, run, lambda blocks: blocks + levels - 1)


def _count(x):
    return jax.tree.leaves(x)[0].shape[0]
