"""The loop: one `lax.scan` of a solver over a grid, forwards (`sample`) or backwards (`invert`), whole or in segments.

A grid is that of `clock`: every time of the run, for all data or for each part of it, so a plan of vector timesteps is
just another array. Where a step does not move (t_next == t) the sample is returned bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key

from diffusion_jax import randomness
from diffusion_jax.clock import Clock, as_grid, clock, num_steps
from diffusion_jax.distributed import automatic
from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.time_axes import batch_size, expand, where
from diffusion_jax.timesteps import plans
from diffusion_jax.typing import (
    NO_COST,
    Condition,
    Cost,
    Counted,
    Denoiser,
    HostData,
    Params,
    Plan,
    Shape,
    Solver,
    Step,
    Times,
)


class Run(NamedTuple):
    """A run between two steps: everything that is needed to go on.

    To go on with another solver or another denoiser, hand in `run._replace(state=None)` or `run._replace(carry=None)`:
    what is None is initialised anew.
    """

    x: Any
    state: Any = None
    carry: Any = None
    cost: Cost = NO_COST


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


class Loop(NamedTuple):
    """What stays the same from step to step of a run."""

    denoiser: Denoiser
    params: Params
    solver: Solver
    clock: Clock
    cond: Condition = None


def sample(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    solver: Solver,
    grid: Plan | Times,
    *,
    shape: Shape | None = None,
    x_init: HostData | None = None,
    cond: Condition = None,
    index: Int[Array | np.ndarray, " B"] | None = None,
    resume: Run | None = None,
    start: int = 0,
    stop: int | None = None,
    save_every: int | None = None,
    progress: bool = False,
    remat: bool = False,
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
    remat: computes each step again in a backward pass, which then keeps x and the states between the steps and nothing
        of what is within: for gradients through a whole run.

    Raises InvalidInput for a grid that does not decrease, or a range outside of it.
    """
    times = as_grid(grid)
    last = num_steps(times) if stop is None else stop
    if not 0 <= start <= last <= num_steps(times):
        raise invalid("start, stop", (start, last), f"they must be a range within 0 .. {num_steps(times)}")
    if save_every is not None and save_every < 1:
        raise invalid("save_every", save_every, "it must be at least 1")
    if resume is None and x_init is not None:
        resume = _started(x_init)
    if resume is not None:
        size = batch_size(resume.x)
    elif shape is None:
        raise InvalidInput("sample needs shape=, x_init= or resume=: none was given.")
    else:
        size = (next(iter(shape.values())) if isinstance(shape, Mapping) else shape)[0]
    keys = randomness.sample_keys(key, jnp.arange(size) if index is None else index)
    if resume is None:
        resume = Run(denoiser.process.prior(randomness.prior_key(keys), shape))
    loop = Loop(denoiser, params, solver, clock(times).with_keys(keys), cond)
    return _run(loop, resume, range(start, last), save_every, progress, remat)


def invert(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    solver: Solver,
    grid: Plan | Times,
    *,
    x_init: HostData,
    cond: Condition = None,
    index: Int[Array | np.ndarray, " B"] | None = None,
    save_every: int | None = None,
) -> Samples:
    """Runs the same grid backwards, from data to noise: `sample` of the result returns to `x_init`.

    The error shrinks at the order of the solver; solvers with an algebraic inverse are exact. A deterministic
    solver is expected. `grid` is the decreasing grid that `sample` would use.
    """
    rising = jax.tree.map(lambda g: g[::-1], as_grid(grid))
    keys = randomness.sample_keys(key, jnp.arange(batch_size(x_init)) if index is None else index)
    loop = Loop(denoiser, params, solver, clock(rising).with_keys(keys), cond)
    return _run(loop, _started(x_init), range(num_steps(rising)), save_every)


