"""Tables: the same noise for all arms, one program for equal ones, costs and values by seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import acceleration, denoisers, processes, solvers, timesteps
from diffusion_jax.metrics import endpoint_error, interleaved
from diffusion_jax.recipes.study import Arm, by_seed, table
from diffusion_jax.sampling import sample

FLOW = processes.rectified_flow()
EXACT = denoisers.analytic(FLOW)
WORLD = denoisers.gaussian_mixture(jnp.array([[1.0, -1.0], [-1.0, 0.5]]), 0.2)
ERROR = {"error": lambda drawn: endpoint_error(drawn.x, drawn.reference), "seed": lambda drawn: drawn.seed}


def test_all_arms_begin_with_the_same_noise_and_are_what_sample_makes():
    arms = {
        "fewer": Arm(EXACT, WORLD, solvers.ddim(), timesteps.linspace(4)),
        "full": Arm(EXACT, WORLD, solvers.ddim(), timesteps.linspace(16)),
    }
    found = table(arms, (3, 4), ERROR, shape=(2,), count=6, reference="full")
    for name, steps in (("fewer", 4), ("full", 16)):
        alone = sample(jax.random.key(3), EXACT, WORLD, solvers.ddim(), timesteps.linspace(steps), shape=(6, 2)).x
        np.testing.assert_allclose(found.samples[name], alone, atol=1e-5)
        assert found[name]["evaluations"] == [steps, steps] == found[name]["compute"]
        assert all(second > 0 for second in found[name]["seconds"]) and len(found[name]["seconds"]) == 2
        assert found[name]["seed"] == [3, 4]
    assert found["full"]["error"] == [0.0, 0.0] and min(found["fewer"]["error"]) > 0.0
    # Another seed is other noise.
    assert found["fewer"]["error"][0] != found["fewer"]["error"][1]


def test_arms_that_differ_in_arrays_share_one_program_at_all_seeds():
    traced = []

    def reused(computed):
        traced.append(computed)
        return acceleration.cached_outputs(EXACT, acceleration.on_schedule(computed))

    solver = solvers.ddim()

    def arms(seed):
        world = denoisers.gaussian_mixture(jax.random.normal(jax.random.key(seed), (2, 2)), 0.2)
        schedules = {f"{count}": jnp.arange(8) < count for count in (3, 5, 8)}
        grid = timesteps.linspace(8)
        return {count: Arm(reused, world, solver, grid, None, (kept,)) for count, kept in schedules.items()}

    found = table(arms, (0, 1), {}, shape=(2,), count=4)
    assert len(traced) == 1
    assert [found[count]["evaluations"] for count in "358"] == [[3, 3], [5, 5], [8, 8]]


def test_what_is_known_stands_where_a_plan_does_and_measures_may_be_one_function_that_is_told_the_arm():
    grid, known = timesteps.linspace(6), np.full((4, 2), 0.7, np.float32)
    plans = {name: timesteps.frames(grid, 2, given) for name, given in (("none", ()), ("first", (0,)))}
    arms = {name: Arm(EXACT, WORLD, solvers.ddim(), plan, known=known) for name, plan in plans.items()}
    arms["nothing known"] = Arm(EXACT, WORLD, solvers.ddim(), plans["none"])
    found = table(arms, (0,), lambda drawn: {"first": float(drawn.arm == "first")}, shape=(2,), count=4)
    np.testing.assert_array_equal(found.samples["first"][:, 0], known[:, 0])
    np.testing.assert_allclose(found.samples["none"], found.samples["nothing known"], atol=1e-6)
    assert {name: row["first"] for name, row in found.figures.items()} == {
        "none": [0.0],
        "first": [1.0],
        "nothing known": [0.0],
    }


def test_an_arm_may_be_any_function_of_the_key():
    run = jax.jit(lambda key: jax.random.normal(key, (4, 2)))
    found = table({"noise": run}, (0,), {"size": lambda drawn: np.square(drawn.x).mean()})
    np.testing.assert_allclose(found["noise"]["size"], np.square(jax.random.normal(jax.random.key(0), (4, 2))).mean())
    assert np.isnan(found["noise"]["evaluations"]).all()


def test_measures_by_seed_are_values_by_seed():
    assert by_seed((2, 5), lambda seed: {"a": seed, "b": 2 * seed}) == {"a": [2.0, 5.0], "b": [4.0, 10.0]}


def test_runs_are_timed_in_turns_after_a_first_call():
    called = []
    seconds = interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert called == list("ab" * 4)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({}, 0)
