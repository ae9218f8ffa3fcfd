"""The clock: what is counted on a grid, and that the draws of a run do not meet."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import randomness
from diffusion_jax.clock import clock, num_steps
from diffusion_jax.timesteps import staircase

GRID = jnp.array([1.0, 0.6, 0.6, 0.2, 0.0])
KEY = jax.random.key(3)


def test_a_step_is_a_row_of_the_grid_and_counts_the_steps_that_still_move_each_entry():
    grid = {"image": staircase(GRID, 3, 2), "text": jnp.broadcast_to(GRID[-1], (9, 2))}
    keys = jax.random.split(KEY, 2)
    ticks = clock(grid).with_keys(keys)
    assert num_steps(grid) == 8
    for index in range(8):
        step = ticks.step(jnp.int32(index))
        assert (step.index, step.num_steps) == (index, 8)
        for name, values in grid.items():
            left = [values[i] != values[i + 1] for i in range(index, 8)]
            np.testing.assert_array_equal(step.remaining[name], np.sum(left, axis=0))
            np.testing.assert_array_equal(step.t[name], values[index])
            np.testing.assert_array_equal(step.t_next[name], values[index + 1])
        np.testing.assert_array_equal(jax.random.key_data(step.key), jax.random.key_data(ticks.step(0).key))


def test_what_a_sample_draws_in_a_run_is_drawn_from_keys_that_differ():
    keys = jax.random.split(KEY, 4)
    ticks = clock(GRID).with_keys(keys)
    streams = [randomness.prior_key(keys), randomness.corruption_key(keys), ticks.denoiser_keys]
    drawn = jnp.concatenate([*streams, *(ticks.solver_key(index) for index in range(num_steps(GRID)))])
    assert len(np.unique(jax.random.key_data(drawn), axis=0)) == len(drawn) == 28
