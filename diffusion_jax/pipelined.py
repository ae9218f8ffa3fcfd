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

from diffusion_jax import randomness
from diffusion_jax.errors import invalid
from diffusion_jax.models.incremental import Incremental
from diffusion_jax.sampling import Run, check_grid, one_step
from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Cost, Denoiser, Solver, Step


class Block(NamedTuple):
    """What passes from level to level: the run so far, and the keys of its samples `[B]`.

    With `caching_stage` the run's carry is empty, for it stays at the level.
    """

    run: Run
    keys: Any


def noise_blocks(
    key: Any,
    denoiser: Denoiser,
    params: Any,
    solver: Solver,
    grid: Any,
    *,
    shape: Any,
    blocks: int,
    cond: Any = None,
    index: Any = None,
    first: Any = 0,
    cached: bool = True,
) -> Block:
    """The blocks `first` .. `first + blocks - 1` of a stream as they enter, leaves `[M, ...]`.

    Block i begins as `sample(fold_in(key, i), ..., shape=shape, index=index)` does. shape: of one block, batch
    included. cached: for `caching_stage`; False gives each block the denoiser's carry, begun with `cond [M, ...]`.
    """
    grid = _checked(grid)
    index = jnp.arange(shape[0]) if index is None else jnp.asarray(index)

    def begin(entry):
        number, own = entry
        keys = randomness.sample_keys(jax.random.fold_in(key, number), index)
        x = denoiser.process.prior(randomness.fold(keys, 0), shape)
        carry = () if cached else denoiser.init(params, x, own)
        nothing = Cost(jnp.float32(0), jnp.float32(0))
        return Block(Run(x, solver.init(denoiser.process, x, grid), carry, nothing), keys)

    return jax.lax.map(begin, (first + jnp.arange(blocks), cond))


def denoising_stage(denoiser: Denoiser, solver: Solver, grid: Any) -> Callable:
    """Step `level` of `grid [T + 1, *t_shape]`; all that is remembered passes on with the block, levels keep nothing.

    Block i leaves as `sample(fold_in(key, i), denoiser, params, solver, grid, ...)` ends, whatever the solver.
    """
    make = _step(denoiser, solver, grid)

    def stage(params, carry, block, level, cond, index):
        return make(params, block, level, cond), carry

    return stage


def caching_stage(denoiser: Denoiser, solver: Solver, grid: Any) -> Callable:
    """Step `level` of `grid [T + 1, *t_shape]`; what the denoiser carries stays at the level, from block to block.

    For denoisers such as `cached`. A solver should evaluate once a step: each evaluation is one block to the cache.
    """
    make = _step(denoiser, solver, grid)

    def stage(params, carry, block, level, cond, index):
        block = make(params, block._replace(run=block.run._replace(carry=carry)), level, cond)
        return block._replace(run=block.run._replace(carry=())), block.run.carry

    return stage


def cached(step: Incremental, process: Any, sink_at: Any = None) -> Denoiser:
    """A causal video network, block by block, as a denoiser: its carry is the cache, to which it adds what it is shown.

    A cache belongs to one noise level: a block at t sees the past blocks as they were at t, and reference frames
    (`cond["reference"]`, when the carry is begun) as they are. sink_at: see `models.incremental`.
    """

    def init(params, x, cond):
        return step.init(params, x, cond)

    def apply(params, carry, x, at, cond):
        t = fill(at.t, x)
        output, extras, kept = step.apply(
            params, carry, process.network_input(x, t), process.network_time(t), cond, sink_at
        )
        prediction = process.predict(output, x, t)
        prediction = prediction._replace(extras=extras, cost=Cost(jnp.float32(1), jnp.float32(1)))
        return prediction, step.push(carry, kept)

    return Denoiser(init, apply, process)


def at_each_level(carry: Any, levels: int) -> Any:
    """The same carry at each of T levels: leaves `[T, ...]`."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (levels, *jnp.shape(leaf))), carry)


def _step(denoiser, solver, grid):
    grid = _checked(grid)
    levels = grid.shape[0] - 1
    remaining = jnp.cumsum((grid[1:] != grid[:-1])[::-1], axis=0, dtype=jnp.int32)[::-1]

    def make(params, block, level, cond):
        # As in `sample`: streams 1 and 2 of a sample are the solver's and the denoiser's.
        keys, denoiser_keys = randomness.fold(block.keys, 1), randomness.fold(block.keys, 2)
        step = Step(level, grid[level], grid[level + 1], jnp.int32(levels), remaining[level], denoiser_keys)
        run = one_step(denoiser, params, solver, block.run, step, randomness.fold(keys, level), cond)
        return Block(run, block.keys)

    return make


def _checked(grid):
    if isinstance(grid, dict):
        raise invalid("grid", sorted(grid), "a pipeline has one grid for all data, [T + 1, *t_shape]")
    grid = jnp.asarray(grid, jnp.result_type(float))
    check_grid(grid)
    return grid
