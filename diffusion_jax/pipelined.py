"""Stages of the timestep pipeline (`distributed.pipeline`) from denoisers and solvers: level k makes step k of a grid.

With `denoising_stage` blocks are batches that have nothing to do with each other, each one the run of `sample`. With
`caching_stage` a level keeps what its denoiser carries, the keys and values of past blocks at that level: a causal
video network then streams a clip without an end, every level at work on another block (Live Avatar).

    pipeline = timestep_pipeline(caching_stage(denoiser, solver, grid), T, mesh=mesh)
    blocks = noise_blocks(key, denoiser, params, solver, grid, shape=(B, block, H, W, C), blocks=M)
    made, caches = pipeline.run(params, at_each_level(denoiser.init(params, x, cond), T), blocks, conds)
    made.run.x                                                                       # [M, B, block, H, W, C]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffusion_jax import randomness
from diffusion_jax.clock import as_grid, clock, network_inputs, num_steps, to_prediction
from diffusion_jax.errors import invalid
from diffusion_jax.models.incremental import Incremental, KVCache
from diffusion_jax.sampling import Loop, Run, initialised, one_step
from diffusion_jax.typing import Denoiser, Grid, Params, Solver


class BlockRun(NamedTuple):
    """What passes from level to level: the run so far, and the keys of its samples `[B]`.

    With `caching_stage` the run's carry is empty, for it stays at the level.
    """

    run: Run
    keys: Any


def noise_blocks(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    solver: Solver,
    grid: Grid,
    *,
    shape: tuple[int, ...],
    blocks: int,
    cond: Any = None,
    index: Any = None,
    first: Any = 0,
    cached: bool = True,
) -> BlockRun:
    """The blocks `first` .. `first + blocks - 1` of a stream as they enter, leaves `[M, ...]`.

    Block i begins as `sample(fold_in(key, i), ..., shape=shape, index=index)` does. shape: of one block, batch
    included. cached: for `caching_stage`; False gives each block the denoiser's carry, begun with `cond [M, ...]`.
    """
    ticks = _clock(grid)
    index = jnp.arange(shape[0]) if index is None else jnp.asarray(index)

    def begin(entry):
        number, own = entry
        keys = randomness.sample_keys(jax.random.fold_in(key, number), index)
        run = Run(denoiser.process.prior(randomness.prior_key(keys), shape), carry=() if cached else None)
        return BlockRun(initialised(Loop(denoiser, params, solver, ticks, own), run), keys)

    return jax.lax.map(begin, (first + jnp.arange(blocks), cond))


def denoising_stage(denoiser: Denoiser, solver: Solver, grid: Grid) -> Callable:
    """Step `level` of `grid [T + 1, *t_shape]`; all that is remembered passes on with the block, levels keep nothing.

    Block i leaves as `sample(fold_in(key, i), denoiser, params, solver, grid, ...)` ends, whatever the solver.
    """
    make = _step(denoiser, solver, grid)

    def stage(params, carry, block, level, cond, index):
        return make(params, block, level, cond), carry

    return stage


def caching_stage(denoiser: Denoiser, solver: Solver, grid: Grid) -> Callable:
    """Step `level` of `grid [T + 1, *t_shape]`; what the denoiser carries stays at the level, from block to block.

    For denoisers such as `kv_cached`. A solver should evaluate once a step: each evaluation is one block to the cache.
    """
    make = _step(denoiser, solver, grid)

    def stage(params, carry, block, level, cond, index):
        block = make(params, block._replace(run=block.run._replace(carry=carry)), level, cond)
        return block._replace(run=block.run._replace(carry=())), block.run.carry

    return stage


def decoding_stage(stage: Callable, levels: int, decode: Callable[[Any], Any]) -> Callable:
    """`stage` with one level more, `levels`, whose device decodes what the others have finished.

    Blocks are pairs `(BlockRun, shown)`: `shown`, of the shape of `decode(x)` and of any content before, becomes that.
    """

    def whole(params, carry, x, level, cond, index):
        block, shown = x

        def step():
            made, kept = stage(params, carry, block, level, cond, index)
            return (made, shown), kept

        return jax.lax.cond(level < levels, step, lambda: ((block, decode(block.run.x)), carry))

    return whole


def kv_cached(step: Incremental, process: Any, sink_at: Any = None) -> Denoiser:
    """A causal video network, block by block, as a denoiser: its carry is the cache, to which it adds what it is shown.

    A cache belongs to one noise level: a block at t sees the past blocks as they were at t, and reference frames
    (`cond["reference"]`, when the carry is begun) as they are. sink_at: see `models.incremental`.
    """

    def init(params, x, cond):
        return step.init(params, x, cond)

    def apply(params, carry, x, at, cond):
        output, extras, kept = step.apply(params, carry, *network_inputs(process, x, at.t), cond, sink_at)
        return to_prediction(process, output, x, at.t, extras), step.push(carry, kept)

    return Denoiser(init, apply, process, lambda carry: KVCache(1, 1, None))


def rollout(denoiser: Denoiser, solver: Solver, grid: Grid, history: float | None = None) -> Callable:
    """Blocks one after the other, as a stream makes them, differentiable: what a causal student is trained on.

        run(params, carry, blocks [M, ...], cond [M, ...]=None, exit=T - 1) -> (x0 [M, ...], carry)

    blocks: of `noise_blocks`. Each takes the levels 0 .. exit (a traced integer) of `grid [T + 1, *t_shape]`; the
    prediction of x0 at the last of them is the result, and only that evaluation passes gradients to `params`. What is
    remembered passes none (Huang et al. 2025, self forcing). With all levels it is what the stream shows.
    history: None: each level remembers blocks as it saw them, noisy, and carry is that of `at_each_level`: then this is
        `sequential(caching_stage(...))` (Live Avatar: timestep forcing, and history corrupt as no block is seen again).
        A time: all levels share one carry, to which every finished block is shown once more, corrupted to that time: 0
        for a clean cache, which costs one evaluation more a block.

    Raises InvalidInput for a time outside of [0, 1].
    """
    if history is not None and not 0 <= history <= 1:
        raise invalid("history", history, "a time in [0, 1] is needed, or None for a history of each level")
    make, ticks, process = _step(denoiser, solver, grid), _clock(grid), denoiser.process
    own_levels = history is None

    def recalled(carry, level):
        return jax.tree.map(lambda leaf: leaf[level], carry) if own_levels else carry

    def remembered(carry, level, new):
        return jax.tree.map(lambda leaf, one: leaf.at[level].set(one), carry, new) if own_levels else carry

    def run(params, carry, blocks, cond=None, exit=None):
        exit = jnp.int32(num_steps(ticks.grid) - 1 if exit is None else exit)
        frozen = jax.lax.stop_gradient(params)

        def block(carry, entry):
            block, own = entry

            def earlier(level, state):
                block, carry = state
                block = block._replace(run=block.run._replace(carry=recalled(carry, level)))
                made = make(frozen, block, level, own)
                return made._replace(run=made.run._replace(carry=())), remembered(carry, level, made.run.carry)

            block, carry = jax.lax.fori_loop(0, exit, earlier, (block, carry))
            last = ticks.with_keys(block.keys).step(exit)
            prediction, new = denoiser.apply(params, recalled(carry, exit), block.run.x, last, own)
            if own_levels:
                return remembered(carry, exit, jax.lax.stop_gradient(new)), prediction.x0
            again = jnp.asarray(history, ticks.grid.dtype)
            x, _ = process.corrupt(randomness.corruption_key(block.keys), jax.lax.stop_gradient(prediction.x0), again)
            _, carry = denoiser.apply(frozen, carry, x, last._replace(t=again, t_next=again), own)
            return carry, prediction.x0

        carry, x0 = jax.lax.scan(block, carry, (blocks, cond))
        return x0, carry

    return run


def blocks_of(clip: Any, block: int) -> Any:
    """A clip `[B, F, ...]` as blocks `[F / block, B, block, ...]`."""
    return jnp.moveaxis(clip.reshape(clip.shape[0], -1, block, *clip.shape[2:]), 1, 0)


def clip_of(blocks: Any) -> Any:
    """Blocks `[M, B, block, ...]` as a clip `[B, M block, ...]`."""
    clip = jnp.moveaxis(jnp.asarray(blocks), 0, 1)
    return clip.reshape(clip.shape[0], -1, *clip.shape[3:])


def at_each_level(carry: Any, levels: int) -> Any:
    """The same carry at each of T levels: leaves `[T, ...]`."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (levels, *jnp.shape(leaf))), carry)


def _step(denoiser, solver, grid):
    ticks = _clock(grid)

    def make(params, block, level, cond):
        loop = Loop(denoiser, params, solver, ticks.with_keys(block.keys), cond)
        return BlockRun(one_step(loop, block.run, loop.clock.step(level)), block.keys)

    return make


def _clock(grid):
    if isinstance(grid, dict):
        raise invalid("grid", sorted(grid), "a pipeline has one grid for all data, [T + 1, *t_shape]")
    return clock(as_grid(grid))
