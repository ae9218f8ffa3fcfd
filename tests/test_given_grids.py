"""A grid is what NumPy makes an array of: lists, tuples, integers, any precision; what is none is told in a sentence.

Every public function that takes a grid is asked with the same one in every form, and with grids that cannot be.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import (
    acceleration,
    clock,
    denoisers,
    objectives,
    pipelined,
    processes,
    sampling,
    solvers,
    streaming,
    timesteps,
)
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.errors import InvalidInput

FLOW = processes.rectified_flow()
KEY = jax.random.key(0)
MIXTURE = gaussian_mixture([[0.5, -0.5]], 0.3)
DENOISER = analytic(FLOW)
NOISE = np.zeros((1, 2), np.float32)


def run(grid):
    return sampling.sample(KEY, DENOISER, MIXTURE, solvers.ddim(), grid, shape=(2, 2)).x


def _buffer(grid):
    return streaming.rolling(DENOISER, solvers.ddim(), grid, entries=2, chunk=1).plan


TAKERS = {
    "sample": run,
    "make_sampler": lambda grid: (
        sampling.make_sampler(DENOISER, solvers.ddim(), shape=(2,))(KEY, MIXTURE, grid, index=jnp.arange(2)).x
    ),
    "invert": lambda grid: sampling.invert(KEY, DENOISER, MIXTURE, solvers.ddim(), grid, x_init=NOISE).x,
    "num_steps": clock.num_steps,
    "remaining": lambda grid: clock.clock(grid).remaining,
    "shift": lambda grid: timesteps.shift(grid, 3.0),
    "resolution_shift": timesteps.resolution_shift,
    "from_array": timesteps.from_array,
    "padded": lambda grid: timesteps.padded(grid, 4),
    "spliced": lambda grid: timesteps.spliced(grid, grid, 1).grid,
    "synchronous": lambda grid: timesteps.synchronous(grid, 2),
    "multiplied": lambda grid: timesteps.multiplied(grid, [1.0, 0.0]),
    "frames": lambda grid: timesteps.frames(grid, 2),
    "roles": lambda grid: timesteps.roles(grid, {"image": "generate"})["image"],
    "staircase": lambda grid: timesteps.staircase(grid, 2, 1),
    "chunk_staircase": lambda grid: timesteps.chunk_staircase(grid, 2, 1),
    "on_grid": lambda grid: timesteps.on_grid(grid).draw((), KEY, (4,))[0],
    "rolling": _buffer,
    "refresh_table": lambda grid: acceleration.refresh_table(acceleration.every(2), grid),
    "time_table": lambda grid: denoisers.time_table((0.4,), grid),
    "adjusted_grid": lambda grid: acceleration.adjusted_grid(grid, [0.5, 0.5]),
    "endpoint_influence": lambda grid: acceleration.endpoint_influence(FLOW, grid, 0.5),
    "record_outputs": lambda grid: (
        acceleration.record_outputs(KEY, DENOISER, MIXTURE, solvers.ddim(), grid, shape=(2, 2)).output
    ),
    "denoising_stage": lambda grid: pipelined.denoising_stage(DENOISER, solvers.ddim(), grid) and 0,
    "few_step_answers": lambda grid: objectives.few_step_answers(DENOISER, grid) and 0,
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_grid_may_be_given_in_any_form(name):
    take = TAKERS[name]
    expected = take(jnp.array([1.0, 0.5, 0.0]))
    for form in ([1.0, 0.5, 0.0], (1, 0.5, 0), np.array([1.0, 0.5, 0.0]), np.array([1.0, 0.5, 0.0], np.float16)):
        np.testing.assert_array_equal(take(form), expected)


@pytest.mark.parametrize("name", sorted(set(TAKERS) - {"num_steps", "remaining"}))
def test_what_is_no_grid_is_told_in_a_sentence(name):
    for wrong in ([0.0, 0.5, 1.0], [1.0, float("nan"), 0.0], [2.0, 1.0, 0.0], [1.0]):
        with pytest.raises(InvalidInput):
            TAKERS[name](wrong)


def test_indices_are_numbers():
    for form in ([9, 4, 0], (9, 4, 0), np.array([9.0, 4.0, 0.0])):
        np.testing.assert_allclose(timesteps.from_indices(form, 10), [1.0, 0.5, 0.1, 0.0])
    for wrong in (["a"], [float("nan")], [4, 9], [10], [-1], []):
        with pytest.raises(InvalidInput):
            timesteps.from_indices(wrong, 10)
