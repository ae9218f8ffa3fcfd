"""A tiny denoising problem and its parts, shared by the tests of this package."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import objectives, processes, timesteps
from diffusion_jax.typing import Network

SIZE = 16


class Batches:
    """An endless stream of batches whose iterator knows its position, as grain's do."""

    def __init__(self, size=SIZE, poison=(), width=4):
        self.size, self.poison, self.width = size, frozenset(poison), width

    def __iter__(self):
        return _Iterator(self)


class _Iterator:
    def __init__(self, source):
        self.source, self.at = source, 0

    def __next__(self):
        index = np.arange(self.at * self.source.size, (self.at + 1) * self.source.size)
        x0 = np.stack([np.sin(index * (k + 1)) for k in range(self.source.width)], axis=1).astype(np.float32)
        if self.at in self.source.poison:
            x0[3] = np.nan
        self.at += 1
        return {"x0": x0, "index": index.astype(np.int32)}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def init_params(key, width=4, hidden=16):
    first, second = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(first, (width + 1, hidden)) / 2, "bias": jnp.zeros(hidden)},
        "down": {"kernel": jax.random.normal(second, (hidden, width)) / 4, "bias": jnp.zeros(width)},
    }


def _apply(params, x, t, cond, train=False, key=None):
    h = jnp.concatenate([x, t[:, None]], axis=1)
    h = jnp.tanh(h @ params["up"]["kernel"] + params["up"]["bias"])
    return h @ params["down"]["kernel"] + params["down"]["bias"], {}


NETWORK = Network(init_params, _apply)


def make_objective(draw=None):
    process = processes.rectified_flow(time="t")
    return objectives.denoising(NETWORK, process, timesteps.stratified() if draw is None else draw)


def equal(one, other):
    """Whether two trees have the same structure and the same bits."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return all(
        np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))
    )
