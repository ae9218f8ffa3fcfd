"""Laws of rollouts: the stream block after block, what gradients reach, and plain autoregression as a special case."""

import jax
import numpy as np
import pytest

from diffusion_jax import models, solvers
from diffusion_jax.distributed import sequential
from diffusion_jax.errors import InvalidInput
from diffusion_jax.pipelined import caching_stage, kv_cached, rollout
from diffusion_jax.timesteps import linspace
from tests.portraits import DENOISER, FLOW, LEVELS, NETWORK, REFERENCE, cut, portrait

SOLVER, GRID = solvers.flow_euler(), linspace(LEVELS)


def test_a_rollout_through_all_levels_is_the_stream():
    inputs = portrait()
    there, kept = jax.jit(sequential(caching_stage(DENOISER, SOLVER, GRID), LEVELS))(*inputs)
    run = jax.jit(rollout(DENOISER, SOLVER, GRID))
    x0, caches = run(*inputs, np.int32(LEVELS - 1))
    np.testing.assert_allclose(x0, there.run.x, atol=1e-5)
    for a, b in zip(jax.tree.leaves(caches), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # Left early, only the levels before have seen anything.
    _, caches = run(*inputs, np.int32(1))
    np.testing.assert_array_equal(caches.count, [5, 5, 0])


@pytest.mark.parametrize("history", [None, 0.0])
def test_gradients_reach_one_evaluation_of_each_block_and_not_the_history(history):
    params, empty, noise, cond = portrait()
    empty = jax.device_get(empty)
    if history is not None:
        empty = jax.tree.map(lambda leaf: leaf[0], empty)
    run = rollout(DENOISER, SOLVER, GRID, history)
    exit = np.int32(1)

    @jax.jit
    def slope(params, carry, first, told, exit):
        """The gradient of what one of two blocks from `first` on has become."""

        def loss(params):
            x0, _ = run(params, carry, *cut((noise, cond), first, 2), exit)
            return (x0[told] ** 2).sum()

        return jax.grad(loss)(params)

    whole = jax.device_get(slope(params, empty, 0, 1, exit))
    _, given = jax.jit(lambda params, carry, exit: run(params, carry, *cut((noise, cond), 0, 1), exit))(
        params, empty, exit
    )
    alone = jax.device_get(slope(params, given, 1, 0, exit))
    norm = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    assert norm > 0
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * norm)


def test_one_level_with_a_clean_history_is_plain_autoregression():
    params, empty, noise, cond = portrait()
    run = rollout(kv_cached(models.incremental(NETWORK), FLOW), SOLVER, linspace(1), 0.0)
    # Three blocks, of which the last sees both others: the window is not felt.
    x0, x = jax.device_get(
        jax.jit(
            lambda params, empty, noise: (
                run(params, jax.tree.map(lambda leaf: leaf[0], empty), *cut((noise, cond), 0, 3))[0],
                noise.run.x[:3],
            )
        )(params, empty, noise)
    )
    told = {"audio": np.concatenate(cond["audio"][:3], axis=1), "reference": REFERENCE}
    network = jax.jit(lambda params, x, t: NETWORK.apply(params, x, FLOW.network_time(t), told)[0])
    for i in range(3):
        # The whole clip at once: clean blocks at time 0, the next one at time 1, and what it does not see.
        clip = np.concatenate([*x0[:i], *x[i:]], axis=1)
        t = np.tile((np.arange(6) >= 2 * i).astype(np.float32), (2, 1))
        output = np.asarray(network(params, clip, t))
        np.testing.assert_allclose(x0[i], (clip - output)[:, 2 * i : 2 * i + 2], atol=2e-5)


def test_a_history_is_a_time():
    with pytest.raises(InvalidInput, match="history"):
        rollout(DENOISER, SOLVER, linspace(2), 1.5)
