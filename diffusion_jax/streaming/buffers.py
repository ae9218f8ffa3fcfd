"""Rolling buffers: entries (actions, frames) at rising noise levels; each call finishes the first chunk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax import randomness
from diffusion_jax.clock import as_grid, clock, remaining
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import Loop, Run, initialised, one_step
from diffusion_jax.streaming.entries import by_entry, check_entries
from diffusion_jax.time_axes import batch_size, where
from diffusion_jax.timesteps import plans
from diffusion_jax.typing import Denoiser, Solver, Times


class Stream(NamedTuple):
    """A rolling buffer between two calls, a pytree; its x rests at the stationary levels.

    run: x `[B, N, ...]`, the solver's state, and the cost so far (the denoiser's carry is begun anew at each call).
    calls: how many calls were made. key, index: of the stream, and the global index of each sample `[B]`.
    """

    run: Run
    calls: Any
    key: Any
    index: Any


class Rolling(NamedTuple):
    """A rolling buffer as two pure functions.

    prime: (key, known, index=None) -> Stream
    advance: (params, stream, cond=None) -> (stream, chunk [B, chunk, ...]), fit for `lax.scan`
    plan: the times of one call `[M + 1, 1, N]`: M evaluations a call
    """

    prime: Callable[..., Stream]
    advance: Callable[..., tuple[Stream, Any]]
    plan: Any


def rolling(
    denoiser: Denoiser,
    solver: Solver,
    grid: Times,
    *,
    entries: int,
    chunk: int,
    past: int = 0,
    given_past: bool = False,
) -> Rolling:
    """A buffer of `entries` that returns a clean chunk per call, for S / h evaluations, not S (Høeg et al. 2024, SDP).

    grid: `[S + 1]`, from 1 to 0: each entry makes all of its steps before it leaves. With h chunks, the whole ones in
        entries - past, the buffer rests at the levels of `chunk_staircase`, and one call moves each chunk to where the
        one before it stood. h = 1 is `sample` of each chunk by itself.
    past: entries before the first chunk, which stay for one call after they left: noised to the level of the first
        chunk again, or (given_past) kept clean as a condition. An incomplete tail is replaced by noise at each call.

    `prime` begins a stream from `known`, data like x that is noised to the stationary levels: zeros, a pose repeated,
    or a whole sample (SDP's three primers). It starts wrong by as much as `known` does, and each call replaces a chunk.
    `advance` may get another condition at each call. Its randomness belongs to (key, call, sample): call c with h = 1
    is `sample(fold_in(key, c), ...)`. Data is one array, or a dict of arrays with the same entries.

    The batch moves together. Where some of it begins anew by itself (episodes that end), give each its own stream with
    a batch of one and `vmap` over streams, in which a primed one may replace another.

    Raises InvalidInput for a grid that does not end at 0, and for entries that hold no chunk.
    """
    times: Any = as_grid(grid)
    if not isinstance(times, Tracer) and times[-1] != 0:
        raise InvalidInput(
            f"grid ends at {float(times[-1]):g}, but what leaves the buffer must be clean: it must end at 0."
        )
    steps = times.shape[0] - 1
    left = plans.chunk_levels(steps, entries, chunk, past, given_past)
    plan = plans.chunk_staircase(times, entries, chunk, past, given_past)
    process, calls = denoiser.process, jnp.arange(left.shape[0] - 1)
    # How many real steps are left from each place of the grid: an entry still has those of later calls.
    ahead = jnp.append(remaining(times), 0)
    call_clock = clock(plan)._replace(remaining=ahead[steps - left[:-1]][:, None])
    tail = entries - past - chunk * ((entries - past) // chunk)
    fresh = chunk + tail
    # What has moved up stands where it must, but for a past that was clean and joins the first chunk again.
    arrived = np.concatenate([left[-1, chunk : entries - tail], np.full(fresh, steps)])
    renoised = jnp.asarray(arrived != left[0])

    def prime(key, known, index=None):
        check_entries(known, entries)
        index = jnp.arange(batch_size(known)) if index is None else jnp.asarray(index)
        x = plans.noised_start(randomness.fold(key, 0), process, plan, known, index)
        return Stream(Run(x, solver.init(process, x, plan), ()), jnp.int32(0), key, index)

    def advance(params, stream, cond=None):
        keys = randomness.sample_keys(randomness.fold(stream.key, stream.calls), stream.index)
        loop = Loop(denoiser, params, solver, call_clock.with_keys(keys), cond)
        run = initialised(loop, stream.run._replace(carry=None))
        run, _ = jax.lax.scan(lambda run, row: (one_step(loop, run, loop.clock.step(row)), None), run, calls)
        out = jax.tree.map(lambda leaf: leaf[:, past : past + chunk], run.x)
        keys = randomness.sample_keys(randomness.fold(stream.key, stream.calls + 1), stream.index)
        x = rolled(keys, run.x)
        state = by_entry(solver, entries, moved_up, run.state, solver.init(process, x, plan))
        return Stream(Run(x, state, (), run.cost), stream.calls + 1, stream.key, stream.index), out

    def moved_up(old, begun, axis):
        """What a solver remembers of each entry; what has become noise, or is noisier than before, begins anew."""
        kept = jax.lax.slice_in_dim(old, chunk, entries - tail, axis=axis)
        end = jax.lax.slice_in_dim(begun, entries - fresh, entries, axis=axis)
        anew = renoised.reshape(-1, *(1,) * (old.ndim - axis - 1))
        return jnp.where(anew, begun, jnp.concatenate([kept, end], axis=axis))

    def rolled(keys, x):
        """The buffer moved up by a chunk, with noise at its end."""
        shape = (
            {name: _length_of(leaf, fresh) for name, leaf in x.items()} if isinstance(x, dict) else _length_of(x, fresh)
        )
        noise = process.prior(randomness.prior_key(keys), shape)
        x = jax.tree.map(
            lambda leaf, new: jnp.concatenate([leaf[:, chunk : entries - tail], new.astype(leaf.dtype)], axis=1),
            x,
            noise,
        )
        if past and not given_past:
            again, _ = process.corrupt(randomness.corruption_key(keys), x, plan[0])
            x = where(renoised[None], again, x)
        return x

    return Rolling(prime, advance, plan)


def _length_of(leaf, entries):
    return (leaf.shape[0], entries, *leaf.shape[2:])
