"""Blocks without an end by a causal network, each noise level with a history of its own (Live Avatar).

Block i is made in T steps along a grid t_0 = 1 > t_1 > ... > t_T = 0 (Huang et al. 2025):

    x0, kv  =  G(x, t_j; KV_j, sink, cond_i)        KV_j: keys and values of the last w blocks, as level j saw them
    x      <-  step(x, x0, t_j, t_{j+1});    push kv to KV_j                                                       (1)

So the history is as noisy as the block that reads it (timestep forcing), no finished block is read again, and a level
needs only its own past: each level can have a device of its own (`in_flight`). Errors do not add up in a noisy history.
The identity of what is shown must come from the sink, a clean reference frame that every block sees. At a constant
distance (`sink_at`, rolling RoPE) block 10 000 sees it as block 10 does. With `adaptive_sink` the stream's own first
frame replaces the given picture, so that the condition is a picture that the model itself can make.

    stream = block_stream(network, process, grid, sink_at=4.0)         # a video_dit with blocks and rotary positions
    clip = sample_stream(key, stream, params, shape=(B, F, H, W, C), cond={"audio": ..., "reference": ...}).x

A few-step network of this kind is trained on its own rollouts (`self_rollout`), by `objectives.distribution_matching`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from diffusion_jax import randomness
from diffusion_jax.clock import as_grid, clock, network_inputs, num_steps, to_prediction
from diffusion_jax.distributed import timestep_pipeline
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models.incremental import Incremental, KVCache, incremental
from diffusion_jax.pipelined import at_each_level, blocks_of, caching_stage, clip_of, decoding_stage, noise_blocks
from diffusion_jax.sampling import Loop, Run, Samples, one_step
from diffusion_jax.solvers import flow_euler, lcm
from diffusion_jax.streaming.buffers import Stream
from diffusion_jax.typing import Condition, Denoiser, Network, Params, Process, Solver, Times


def kv_cached(step: Incremental, process: Process, sink_at: Any = None) -> Denoiser:
    """A causal video network as a denoiser of blocks. Its carry is the cache, to which each call adds its block.

    A cache belongs to one noise level: a block at t sees the past blocks as they were at t, and reference frames
    (`cond["reference"]`, when the carry is begun) as they are. sink_at: see `models.incremental`.
    """

    def init(params, x, cond):
        return step.init(params, x, cond)

    def apply(params, carry, x, at, cond):
        output, extras, kept = step.apply(params, carry, *network_inputs(process, x, at.t), cond, sink_at)
        return to_prediction(process, output, x, at.t, extras), step.push(carry, kept)

    return Denoiser(init, apply, process, lambda carry: KVCache(1, 1, None))


class BlockStream(NamedTuple):
    """A stream of blocks as pure functions; `block_stream` makes it.

    prime: (key, params, shape, cond, index=None) -> Stream       before the first block; shape: of one block, batch
        included; cond: that of the first block, with the `reference` where the network has one
    advance: (params, stream, cond, exit=T - 1) -> (stream, x0 [B, block, H, W, C])      one block, fit for `lax.scan`
    sink: (params, x0, cond) -> the sink, as `KVCache` has it, whose reference is the first frame of block x0; None
        where the sink stays
    denoiser, solver, grid: whose steps they are. block: in frames. framewise: names of what `cond` has for each frame.
    own_levels: whether each level has a history of its own.

    The Stream's run holds the block made last as x, the caches `[T, ...]` (or the one of all levels) as carry, and the
    cost so far. Its size does not depend on how many blocks were made.
    """

    prime: Callable[..., Stream]
    advance: Callable[..., tuple[Stream, Any]]
    sink: Callable[..., Any] | None
    denoiser: Denoiser
    solver: Solver
    grid: Any
    block: int
    framewise: tuple[str, ...]
    own_levels: bool


def block_stream(
    network: Network,
    process: Process,
    grid: Times,
    *,
    solver: Solver | None = None,
    window: int | None = None,
    sink_at: Any = None,
    adaptive_sink: bool = False,
    history: float | None = None,
    framewise: Sequence[str] = ("audio",),
) -> BlockStream:
    """The stream (1) of a causal `network`, block by block along `grid [T + 1]`.

    network: what `models.incremental` takes: a `video_dit` with blocks and rotary positions, or what stands around one.
    solver: Euler steps (`solvers.flow_euler`) by default; it should evaluate once a step.
    window: blocks of the past that are kept; the network's own when None.
    sink_at: frames that the reference is ahead of each block, a number within the distances of training, or traced;
        None lets it fall behind, as in a clip that began with block 0.
    adaptive_sink: whether the first frame that is made takes the reference's place from block 1 on.
    history: None: each level remembers blocks as it saw them. A time: all levels share one cache, to which every
        finished block is shown once more, corrupted to that time (0: clean), for one evaluation more a block.
    framewise: entries of `cond` with an axis of frames behind the batch, which are cut into blocks.

    T evaluations of a block each. Block i draws as `sample(fold_in(key, i), ...)`. `advance` is differentiable: only
    the evaluation at level `exit` (a traced integer; the last by default), whose x0 is the result, passes gradients to
    `params`; earlier levels, the sink and all that is remembered pass none (self forcing, Huang et al. 2025).

    Raises InvalidInput for other networks, a `history` outside of [0, 1], and a grid of more than one axis.
    """
    if history is not None and not 0 <= history <= 1:
        raise invalid("history", history, "a time in [0, 1] is needed, or None for a history of each level")
    denoiser = kv_cached(incremental(network, window), process, sink_at)
    if isinstance(grid, dict) or np.ndim(grid) != 1:
        raise invalid("grid", np.shape(grid) if not isinstance(grid, dict) else sorted(grid), "[T + 1] is needed")
    solver, ticks = flow_euler() if solver is None else solver, clock(as_grid(grid))
    block, levels, own_levels = network.anatomy.causal.block, num_steps(ticks.grid), history is None  # type: ignore

    def begun(params, x, cond):
        return denoiser.init(jax.lax.stop_gradient(params), x, cond)

    def sink(params, x0, cond):
        first = jax.lax.stop_gradient(x0[:, 0])
        own = begun(params, x0, {**(cond or {}), "reference": first}).sink
        return at_each_level(own, levels) if own_levels else own

    def prime(key, params, shape, cond=None, index=None):
        if adaptive_sink and "reference" not in (cond or {}):
            raise InvalidInput(f"cond has {sorted(cond or {})}, but an adaptive sink begins with cond['reference'].")
        x, index = jnp.zeros(shape), jnp.arange(shape[0]) if index is None else jnp.asarray(index)
        carry = begun(params, x, cond)
        carry = at_each_level(carry, levels) if own_levels else carry
        return Stream(Run(x, (), carry), jnp.int32(0), key, index)

    def recalled(carry, level):
        return jax.tree.map(lambda leaf: leaf[level], carry) if own_levels else carry

    def remembered(carry, level, new):
        return jax.tree.map(lambda leaf, one: leaf.at[level].set(one), carry, new) if own_levels else carry

    def advance(params, stream, cond=None, exit=None):
        exit = jnp.int32(levels - 1 if exit is None else exit)
        frozen = jax.lax.stop_gradient(params)
        keys = randomness.sample_keys(randomness.fold(stream.key, stream.calls), stream.index)
        loop = Loop(denoiser, frozen, solver, ticks.with_keys(keys), cond)
        noise = process.prior(randomness.prior_key(keys), stream.run.x.shape)
        run = Run(noise, solver.init(process, noise, ticks.grid), (), stream.run.cost)

        def earlier(level, state):
            run, carry = state
            run = one_step(loop, run._replace(carry=recalled(carry, level)), loop.clock.step(level))
            return run._replace(carry=()), remembered(carry, level, run.carry)

        run, carry = jax.lax.fori_loop(0, exit, earlier, (run, stream.run.carry))
        last = loop.clock.step(exit)
        prediction, new = denoiser.apply(params, recalled(carry, exit), run.x, last, cond)
        x0, cost = jax.lax.stop_gradient(prediction.x0), run.cost + prediction.cost
        if own_levels:
            carry = remembered(carry, exit, jax.lax.stop_gradient(new))
        else:
            again = jnp.asarray(history, ticks.grid.dtype)
            x, _ = process.corrupt(randomness.corruption_key(keys), x0, again)
            answer, carry = denoiser.apply(frozen, carry, x, last._replace(t=again, t_next=again), cond)
            cost = cost + answer.cost
        if adaptive_sink:
            own = jax.lax.cond(stream.calls == 0, lambda: sink(params, x0, cond), lambda: carry.sink)
            carry = carry._replace(sink=own)
        return Stream(Run(x0, (), carry, cost), stream.calls + 1, stream.key, stream.index), prediction.x0

    adapted = sink if adaptive_sink else None
    return BlockStream(prime, advance, adapted, denoiser, solver, ticks.grid, block, tuple(framewise), own_levels)


def sample_stream(
    key: Key[Array, ""],
    stream: BlockStream,
    params: Params,
    *,
    shape: tuple[int, ...],
    cond: Condition = None,
    index: Int[Array | np.ndarray, " B"] | None = None,
    exit: Any = None,
) -> Samples:
    """A whole clip of `stream`, of any length: x is `[B, F, H, W, C]`, `shape`.

    cond: of the clip; its `framewise` entries `[B, F, ...]` are cut into blocks. exit: see `block_stream`.
    The result's run is that of the last `Stream`. Raises InvalidInput where blocks do not divide the F frames.
    """
    told, still = _told_by_block(stream, shape, cond)
    one = (shape[0], stream.block, *shape[2:])
    state = stream.prime(key, params, one, {**still, **jax.tree.map(lambda leaf: leaf[0], told)}, index)

    def body(state, own):
        return stream.advance(params, state, {**still, **own}, exit)

    state, x = jax.lax.scan(body, state, told, length=shape[1] // stream.block)
    return Samples(clip_of(x), None, state.run)


def self_rollout(
    network: Network,
    process: Process,
    grid: Times,
    *,
    sink: tuple[float, float] | None = None,
    history: float | None = None,
    solver: Solver | None = None,
    framewise: Sequence[str] = ("audio",),
) -> Callable[..., Float[Array, "B F H W C"]]:
    """`generate` of `objectives.distribution_matching`: the student's own clips, made as a stream makes them.

    `(params, batch, key) -> X`, with the shape of `batch["x0"]` and its `cond`. All blocks leave at one level, drawn
    anew for each batch, so that each level learns; solver: `solvers.lcm` by default, which noises x0 to the next level.
    sink: least and largest distance of the reference, drawn from anew: those at which the teacher knows it. None lets
        it fall behind. history: as in `block_stream`, None for levels with histories of their own (history corrupt).
    """
    levels = num_steps(as_grid(grid))
    solver = lcm() if solver is None else solver

    def generate(params, batch, key):
        exit_key, sink_key, noise_key = randomness.split(key, 3)
        at = None if sink is None else jax.random.uniform(sink_key, (), minval=sink[0], maxval=sink[1])
        stream = block_stream(network, process, grid, solver=solver, sink_at=at, history=history, framewise=framewise)
        exit = jax.random.randint(exit_key, (), 0, levels)
        told = {"shape": batch["x0"].shape, "cond": batch.get("cond"), "index": batch["index"]}
        return sample_stream(noise_key, stream, params, exit=exit, **told).x

    return generate


class Flown(NamedTuple):
    """A clip that was made with all levels at work at once.

    x: `[B, F, H, W, C]`. shown: the same, decoded, or None. ticks: of the pipeline, each one evaluation long.
    evaluations: of each level `[T]`.
    """

    x: Any
    shown: Any
    ticks: int
    evaluations: Any


def in_flight(
    stream: BlockStream,
    *,
    decode: Callable[[Any], Any] | None = None,
    mesh: Mesh | None = None,
    axis: str = "pipe",
    batched: bool = False,
) -> Callable[..., Flown]:
    """`sample_stream` with every level at work on a block of its own: `(key, params, *, shape, cond, index) -> Flown`.

    mesh: device k of `axis` owns level k and its history, and sends blocks on (timestep-forcing pipeline parallelism);
        None and `batched` as in `distributed.timestep_pipeline`.
    decode: `[B, block, H, W, C]` to what is shown, by a device of its own behind the last level: the axis then has
        T + 1 devices.

    The numbers are those of `sample_stream`. M blocks on L devices take M + L - 1 ticks instead of M L; with an
    adaptive sink M + 2 (L - 1), for the others wait until the first block is there. The first block takes L ticks.
    Raises InvalidInput for a stream whose levels share a history, and for a mesh without one device a level.
    """
    if not stream.own_levels:
        raise InvalidInput("in_flight needs a stream with a history of each level: make it with history=None.")
    levels = num_steps(stream.grid) + (decode is not None)
    step = caching_stage(stream.denoiser, stream.solver, stream.grid)
    stage = step if decode is None else decoding_stage(step, levels - 1, decode)
    pipeline = timestep_pipeline(stage, levels, mesh=mesh, axis=axis, batched=batched)

    def spare(carry):
        """The same for one level more, the decoder's, which keeps nothing."""
        return carry if decode is None else jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[-1:]]), carry)

    def fly(key, params, *, shape, cond=None, index=None):
        told, still = _told_by_block(stream, shape, cond)
        one, count = (shape[0], stream.block, *shape[2:]), shape[1] // stream.block
        begin = {**still, **jax.tree.map(lambda leaf: leaf[0], told)}
        still = {name: value for name, value in still.items() if name != "reference"}
        own = {**told, **jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), still)}
        blocks = noise_blocks(
            key, stream.denoiser, params, stream.solver, stream.grid, shape=one, blocks=count, index=index
        )
        if decode is not None:
            like = jax.eval_shape(decode, jnp.zeros(one))
            blocks = blocks, jnp.zeros((count, *like.shape), like.dtype)

        def run(carry, start, stop):
            entering = jax.tree.map(lambda leaf: leaf[start:stop], (blocks, own))
            return pipeline.run(params, carry, *entering, start)

        carry = spare(stream.prime(key, params, one, begin, index).run.carry)
        if stream.sink is None or count == 1:
            made, carry = run(carry, 0, count)
            ticks = pipeline.ticks(count)
        else:
            first, carry = run(carry, 0, 1)
            latent = (first if decode is None else first[0]).run.x[0]
            carry = carry._replace(sink=spare(stream.sink(params, latent, begin)))
            rest, carry = run(carry, 1, count)
            made = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, rest)
            ticks = pipeline.ticks(1) + pipeline.ticks(count - 1)
        block, shown = (made, None) if decode is None else made
        evaluations = carry.count[: num_steps(stream.grid)]
        return Flown(clip_of(block.run.x), None if shown is None else clip_of(shown), ticks, evaluations)

    return fly


def _told_by_block(stream, shape, cond):
    """What the blocks are told, each for itself `[M, B, block, ...]`, and what all are told."""
    cond = dict(cond or {})
    if len(shape) != 5 or shape[1] % stream.block or not shape[1]:
        raise invalid("shape", shape, f"[B, F, H, W, C] with blocks of {stream.block} frames is needed")
    told = {name: cond.pop(name) for name in stream.framewise if name in cond}
    for name, value in told.items():
        if jnp.ndim(value) < 2 or value.shape[1] != shape[1]:
            raise invalid(f"cond[{name!r}].shape", jnp.shape(value), f"[B, {shape[1]}, ...], an entry a frame, fits")
    return {name: blocks_of(value, stream.block) for name, value in told.items()}, cond
