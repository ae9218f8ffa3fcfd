"""Whether skipped operations become saved time: whole jitted sampling runs against the plain run, on one network.

A transformer of 12 blocks x 384 with random weights runs 24 DDIM steps in turn with every way of doing less at some of
them. What a method ought to save is known from what ran (`Samples.cost.compute`, counted from the executed branches);
the aim of a row is 85 % of that.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row
from diffusion_jax import models, processes, solvers, timesteps
from diffusion_jax.acceleration import (
    at_depth,
    cached_features,
    cached_outputs,
    every,
    first_and_last,
    first_block_cached,
    gated,
    taylor,
)
from diffusion_jax.costs import count_bytes, count_flops
from diffusion_jax.denoisers import by_share, denoiser, switched
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser

SHARE = 0.85
"""Of the time that skipped operations ought to save, at least this much is to be saved."""


class Size(NamedTuple):
    """The network and the run."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    side: int = 32
    batch: int = 4
    steps: int = 24


class Contender(NamedTuple):
    """A denoiser and the parameters it takes."""

    denoiser: Denoiser
    params: Any


def acceleration(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """Every method against the plain run, on a DiT of 12 x 384 with 32 x 32 x 4 latents."""
    size = Size(width=32, depth=3, heads=2, side=8, batch=2, steps=6) if smoke else Size()
    contenders, cond = build(size)
    grid, shape, key = timesteps.linspace(size.steps), _shape(size), jax.random.key(0)
    calls, runs, first = {}, {}, {}
    for name, (made, params) in contenders.items():
        run = jax.jit(
            lambda key, params, made=made: sample(key, made, params, solvers.ddim(), grid, shape=shape, cond=cond)
        )
        start = time.perf_counter()
        runs[name] = jax.block_until_ready(run(key, params))
        first[name] = time.perf_counter() - start
        calls[name] = lambda run=run, params=params: jax.block_until_ready(run(key, params).x)
    times = interleave(calls, rounds)
    plain, rows = times.pop("plain"), []
    for name in times:
        expected = float(runs["plain"].cost.compute / runs[name].cost.compute)
        measured = ratio(plain, times[name])
        held = count_bytes(runs[name].run.carry) / 2**20
        rows.append(
            Row(
                case=name,
                ours=summarise(times[name]),
                peer="every step computed",
                theirs=summarise(plain),
                ratio=measured,
                aim=round(SHARE * expected, 3),
                compile_seconds=max(0.0, first[name] - float(np.median(times[name]))),
                note=f"operations predict {expected:.2f}x: {measured.value / expected:.0%} of it; holds {held:.1f} MiB",
            )
        )
        print(f"  {name}: {measured.value:.2f}x of {expected:.2f}x, {held:.1f} MiB", flush=True)
    return rows


def build(size: Size) -> tuple[dict[str, Contender], dict]:
    """The contenders by name, and their condition."""
    process, cond = processes.vp_linear(), {"label": jnp.arange(size.batch) % 10}
    network = models.dit(patch=2, width=size.width, depth=size.depth, heads=size.heads, conditions=(models.label(10),))
    small = models.dit(
        patch=2,
        width=size.width // 2,
        depth=max(1, size.depth // 3),
        heads=max(1, size.heads // 2),
        conditions=(models.label(10),),
    )
    params, few = _params(network, size, cond), _params(small, size, cond)
    plain, quick = denoiser(network, process), denoiser(small, process)
    exits = models.early_exit(network)
    begun = exits.init(jax.random.key(1), params, jnp.zeros(_shape(size)), jnp.zeros(size.batch), cond)
    shallow = jnp.where(jnp.arange(size.steps) < size.steps // 2, max(1, size.depth // 4), size.depth)
    work = _work(small, few, size, cond) / _work(network, params, size, cond), 1.0

    def features(order: int, interval: int) -> Denoiser:
        return cached_features(network, process, taylor(order), every(interval))

    def stitched(large: Denoiser) -> Denoiser:
        return switched([quick, large], by_share(0.5, 0.5), compute=work)

    # With random weights a gate would open always or never: it is asked at every step, and made to trust half of them.
    half = gated(network, process, jnp.inf, probe=taylor(1), last=taylor(1), refresh=every(2))
    ends = first_block_cached(network, process, jnp.inf, refresh=first_and_last(1))
    made = {
        "plain": plain,
        "output reuse, N = 3": cached_outputs(plain, every(3)),
        "feature reuse, N = 3": features(0, 3),
        "TaylorSeer, N = 3, m = 1": features(1, 3),
        "TaylorSeer, N = 3, m = 2": features(2, 3),
        "TaylorSeer, N = 6, m = 2": features(2, 6),
        "CG-Taylor, every second step trusted": half,
        "first-block cache, all but the ends trusted": ends,
    }
    contenders = {name: Contender(one, params) for name, one in made.items()}
    early = Contender(at_depth(exits, process, shallow), {"params": params, "exits": begun})
    pair = {"T-Stitch": stitched(plain), "T-Stitch, then TaylorSeer N = 3, m = 1": stitched(features(1, 3))}
    contenders["early exit by a table, a quarter of the blocks for half of the steps"] = early
    return contenders | {name: Contender(one, (few, params)) for name, one in pair.items()}, cond


def _shape(size):
    return size.batch, size.side, size.side, 4


def _params(network, size, cond):
    """Random weights, gates included: at initialisation no block would say anything."""
    key = jax.random.key(0)
    leaves, tree = jax.tree.flatten(network.init(key, jnp.zeros(_shape(size)), jnp.zeros(size.batch), cond))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([leaf + 0.02 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])


def _work(network, params, size, cond):
    def answer(params, x, t, cond):
        return network.apply(params, x, t, cond)[0]

    return count_flops(answer, params, jnp.zeros(_shape(size)), jnp.zeros(size.batch), cond)
