"""Clips that are longer than what a network sees: a sliding window, a chain of chunks, block after block.

A window slides over a long clip whose frames follow each other in a staircase. A chain gives each chunk the last frames
of the one before. Causal networks finish block after block and keep the keys of what is clean.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from diffusion_jax import randomness
from diffusion_jax.clock import as_grid, clock, network_inputs, num_steps, to_prediction
from diffusion_jax.errors import invalid
from diffusion_jax.models.incremental import Incremental
from diffusion_jax.sampling import Loop, Run, Samples, one_step, sample
from diffusion_jax.solvers import inpainted
from diffusion_jax.streaming.entries import by_entry, check_entries
from diffusion_jax.time_axes import batch_size
from diffusion_jax.timesteps import plans
from diffusion_jax.typing import NO_COST, Condition, Denoiser, Grid, HostData, Params, Process, Solver, Times


def sample_windowed(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    solver: Solver,
    plan: Grid,
    window: int,
    *,
    x_init: HostData,
    starts: ArrayLike | Sequence[int] | None = None,
    cond: Condition | Callable[[Array], Condition] = None,
    index: Int[Array | np.ndarray, " B"] | None = None,
) -> Samples:
    """`sample` of a clip that is longer than what the network sees: at each step a window of frames (Sun et al. 2025).

    plan: `[K + 1, 1, N]`, usually a `staircase`; the denoiser is evaluated on `x[:, start : start + window]` at its
        times. x_init: `[B, N, ...]`, `noised_start` of the plan (its prior where everything is generated).
    starts: `[K]`, the first frame of the window at each step; `timesteps.windows(plan, window)` when absent, which
        needs a plan whose values are known.
    cond: the condition, or a function of the start for what is told by frame.

    Frames outside of the window stay as they are, and so does what the solver remembers of them; what the denoiser
    remembers is begun anew when the window moves. A window over all frames is `sample`. One evaluation of the window a
    step: S + (N - 1) width for a staircase. Raises InvalidInput for a window that leaves frames which still move.
    """
    plan = as_grid(plan)
    if starts is None:
        starts = plans.windows(plan, window)
    starts, steps = jnp.asarray(starts, jnp.int32), num_steps(plan)
    if starts.shape != (steps,):
        raise invalid(
            "starts.shape", starts.shape, f"the first frame of the window at each of the {steps} steps was expected"
        )
    frames = plan.shape[2]
    check_entries(x_init, frames)
    process = denoiser.process
    keys = randomness.sample_keys(key, jnp.arange(batch_size(x_init)) if index is None else index)
    whole_clock = clock(plan).with_keys(keys)

    def told(start):
        return cond(start) if callable(cond) else cond

    def cut(leaf, start, axis=1):
        return jax.lax.dynamic_slice_in_dim(leaf, start, window, axis)

    def paste(leaf, part, start, axis=1):
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis)

    def body(carry, row):
        whole, last = carry
        start = starts[row]
        x = jax.tree.map(lambda leaf: cut(leaf, start), whole.x)
        state = by_entry(solver, frames, lambda leaf, axis: cut(leaf, start, axis), whole.state)
        begun = denoiser.init(params, x, told(start))
        inner = jax.tree.map(lambda old, new: jnp.where(start == last, old, new), whole.carry, begun)
        step = whole_clock.step(row)
        t, t_next, left = (cut(leaf, start) for leaf in (step.t, step.t_next, step.remaining))
        loop = Loop(denoiser, params, solver, whole_clock, told(start))
        run = Run(x, state, inner, whole.cost)
        run = one_step(loop, run, step._replace(t=t, t_next=t_next, remaining=left))
        x = jax.tree.map(lambda leaf, part: paste(leaf, part, start), whole.x, run.x)
        state = by_entry(solver, frames, lambda new, old, axis: paste(old, new, start, axis), run.state, whole.state)
        return (Run(x, state, run.carry, run.cost), start), None

    first = jax.tree.map(lambda leaf: cut(leaf, starts[0]), x_init)
    run = Run(x_init, solver.init(process, x_init, plan), denoiser.init(params, first, told(starts[0])))
    (run, _), _ = jax.lax.scan(body, (run, starts[0]), jnp.arange(steps))
    return Samples(run.x, None, run)


def sample_chained(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    solver: Solver,
    grid: Times,
    *,
    shape: tuple[int, ...],
    chunks: int,
    overlap: int,
    level: float = 0.0,
    replaced: bool = False,
    context: Array | np.ndarray | None = None,
    cond: Condition = None,
    index: Int[Array | np.ndarray, " B"] | None = None,
) -> Samples:
    """A long clip chunk by chunk: each begins with the last `overlap` frames of the one before (Liu et al. 2024, FVDM).

    shape: of one chunk, `(B, F, ...)`. grid: `[S + 1]`.
    chunks: how many are generated, of F - overlap new frames each (the first of F when there is no context).
    level: the multiplier of the overlapping frames, see `multiplied`: 0 keeps them clean; a little noise lets the
        network look at them less closely. Frames that were made are never changed.
    replaced: instead, all frames of a chunk run along the grid together, and the overlapping ones are replaced at each
        step by themselves, noised: all that a network of one time a clip can do (`solvers.inpainted`).
    context: `[B, overlap, ...]` frames to go on from.

    x is `[B, overlap + chunks (F - overlap), ...]`, the context included. Chunk c draws as
    `sample(fold_in(key, c), ...)`. Costs S evaluations a chunk.
    """
    frames = shape[1]
    if not 1 <= overlap < frames:
        raise invalid("overlap", overlap, f"it must lie in 1 .. {frames - 1}: less than a chunk of {frames} frames")
    if chunks < 1:
        raise invalid("chunks", chunks, "at least one is generated")
    if context is not None and jnp.shape(context) != (shape[0], overlap, *shape[2:]):
        raise invalid("context.shape", jnp.shape(context), f"{(shape[0], overlap, *shape[2:])} was expected")
    index = jnp.arange(shape[0]) if index is None else index
    past = np.arange(frames) < overlap
    again = plans.multiplied(grid, np.where(past & (not replaced), level, 1.0))
    first = again if context is not None else plans.synchronous(grid, frames)

    def body(carry, number):
        known, plan, cost = carry
        own = jax.random.fold_in(key, number)
        x_init = plans.noised_start(own, denoiser.process, plan, known, index)
        mask = jnp.broadcast_to(past & ((number > 0) | (context is not None)), shape[:2])
        held = inpainted(solver, known, mask) if replaced else solver
        result = sample(own, denoiser, params, held, plan, x_init=x_init, cond=cond, index=index)
        handed = jnp.zeros_like(known).at[:, :overlap].set(result.x[:, frames - overlap :])
        return (handed, again, cost + result.cost), result.x

    known = jnp.zeros(shape) if context is None else jnp.zeros(shape).at[:, :overlap].set(context)
    (_, _, cost), made = jax.lax.scan(body, (known, first, NO_COST), jnp.arange(chunks))
    new = jnp.moveaxis(made[:, :, overlap:], 0, 1)
    new = new.reshape(shape[0], -1, *shape[2:])
    x = jnp.concatenate([made[0, :, :overlap], new], axis=1)
    return Samples(x, None, Run(x, cost=cost))


def sample_autoregressive(
    key: Key[Array, ""],
    step: Incremental,
    process: Process,
    params: Params,
    solver: Solver,
    grid: Times,
    *,
    x_init: Array | np.ndarray,
    block: int = 1,
    cond: Condition = None,
    index: Int[Array | np.ndarray, " B"] | None = None,
) -> Samples:
    """Block after block along `grid [S + 1]`, each of which sees the keys and values of the clean ones before it.

    The staircase of width S (one block after the other) for 1 / N of its compute: what is finished is read once more,
    at time 0, and then only remembered. With a deterministic solver it is that staircase up to rounding.

    step: `models.incremental(network, window)`, with a window of the blocks that a frame is to see. x_init: the noise
    of the whole clip, `[B, N block, H, W, C]`. Block i draws as `sample(fold_in(key, i), ...)`. S + 1 evaluations of a
    block each, which is what the cost counts.
    """
    size, frames = x_init.shape[:2]
    if block < 1 or frames % block:
        raise invalid("block", block, f"blocks must divide the {frames} frames of x_init")
    index = jnp.arange(size) if index is None else index
    parts = jnp.moveaxis(x_init.reshape(size, frames // block, block, *x_init.shape[2:]), 1, 0)

    def read(cache, x, t):
        output, _, kept = step.apply(params, cache, *network_inputs(process, x, t), cond)
        return to_prediction(process, output, x, t, {}), kept

    def body(carry, entry):
        cache, cost = carry
        number, noise = entry

        def apply(params, carry, x, at, cond):
            return read(cache, x, at.t)[0], carry

        seeing = Denoiser(lambda params, x, cond: (), apply, process)
        made = sample(jax.random.fold_in(key, number), seeing, params, solver, grid, x_init=noise, index=index)
        last, kept = read(cache, made.x, 0.0)
        return (step.push(cache, kept), cost + made.cost + last.cost), made.x

    begun = step.init(params, parts[0], cond), NO_COST
    (_, cost), made = jax.lax.scan(body, begun, (jnp.arange(frames // block), parts))
    x = jnp.moveaxis(made, 0, 1).reshape(x_init.shape)
    return Samples(x, None, Run(x, cost=cost))
