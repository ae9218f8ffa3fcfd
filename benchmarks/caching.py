"""Forecast features and first-block caches against diffusers' own hooks, on the same weights, through whole DDIM runs.

What both call by one name is not always one thing. `taylorseer_schedule` and `CACHED` say where the hooks differ from
the defaults here; settings of ours are chosen to be theirs, so that the trajectories are the same.
"""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleave, ratio, summarise
from benchmarks.report import Row
from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.acceleration import cached_features, first_block_cached, on_schedule, taylor
from diffusion_jax.denoisers import denoiser, recorded
from diffusion_jax.sampling import sample

CACHED = r"transformer_blocks\.\d+\.(attn1|attn2|ff)"
"""What TaylorSeer keeps, by the names of diffusers. Its default pattern ends in "attn" and is matched in full, so on
networks whose modules are called `attn1` it finds nothing, and nothing is cached."""


def taylorseer_schedule(interval: int, warmup: int, steps: int) -> np.ndarray:
    """Where `TaylorSeerCacheConfig(cache_interval, disable_cache_before_step)` computes, `[S]`.

    The warm-up, and from one step behind its end each `interval`-th; `acceleration.every` counts the interval from
    the last step of the warm-up, so its first refresh is `interval - 2` steps later.
    """
    index = np.arange(steps)
    return (index < warmup) | ((index - warmup - 1) % interval == 0)


PROCESS = processes.vp_linear(prediction="x0")
"""Ours for `their_run`."""


class Run(NamedTuple):
    """xs: `[S, B, H, W, C]` after each step. full: steps at which the blocks behind the first were run."""

    xs: np.ndarray
    full: int


def hooked(peer: Any, config: Any = None) -> Any:
    """The peer with a cache of diffusers; `peer` itself stays as it is."""
    from diffusers.models.cache_utils import CacheMixin

    made = type("Cached", (CacheMixin, type(peer)), {})(**{k: v for k, v in peer.config.items() if k[0] != "_"}).eval()
    made.load_state_dict(peer.state_dict())
    if config is not None:
        made.enable_cache(config)
    return made


def their_run(peer: Any, x: Any, steps: int, **cond: Any) -> Run:
    """A DDIM run as in diffusers' pipelines; x: `[B, H, W, C]`.

    The network's output is taken for the clean sample: for noise, that of an untrained one drives x out of all bounds.
    """
    import torch
    from diffusers import DDIMScheduler

    scheduler, xs, calls = DDIMScheduler(clip_sample=False, prediction_type="sample"), [], []
    scheduler.set_timesteps(steps)
    peer._reset_stateful_cache()
    counter = peer.transformer_blocks[1].attn1.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.tensor(np.asarray(x)).movedim(-1, 1)
    with torch.inference_mode(), peer.cache_context("run"):
        for t in scheduler.timesteps:
            output = peer(x, timestep=t.expand(len(x)), **cond).sample
            x = scheduler.step(output[:, : x.shape[1]], t, x).prev_sample
            xs.append(x.movedim(1, -1).numpy())
    counter.remove()
    return Run(np.stack(xs), len(calls))


def our_run(made: Any, steps: int, shape: tuple[int, ...]) -> Callable[..., Any]:
    """`(params, x, cond) -> (xs, evaluations)` of a denoiser on the same grid."""
    kept = recorded(made, steps, lambda prediction, x, step: x)

    def run(params, x, cond):
        found = sample(
            jax.random.key(0), kept, params, solvers.ddim(), timesteps.leading(steps), shape=shape, x_init=x, cond=cond
        )
        return jnp.concatenate([found.run.carry.values[1:], found.x[None]]), found.cost.evaluations

    return run


def caching(rounds: int, smoke: bool, compiled_peers: bool) -> list[Row]:
    """A DiT of 12 x 384 on one image of 32 x 32 x 4, 20 DDIM steps: plain, TaylorSeer, first-block cache."""
    del compiled_peers
    import diffusers
    import torch
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    from benchmarks import ours, peers
    from diffusion_jax import interop

    peers.same_threads()
    torch.manual_seed(0)
    steps, size = (6, 8) if smoke else (20, 32)
    fields = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 3 if smoke else 12, "sample_size": size}
    peer = diffusers.DiTTransformer2DModel(**fields).eval()
    with torch.no_grad():
        # Zeros in the gates, as at the start of a training, would leave nothing to cache.
        for block in peer.transformer_blocks:
            torch.nn.init.normal_(block.norm1.linear.weight, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        loaded = interop.load_pretrained(folder)
    x = np.random.default_rng(0).normal(size=(1, size, size, 4)).astype(np.float32)
    label, cond = torch.zeros(1, dtype=torch.long), {"label": jnp.zeros(1, jnp.int32)}
    schedule = taylorseer_schedule(3, 3, steps)
    cases = {
        "every step computed": (None, denoiser(loaded.network, PROCESS)),
        "TaylorSeer, interval 3, order 1, warm-up 3": (
            TaylorSeerCacheConfig(3, 3, max_order=1, taylor_factors_dtype=torch.float32, cache_identifiers=[CACHED]),
            cached_features(loaded.network, PROCESS, taylor(1), on_schedule(schedule)),
        ),
        "first-block cache, threshold 0.2": (
            FirstBlockCacheConfig(0.2),
            first_block_cached(loaded.network, PROCESS, 0.2),
        ),
    }
    contenders, notes, compiles = {}, {}, {}
    for name, (config, made) in cases.items():
        module = hooked(peer, config)
        program, compiles[name] = ours.compiled(our_run(made, steps, x.shape), loaded.params, x, cond)

        def mine(program=program):
            return jax.block_until_ready(program(loaded.params, x, cond))

        def theirs(module=module):
            return their_run(module, x, steps, class_labels=label)

        (xs, evaluations), expected = mine(), theirs()
        notes[name] = (
            f"{int(evaluations)} and {expected.full} full steps of {steps}, "
            f"largest difference {np.abs(np.asarray(xs) - expected.xs).max():.0e}"
        )
        contenders |= {f"{name} ours": mine, f"{name} peer": theirs}
    times, rows = interleave(contenders, rounds), []
    for name in cases:
        mine, theirs = times[f"{name} ours"], times[f"{name} peer"]
        rows.append(
            Row(
                case=f"DiT 12×384, 1 of 32×32×4, {steps} DDIM steps: {name}",
                ours=summarise(mine),
                peer="diffusers' hooks" if cases[name][0] else "diffusers",
                theirs=summarise(theirs),
                ratio=ratio(theirs, mine),
                aim=1.0,
                compile_seconds=compiles[name],
                note=notes[name],
            )
        )
        print(f"  {name}: {rows[-1].ratio.value:.2f}×, {rows[-1].note}", flush=True)
    return rows
