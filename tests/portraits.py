"""A small causal network with audio and a sink, and blocks for it: what tests of pipelines and streams run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models, processes, solvers
from diffusion_jax.pipelined import at_each_level, noise_blocks
from diffusion_jax.streaming import kv_cached
from diffusion_jax.timesteps import linspace
from tests.models.shared import drawn_params

FLOW = processes.rectified_flow()
KEY = jax.random.key(3)
LEVELS, BLOCKS = 3, 5
SHAPE = (2, 2, 4, 4, 3)
REFERENCE = np.random.default_rng(5).standard_normal((2, 4, 4, 3)).astype(np.float32)
AUDIO = np.random.default_rng(6).standard_normal((BLOCKS, 2, 2, 5)).astype(np.float32)
NETWORK = models.video_dit(
    "S/2",
    width=16,
    depth=2,
    heads=2,
    block=2,
    window=2,
    temporal_positions="rotary",
    conditions=(models.reference(), models.audio()),
)
DENOISER = kv_cached(models.incremental(NETWORK), FLOW, sink_at=3.0)


@functools.cache
def portrait():
    """(params, what the levels keep before the first block, the blocks as they enter, their conditions)."""
    begin = {"audio": AUDIO[0], "reference": REFERENCE}
    params = drawn_params(NETWORK, np.ones(SHAPE, np.float32), np.ones(2, np.float32), begin)
    grid, solver = linspace(LEVELS), solvers.flow_euler()

    @jax.jit
    def begun(params):
        empty = at_each_level(DENOISER.init(params, jnp.zeros(SHAPE), begin), LEVELS)
        return empty, noise_blocks(KEY, DENOISER, params, solver, grid, shape=SHAPE, blocks=BLOCKS)

    return params, *begun(params), {"audio": AUDIO}


def cut(tree, first, count):
    """`count` blocks of a tree of them `[M, ...]`, in a compiled program."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), first, count), tree)
