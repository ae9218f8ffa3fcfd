"""The loop: one `lax.scan` of a solver over a grid, forwards (`sample`) or backwards (`invert`), whole or in segments.

A grid is `[S + 1, *t_shape]`: every time of the run, explicit. `t_shape` is a prefix of the data's shape, batch
included (`[]`, `[B]`, `[B, N]`; axes of size 1 broadcast), so a plan of vector timesteps is just another array.
Joint data has a dict of grids. Where a step does not move (t_next == t) the sample is returned bit for bit.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key

from diffusion_jax import randomness
from diffusion_jax.distributed import automatic
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.time_axes import expand, where
from diffusion_jax.typing import Cost, Counted, Denoiser, Solver, Step


class Run(NamedTuple):
    """A run between two steps: everything that is needed to go on.

    To go on with another solver or another denoiser, hand in `run._replace(state=None)` or `run._replace(carry=None)`:
    what is None is initialised anew.
    """

    x: Any
    state: Any
    carry: Any
    cost: Cost


class Samples(NamedTuple):
    """x: the result. trace: x after every `save_every`-th step, stacked, or None. run: hand it to `sample` to go on.

    cost: network evaluations and relative compute per sample, counted from what ran.
    """

    x: Any
    trace: Any
    run: Run

    @property
    def cost(self) -> Cost:
        return self.run.cost


def check_grid(grid: Any, *, rising: bool = False) -> None:
    """Raises `InvalidInput` unless the grid stays in [0, 1] and never turns back; traced grids are not inspected."""
    for name, values in grid.items() if isinstance(grid, dict) else [("grid", grid)]:
        if jnp.ndim(values) < 1 or jnp.shape(values)[0] < 2:
            raise invalid(f"{name}.shape", jnp.shape(values), "a grid needs at least two times along its first axis")
        if isinstance(values, jax.core.Tracer):
            continue
        # NumPy, for a known grid may be inspected while something else is being traced.
        values = np.asarray(values)
        if not bool(np.all((values >= 0) & (values <= 1))):
            raise InvalidInput(f"{name} must lie in [0, 1]; it spans [{np.min(values):g}, {np.max(values):g}].")
        steps = np.diff(values, axis=0) * (1 if rising else -1)
        if not bool(np.all(steps >= 0)):
            entry = int(np.argmax(np.any((steps < 0).reshape(steps.shape[0], -1), axis=1)))
            turn = "smaller" if rising else "larger"
            way = "rise from 0 to 1" if rising else "decrease from 1 to 0"
            raise InvalidInput(f"{name} must {way}; entry {entry + 1} is {turn} than entry {entry}.")


def _length(grid: Any) -> int:
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(grid)}
    if len(lengths) != 1:
        raise invalid("grid", sorted(lengths), "the grids of all modalities must have the same number of entries")
    return lengths.pop() - 1


def _batch(x: Any) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _at_least_float32(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _remaining(grid: Any) -> Any:
    """How many steps of non-zero length are left, `[S, *t_shape]`, counted at each step and for each entry."""
    return jnp.cumsum((grid[1:] != grid[:-1])[::-1], axis=0, dtype=jnp.int32)[::-1]


def sample(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Any,
    solver: Solver,
    grid: Any,
    *,
    shape: Any = None,
    x_init: Any = None,
    cond: Any = None,
    index: Int[Array, " B"] | None = None,
    resume: Run | None = None,
    start: int = 0,
    stop: int | None = None,
    save_every: int | None = None,
    progress: bool = False,
) -> Samples:
    """Runs `solver` over `grid` from noise to data, as one `lax.scan`.

    Pure, so that it can be jitted, differentiated and put under `shard_map`; `make_sampler` returns the compiled
    program. Sample i uses `fold_in(key, index[i])` alone, so it does not depend on the batch.

    key: one typed key for the run.
    grid: `[S + 1, *t_shape]`, decreasing; a dict of those for joint data.
    shape: shape of the samples, batch included (a dict for joint data); the prior at t = 1 is drawn from the process.
    x_init: starts from this instead of the prior.
    cond: the condition, handed to the denoiser as it is.
    index: global index of each sample; 0 .. B - 1 when absent.
    resume: the `run` of an earlier segment; continues it at step `start`, bit for bit as if it had not stopped. Grid,
        solver, condition and parameters may be others than before (see `Run` for what must then be None).
    start, stop: the steps to run, as a Python range over 0 .. S.
    save_every: keeps x after every so many steps in `trace`, stacked along a new first axis.
    progress: shows a progress bar on the host (slower: it calls the host at each step).

    Raises InvalidInput for a grid that does not decrease, or a range outside of it.
    """
    grid = jax.tree.map(partial(jnp.asarray, dtype=jnp.result_type(float)), grid)
    check_grid(grid)
    return _run(
        key, denoiser, params, solver, grid, shape, x_init, cond, index, resume, start, stop, save_every, progress
    )


def invert(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Any,
    solver: Solver,
    grid: Any,
    *,
    x_init: Any,
    cond: Any = None,
    index: Int[Array, " B"] | None = None,
    save_every: int | None = None,
) -> Samples:
    """Runs the same grid backwards, from data to noise: `sample` of the result returns to `x_init`.

    The error shrinks at the order of the solver; solvers with an algebraic inverse are exact. A deterministic
    solver is expected. `grid` is the decreasing grid that `sample` would use.
    """
    grid = jax.tree.map(partial(jnp.asarray, dtype=jnp.result_type(float)), grid)
    check_grid(grid)
    grid = jax.tree.map(lambda g: g[::-1], grid)
    return _run(key, denoiser, params, solver, grid, None, x_init, cond, index, None, 0, None, save_every, False)


def make_sampler(
    denoiser: Denoiser,
    solver: Solver,
    *,
    shape: Any,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
    param_specs: Any = None,
    save_every: int | None = None,
):
    """The compiled program `sampler(key, params, grid, cond=None, index=..., x_init=None) -> Samples`.

    shape: shape of one sample, batch not included (a dict for joint data).
    index: `[B]`, the global index of each sample; its length is the batch. Sample i is the same in any batch and on any
        mesh. Keys, parameters, grids, conditions and indices are arguments: new values do not compile anew.
    mesh: each device of `axis` runs its part of the batch by itself (`shard_map`); None runs on one device. Leaves of
        `cond` whose first axis is B, and grids with a batch axis, are split with the batch; all else is replicated.
    param_specs: partition specs of the parameters when they are not replicated.
    save_every: see `sample`.

    The result's `run` has no state and no carry, so a following segment starts its history anew; `cost` is the mean
    over the devices. Raises InvalidInput for an axis that the mesh lacks, and when called with a bad grid or a batch
    that the axis does not divide.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        if mesh is not None and name not in mesh.axis_names:
            raise unknown("axis", name, mesh.axis_names)
    mesh = None if mesh is None else automatic(mesh)
    devices = math.prod(mesh.shape[name] for name in axes) if mesh is not None else 1

    def local(key, params, grid, cond, index, x_init):
        size = index.shape[0]
        whole = {n: (size, *s) for n, s in shape.items()} if isinstance(shape, dict) else (size, *shape)
        result = sample(
            key, denoiser, params, solver, grid,
            shape=whole, x_init=x_init, cond=cond, index=index, save_every=save_every,
        )  # fmt: skip
        cost = result.run.cost
        if mesh is not None:
            cost = jax.tree.map(lambda value: jax.lax.pmean(value, axes), cost)
        return Samples(result.x, result.trace, Run(result.x, None, None, cost))

    def program(key, params, grid, cond, index, x_init):
        if mesh is None:
            return local(key, params, grid, cond, index, x_init)
        size, batch = index.shape[0], P(axes)

        def split(leaf):
            return batch if jnp.ndim(leaf) and jnp.shape(leaf)[0] == size else P()

        specs = (
            P(),
            P() if param_specs is None else param_specs,
            jax.tree.map(lambda g: P(None, axes) if g.ndim > 1 and g.shape[1] == size else P(), grid),
            jax.tree.map(split, cond),
            batch,
            jax.tree.map(lambda leaf: batch, x_init),
        )
        out = Samples(batch, P(None, axes), Run(batch, P(), P(), P()))
        # Costs are counted from what each device ran, which the replication checker cannot follow.
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return mapped(key, params, grid, cond, index, x_init)

    compiled = jax.jit(program)

    def sampler(key, params, grid, cond=None, index=None, x_init=None) -> Samples:
        if index is None:
            raise InvalidInput("index is None, but the global index of each sample, an array [B], was expected.")
        grid = jax.tree.map(partial(jnp.asarray, dtype=jnp.result_type(float)), grid)
        check_grid(grid)
        size = jnp.shape(index)[0]
        if size % devices:
            raise invalid("batch", size, f"it must be divisible by the {devices} devices along {' x '.join(axes)}")
        return compiled(key, params, grid, cond, jnp.asarray(index), x_init)

    return sampler