def make_sampler(
    denoiser: Denoiser,
    solver: Solver,
    *,
    shape: Shape,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
    param_specs: Any = None,
    save_every: int | None = None,
    shared: Sequence[str] = (),
) -> Callable[..., Samples]:
    """The compiled program `sampler(key, params, grid, cond=None, index=None, x_init=None) -> Samples`.

    shape: shape of one sample, batch not included (a dict for joint data).
    index: `[B]`, the global index of each sample; 0 .. B - 1 when absent, where x_init, the condition or a grid with a
        plan for each sample says what B is. Sample i is the same in any batch and on any mesh. Keys, parameters, grids,
        conditions and indices are arguments: new values do not compile anew.
    mesh: each device of `axis` runs its part of the batch by itself (`shard_map`); None runs on one device. What has a
        batch axis is split along it: the first of x_init and of the leaves of `cond`, the second of a grid. There 1
        means one for all samples, and so does a scalar leaf; all else is replicated.
    param_specs: partition specs of the parameters when they are not replicated.
    save_every: see `sample`.
    shared: entries of `cond` that have no batch axis, and are one for all samples.

    The result's `run` has no state and no carry, so a following segment starts its history anew; `cost` is the mean
    over the devices. Raises InvalidInput for an axis that the mesh lacks, and when called with a bad grid, with batch
    axes that differ or tell no B, or with a batch that the mesh axis does not divide.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        if mesh is not None and name not in mesh.axis_names:
            raise unknown("axis", name, mesh.axis_names)
    mesh = None if mesh is None else automatic(mesh)
    devices = math.prod(mesh.shape[name] for name in axes) if mesh is not None else 1

    def local(key, params, grid, cond, index, x_init):
        size = index.shape[0]
        whole = {n: (size, *s) for n, s in shape.items()} if isinstance(shape, Mapping) else (size, *shape)
        result = sample(
            key, denoiser, params, solver, grid,
            shape=whole, x_init=x_init, cond=cond, index=index, save_every=save_every,
        )  # fmt: skip
        cost = result.run.cost
        if mesh is not None:
            cost = jax.tree.map(lambda value: jax.lax.pmean(value, axes), cost)
        return Samples(result.x, result.trace, Run(result.x, cost=cost))

    def program(key, params, grid, cond, index, x_init):
        cond = jax.tree_util.tree_map_with_path(lambda path, leaf: _for_all(path, leaf, index.shape[0], shared), cond)
        if mesh is None:
            return local(key, params, grid, cond, index, x_init)
        first, second = P(axes), P(None, axes)
        specs = (
            P(),
            P() if param_specs is None else param_specs,
            jax.tree.map(lambda g: second if g.ndim > 1 and g.shape[1] > 1 else P(), grid),
            jax.tree_util.tree_map_with_path(lambda *leaf: first if _rows(leaf[0], leaf[1], shared) > 1 else P(), cond),
            first,
            jax.tree.map(lambda leaf: first, x_init),
        )
        out = Samples(first, second, Run(first, P(), P())._replace(cost=P()))
        # Costs are counted from what each device ran, which the replication checker cannot follow.
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return mapped(key, params, grid, cond, index, x_init)

    compiled = jax.jit(program)

    def sampler(key, params, grid, cond=None, index=None, x_init=None) -> Samples:
        grid = as_grid(grid)
        size = _batch_of(grid, cond, index, x_init, shared)
        if size % devices:
            raise invalid("batch", size, f"it must be divisible by the {devices} devices along {' x '.join(axes)}")
        return compiled(key, params, grid, cond, jnp.arange(size) if index is None else jnp.asarray(index), x_init)

    return sampler


def make_role_sampler(
    denoiser: Denoiser, solver: Solver, grid: Times, *, shape: Mapping[str, Any], **options: Any
) -> Callable[..., Samples]:
    """Every task of a network of joint data: `ask(key, params, roles, known=None, cond=None, index=None) -> Samples`.

    One compiled program draws from the joint distribution, from all conditionals and from all marginals, since a task
    is the values of a plan (Bao et al. 2023):

        ask(key, params, {"image": "generate", "text": "given"}, {"text": texts})      # p(image | text)
        ask(key, params, {"image": "generate", "text": "ignored"}, index=range(8))     # p(image), eight of them

    roles: of each modality, see `timesteps.roles`; a list with one an example lets tasks mix within a batch.
    known: `{modality: [B, ...]}`, clean, of those that are given or known up to a level; what stands there for others
        changes nothing. Given modalities come back bit for bit.
    cond, index: as for `make_sampler`, which makes the program. B is that of known, of a list, of index or of cond.
    grid: `[S + 1]`. shape: of one sample, for each modality. options: those of `make_sampler`.

    Raises InvalidInput for modalities that are missing or unknown, and for a given one that is not known.
    """
    grid, process = as_grid(grid), denoiser.process
    sampler = make_sampler(denoiser, solver, shape=dict(shape), **options)
    begin = jax.jit(lambda key, plan, known, index: plans.noised_start(key, process, plan, known, index))

    def ask(key, params, roles, known=None, cond=None, index=None) -> Samples:
        known = {} if known is None else known
        for field, value in (("roles", roles), ("known", known)):
            for name in value:
                if name not in shape:
                    raise unknown(f"a name in {field}", name, shape)
        for name in shape:
            if name not in roles:
                raise InvalidInput(
                    f"roles has {sorted(roles)}, but the network has {name!r} too: every modality has one."
                )
        times = plans.roles(grid, roles)
        index = None if index is None else jnp.asarray(index)
        size = _batch_of(times, cond, index, known or None, options.get("shared", ()))
        index = jnp.arange(size) if index is None else index
        # One shape for all tasks, whether examples share theirs or not.
        plan = {n: jnp.broadcast_to(t[:, None], (len(t), size)) if t.ndim == 1 else t for n, t in times.items()}
        whole = {name: (size, *one) for name, one in shape.items()}
        drawn = jax.eval_shape(lambda key: process.prior(key, whole), key)
        for name in drawn:
            begun = np.asarray(plan[name][0])
            if name not in known and ((begun != 1) & (begun != np.asarray(grid[0]))).any():
                raise InvalidInput(f"roles[{name!r}] is {roles[name]!r}, but known has no {name!r}.")
        filled = {n: jnp.asarray(known[n]) if n in known else jnp.zeros(d.shape, d.dtype) for n, d in drawn.items()}
        return sampler(key, params, plan, cond, index, begin(key, plan, filled, index))

    return ask


def _rows(path, leaf, shared):
    """For how many samples a leaf of the condition is: 0 where it is one for all, for want of a batch axis."""
    one_for_all = jnp.ndim(leaf) == 0 or jax.tree_util.keystr(path[:1], simple=True) in shared
    return 0 if one_for_all else jnp.shape(leaf)[0]


def _for_all(path, leaf, size, shared):
    """A leaf of length 1 as one of B; others as they are."""
    return jnp.repeat(leaf, size, axis=0) if _rows(path, leaf, shared) == 1 else leaf


def _batch_of(grid, cond, index, x_init, shared):
    """B, on which everything with a batch axis must agree."""
    for name in shared:
        if name not in (cond or {}):
            raise unknown("a name in shared", name, cond or {})
    flatten, keystr = jax.tree_util.tree_leaves_with_path, jax.tree_util.keystr
    exact = {} if index is None else {"index": jnp.shape(index)[0]}
    exact |= {f"x_init{keystr(path)}": jnp.shape(leaf)[0] for path, leaf in flatten(x_init)}
    broadcast = {f"cond{keystr(path)}": _rows(path, leaf, shared) for path, leaf in flatten(cond)}
    broadcast |= {f"grid{keystr(path)}": g.shape[1] for path, g in flatten(grid) if g.ndim > 1 and g.shape[1] > 1}
    broadcast = {name: rows for name, rows in broadcast.items() if rows}
    if not exact and not broadcast:
        raise InvalidInput(
            "index is None, and nothing else tells the batch: give index=jnp.arange(B), one global index a sample."
        )
    size = next(iter(exact.values()), max(broadcast.values(), default=1))
    for name, rows in {**exact, **broadcast}.items():
        if rows != size and not (rows == 1 and name in broadcast):
            hint = {
                "cond": "; what is one for all is named in shared=",
                "grid": "; a time has a prefix of the data's shape",
            }
            raise invalid(f"the batch axis of {name}", rows, f"the batch has {size} samples{hint.get(name[:4], '')}")
    return size


def initialised(loop: Loop, run: Run) -> Run:
    """The run with what is None in it initialised: the solver's state, the denoiser's carry."""
    denoiser, params, solver, ticks, cond = loop
    state = solver.init(denoiser.process, run.x, ticks.grid) if run.state is None else run.state
    carry = denoiser.init(params, run.x, cond) if run.carry is None else run.carry
    return run._replace(state=state, carry=carry)


def one_step(loop: Loop, run: Run, step: Step) -> Run:
    """The body of every loop: one step of the solver, its cost counted, what does not move returned bit for bit."""
    denoiser, params, solver, ticks, cond = loop

    def denoise(carry, x, step):
        prediction, inner = denoiser.apply(params, carry.carry, x, step, cond)
        return prediction, Counted(inner, carry.cost + prediction.cost)

    x, state, (carry, cost) = solver.step(
        denoiser.process, denoise, Counted(run.carry, run.cost), run.state, run.x, step, ticks.solver_key(step.index)
    )
    moves = jax.tree.map(lambda a, b: a != b, step.t, step.t_next)
    return Run(where(moves, x, run.x), state, carry, cost)


def _started(x_init):
    """The run that begins with x_init, at least in single precision whatever the data came in."""

    def widened(leaf):
        leaf = jnp.asarray(leaf)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if floating else leaf

    return Run(jax.tree.map(widened, x_init))


def _run(
    loop: Loop, run: Run, steps: range, save_every: int | None, progress: bool = False, remat: bool = False
) -> Samples:
    expand(jax.tree.map(lambda g: g[steps.start], loop.clock.grid), run.x)

    def body(run, index):
        return one_step(loop, run, loop.clock.step(index)), None

    if remat:
        # Within a scan nothing is shared between the passes, so XLA need not be kept from it.
        body = jax.checkpoint(body, prevent_cse=False)
    if progress:
        body = _with_progress_bar(body, len(steps))
    run, indices = initialised(loop, run), jnp.arange(steps.start, steps.stop)
    if save_every is None:
        run, _ = jax.lax.scan(body, run, indices)
        return Samples(run.x, None, run)

    def saved(run, indices):
        run, _ = jax.lax.scan(body, run, indices)
        return run, run.x

    whole = len(steps) // save_every * save_every
    run, trace = jax.lax.scan(saved, run, indices[:whole].reshape(-1, save_every))
    run, _ = jax.lax.scan(body, run, indices[whole:])
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
