"""Schedules for a budget, what a step's error does to the end of a run, and how far two calibrations agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.acceleration import (
    calibrate,
    endpoint_influence,
    offline_schedule,
    record_outputs,
    reuse_overlap,
    spread_schedule,
    threshold_at_count,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import Run, sample

FLOW, STD = processes.rectified_flow(), 0.6


@functools.cache
def recorded():
    params = denoisers.gaussian_mixture(np.array([[1.0, -1.0], [-0.5, 0.5]], np.float32), 0.15)
    grid = timesteps.linspace(12)
    return jax.jit(
        lambda key: record_outputs(key, denoisers.analytic(FLOW), params, solvers.flow_euler(), grid, shape=(16, 2))
    )(jax.random.key(0))


@pytest.mark.parametrize(
    "process, solver, first",
    [(FLOW, solvers.flow_euler(), 1.0), (processes.vp_linear(1000), solvers.ddim(), 0.98)],
    ids=["velocity", "epsilon"],
)
def test_the_influence_is_what_a_wrong_output_does_to_the_end_of_a_gaussian_run(process, solver, first):
    steps, push = 256, 1e-2
    grid = jnp.linspace(first, 0.0, steps + 1)
    influence = endpoint_influence(process, grid, STD)
    params, exact = denoisers.gaussian_mixture(np.zeros((1, 3), np.float32), STD), denoisers.analytic(process)
    alpha, sigma = process.alpha(grid), process.sigma(grid)

    @functools.partial(jax.jit, static_argnames="step")
    def end(x, step):
        return sample(jax.random.key(0), exact, params, solver, grid, resume=Run(x), start=step + 1).x

    for step in (3, 120, 230):
        x = jnp.sqrt(alpha[step + 1] ** 2 * STD**2 + sigma[step + 1] ** 2) * jnp.ones((1, 3))
        if process is FLOW:
            moved = push * (grid[step + 1] - grid[step])
        else:
            ratio = sigma / alpha
            moved = push * alpha[step + 1] * (ratio[step + 1] - ratio[step])
        found = jnp.abs(end(x + moved, step) - end(x, step)).max()
        np.testing.assert_allclose(found, influence[step] * push, rtol=0.03)


def test_an_error_of_the_last_step_stays_as_it_is():
    np.testing.assert_allclose(endpoint_influence(FLOW, jnp.array([1.0, 0.7, 0.3, 0.0]), STD)[-1], 0.3, rtol=1e-6)


def test_weights_of_one_over_the_size_are_the_relative_change():
    runs = recorded()
    kept = runs.output - runs.x
    size = jnp.abs(kept).mean(axis=(1, 2))
    for threshold in (0.05, 0.2):
        relative = offline_schedule(kept, threshold)
        np.testing.assert_array_equal(offline_schedule(kept, threshold, weight=1 / size), relative)
    # What has no influence is never computed, but for the ends.
    silent = offline_schedule(kept, 1e-6, weight=jnp.zeros(len(kept)))
    np.testing.assert_array_equal(np.flatnonzero(silent), [0, len(kept) - 1])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_threshold_for_a_budget_is_the_smallest_that_keeps_it(weighted):
    runs, grid = recorded(), timesteps.linspace(12)
    weight = endpoint_influence(FLOW, grid, STD) if weighted else None
    for count in (3, 6, 12):
        at = threshold_at_count(runs, count, weight=weight)
        asked = [int(calibrate(runs, grid, FLOW, t, weight=weight).computed.sum()) for t in (at, 0.95 * at)]
        assert asked[0] <= count
        assert asked[1] > count or (count == 12 and at == pytest.approx(1e-5, rel=1e-3))
    with pytest.raises(InvalidInput, match="at least 2"):
        threshold_at_count(runs, 1)


def test_schedules_are_spread_evenly_and_overlap_as_sets():
    np.testing.assert_array_equal(np.flatnonzero(spread_schedule(9, 5)), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(spread_schedule(4, 4), True)
    for count in (1, 5):
        with pytest.raises(InvalidInput, match=r"in 2 \.\. 4"):
            spread_schedule(4, count)
    one = calibrate(recorded(), timesteps.linspace(12), FLOW, 0.0)
    first, second = (one._replace(computed=jnp.array(kept, bool)) for kept in ([1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1]))
    assert (reuse_overlap(first, second), reuse_overlap(one, one)) == (0.5, 1.0)
    assert reuse_overlap(first, one._replace(computed=jnp.ones(6, bool))) == 0.0


def test_an_influence_needs_a_spread_and_a_finite_time():
    with pytest.raises(InvalidInput, match="data_std"):
        endpoint_influence(FLOW, timesteps.linspace(4), 0.0)
    with pytest.raises(InvalidInput, match="infinite"):
        endpoint_influence(processes.rectified_flow(prediction="epsilon"), timesteps.linspace(4), 1.0)