def one_step(denoiser: Denoiser, params: Any, solver: Solver, run: Run, step: Step, key: Any, cond: Any = None) -> Run:
    """The body of every loop: one step of `solver`, its cost counted, what does not move returned bit for bit.

    key: one key per sample `[B]`, of this step alone; `step.key` is the denoiser's.
    """

    def denoise(carry, x, step):
        prediction, inner = denoiser.apply(params, carry.carry, x, step, cond)
        return prediction, Counted(inner, carry.cost + prediction.cost)

    x, state, (carry, cost) = solver.step(
        denoiser.process, denoise, Counted(run.carry, run.cost), run.state, run.x, step, key
    )
    moves = jax.tree.map(lambda a, b: a != b, step.t, step.t_next)
    return Run(where(moves, x, run.x), state, carry, cost)


def _run(key, denoiser, params, solver, grid, shape, x_init, cond, index, resume, start, stop, save_every, progress):
    num_steps = _length(grid)
    stop = num_steps if stop is None else stop
    if not 0 <= start <= stop <= num_steps:
        raise invalid("start, stop", (start, stop), f"they must be a range within 0 .. {num_steps}")
    if save_every is not None and save_every < 1:
        raise invalid("save_every", save_every, "it must be at least 1")
    if resume is None and x_init is None and shape is None:
        raise InvalidInput("sample needs shape=, x_init= or resume=: none was given.")

    if x_init is not None:
        # Solver state is at least single precision whatever the data came in.
        x_init = jax.tree.map(_at_least_float32, x_init)
    if resume is not None:
        size = _batch(resume.x)
    elif x_init is not None:
        size = _batch(x_init)
    else:
        size = (next(iter(shape.values())) if isinstance(shape, dict) else shape)[0]
    keys = randomness.sample_keys(key, jnp.arange(size) if index is None else index)
    process = denoiser.process
    if resume is None:
        x = process.prior(randomness.fold(keys, 0), shape) if x_init is None else x_init
        resume = Run(x, None, None, Cost(jnp.float32(0), jnp.float32(0)))
    first = jax.tree.map(lambda g: g[start], grid)
    expand(first, resume.x)
    if resume.state is None:
        resume = resume._replace(state=solver.init(process, resume.x, grid))
    if resume.carry is None:
        resume = resume._replace(carry=denoiser.init(params, resume.x, cond))
    keys, denoiser_keys = randomness.fold(keys, 1), randomness.fold(keys, 2)
    remaining = jax.tree.map(_remaining, grid)

    def body(run, index):
        step = Step(
            index,
            jax.tree.map(lambda g: g[index], grid),
            jax.tree.map(lambda g: g[index + 1], grid),
            jnp.int32(num_steps),
            jax.tree.map(lambda r: r[index], remaining),
            denoiser_keys,
        )
        return one_step(denoiser, params, solver, run, step, randomness.fold(keys, index), cond), None

    if progress:
        body = _with_progress_bar(body, stop - start)
    steps = jnp.arange(start, stop)
    if save_every is None:
        run, _ = jax.lax.scan(body, resume, steps)
        return Samples(run.x, None, run)

    def saved(run, steps):
        run, _ = jax.lax.scan(body, run, steps)
        return run, run.x

    whole = (stop - start) // save_every * save_every
    run, trace = jax.lax.scan(saved, resume, steps[:whole].reshape(-1, save_every))
    run, _ = jax.lax.scan(body, run, steps[whole:])
    return Samples(run.x, trace, run)


def _with_progress_bar(body, total):
    """Reports each finished step to a tqdm bar on the host."""
    from tqdm.auto import tqdm

    bars = []

    def report(index):
        if not bars or bars[-1].n >= total:
            bars.append(tqdm(total=total, desc="sampling", unit="step"))
        bars[-1].update()
        if bars[-1].n >= total:
            bars[-1].close()

    def shown(run, index):
        run, out = body(run, index)
        jax.debug.callback(report, index, ordered=True)
        return run, out

    return shown
