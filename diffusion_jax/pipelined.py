"""Stages of the timestep pipeline (`distributed.pipeline`) from denoisers and solvers: level k makes step k of a grid.

With `denoising_stage` blocks are batches that have nothing to do with each other, each one the run of `sample`. With
`caching_stage` a level keeps what its denoiser carries, the keys and values of past blocks at that level: a causal
video network then streams a clip without an end, every level at work on another block (`streaming.in_flight`).

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
from diffusion_jax.clock import as_grid, clock
from diffusion_jax.errors import invalid
from diffusion_jax.sampling import Loop, Run, initialised, one_step
from diffusion_jax.typing import Denoiser, Params, Solver, Times


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
    grid: Times,
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


def denoising_stage(denoiser: Denoiser, solver: Solver, grid: Times) -> Callable:
    """Step `level` of `grid [T + 1, *t_shape]`; all that is remembered passes on with the block, levels keep nothing.

    Block i leaves as `sample(fold_in(key, i), denoiser, params, solver, grid, ...)` ends, whatever the solver.
    """
    make = _step(denoiser, solver, grid)

    def stage(params, carry, block, level, cond, index):
        return make(params, block, level, cond), carry

    return stage


def caching_stage(denoiser: Denoiser, solver: Solver, grid: Times) -> Callable:
    """Step `level` of `grid [T + 1, *t_shape]`; what the denoiser carries stays at the level, from block to block.

    For denoisers such as `streaming.kv_cached`. A solver should evaluate once a step: each evaluation is one block to
    the cache.
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
