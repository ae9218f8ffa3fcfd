"""Laws of whole outputs that are forecast: refreshed always they are the denoiser, and what they skip costs nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import acceleration, denoisers, processes, solvers
from diffusion_jax.acceleration import cached_outputs, every, on_schedule, taylor
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from tests import shipped
from tests.denoisers.tiny import network, step_at
from tests.models.drawn import drawn

FLOW = processes.rectified_flow()
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, 2), np.float32))
COND = {"label": jnp.asarray(np.arange(8) % 5)}
PARAMS = drawn(jax.eval_shape(network().init, jax.random.key(1), X, None, None))
GRID = jnp.asarray(np.linspace(1.0, 0.0, 7, dtype=np.float32))
NULL = {"label": 4}


def run(denoiser, solver=None, grid=GRID, x=X, params=PARAMS, cond=COND):
    solver = solvers.flow_euler() if solver is None else solver

    @shipped.jit
    def whole(params, x, cond, grid):
        return sample(jax.random.key(2), denoiser, params, solver, grid, x_init=x, cond=cond)

    return whole(params, x, cond, grid)


def plain(process=FLOW, on_call=None):
    return denoisers.denoiser(network(on_call=on_call), process)


@functools.cache
def plain_run():
    return run(plain())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("prediction", [None, "epsilon", "x0"])
def test_refreshed_at_every_step_it_is_the_denoiser_bit_for_bit(prediction, residual):
    found = run(cached_outputs(plain(), every(1), prediction=prediction, residual=residual))
    expected = plain_run()
    np.testing.assert_array_equal(found.x, expected.x)
    assert float(found.cost.evaluations) == float(expected.cost.evaluations) == 6


def test_skipped_steps_ask_no_network():
    calls = []
    found = run(cached_outputs(plain(on_call=lambda rows: calls.append(int(rows))), every(3)))
    jax.effects_barrier()
    assert calls == [8, 8] and float(found.cost.evaluations) == 2


def test_the_reused_velocity_is_the_solver_on_the_computed_steps_alone():
    computed = jnp.array([True, False, False, True, True, False])
    found = run(cached_outputs(plain(), on_schedule(computed)))
    coarse = run(plain(), grid=GRID[jnp.array([0, 3, 4, 6])])
    np.testing.assert_allclose(found.x, coarse.x, atol=1e-5)
    assert float(jnp.abs(run(cached_outputs(plain(), on_schedule(computed), residual=True)).x - coarse.x).max()) > 1e-2


@pytest.mark.parametrize("residual", [False, True])
def test_a_straight_line_needs_two_values_and_any_parameterisation_of_a_constant_one(residual):
    mixture = denoisers.gaussian_mixture(jnp.ones((1, 4, 2)), 0.0)
    exact = denoisers.analytic(FLOW)
    # One point: the clean sample and the noise never change along a run, the velocity neither.
    for prediction in ("x0", "epsilon", "velocity"):
        if not residual:
            found = run(cached_outputs(exact, every(9), prediction=prediction), params=mixture, cond=None)
            np.testing.assert_allclose(found.x, jnp.ones_like(X), atol=1e-5)
            assert float(found.cost.evaluations) == 1
    if residual:
        # v - x is linear in the index then, so its first-order forecast is exact.
        found = run(cached_outputs(exact, every(9, 2), taylor(1), residual=True), params=mixture, cond=None)
        np.testing.assert_allclose(found.x, jnp.ones_like(X), atol=1e-5)
        assert float(found.cost.evaluations) == 2


def test_the_correction_is_a_line_by_step_and_by_channel_subtracted_from_what_was_reused():
    schedule = jnp.array([True, False, False, True, True, False])
    slope, bias = jnp.zeros((6, 2)).at[1].set(0.5), jnp.zeros((6, 2)).at[1, 1].set(0.25)

    def velocities(correction):
        denoiser = cached_outputs(plain(), on_schedule(schedule), correction=correction)

        @jax.jit
        def ask(correction_x):
            carry, found = denoiser.init(PARAMS, X, COND), []
            for index in range(3):
                step = step_at(1.0 - index / 6, index, num_steps=6)
                answer, carry = denoiser.apply(PARAMS, carry, correction_x, step, COND)
                found.append(FLOW.velocity(answer, step.t))
            return jnp.stack(found)

        return ask(X)

    before, after = velocities(None), velocities((slope, bias))
    expected = before.at[1].set(0.5 * before[1] - jnp.array([0.0, 0.25]))
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_joint_data_with_a_time_each_keeps_an_output_each():
    joint = processes.JointProcess({"a": FLOW, "b": processes.cosine()})
    x = {"a": X, "b": X[:, 0]}
    params = drawn(jax.eval_shape(network().init, jax.random.key(3), x, None, None), seed=3)
    grid = {"a": GRID, "b": np.asarray(GRID)[:, None] * np.linspace(0.2, 1.0, 8, dtype=np.float32)}
    inner = denoisers.denoiser(network(), joint)
    correction = {"a": (jnp.zeros(6), jnp.zeros(6)), "b": None}
    kwargs = {"solver": solvers.ddim(), "grid": grid, "x": x, "params": params}
    expected = run(inner, **kwargs)
    found = run(cached_outputs(inner, every(1), residual=True, correction=correction, along="t"), **kwargs)
    chex.assert_trees_all_equal(found.x, expected.x)
    skipped = run(cached_outputs(inner, every(2), residual=True, correction=correction), **kwargs)
    assert float(skipped.cost.evaluations) == 3
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(skipped.x))


def test_guidance_is_kept_as_a_whole_or_for_each_branch_and_shards_with_the_batch():
    inside = denoisers.guided(cached_outputs(plain(), every(2)), 2.0, NULL)
    outside = cached_outputs(denoisers.guided(plain(), 2.0, NULL), every(2))
    a, b = run(inside), run(outside)
    np.testing.assert_allclose(a.x, b.x, atol=1e-5)
    assert float(a.cost.evaluations) == float(b.cost.evaluations) == 6
    index = jnp.arange(8)
    for solver in (solvers.flow_euler(), solvers.flow_heun()):
        found = [
            make_sampler(outside, solver, shape=(4, 2), mesh=mesh)(jax.random.key(0), PARAMS, GRID, COND, index)
            for mesh in (None, make_mesh(data=8))
        ]
        np.testing.assert_allclose(found[0].x, found[1].x, atol=1e-6)
        assert float(found[0].cost.evaluations) == float(found[1].cost.evaluations)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(InvalidInput, match="discrete"):
        cached_outputs(denoisers.denoiser(network(4), processes.absorbing(4)), every(2))
    with pytest.raises(InvalidInput, match="prediction"):
        cached_outputs(plain(), every(2), prediction="flow")
    with pytest.raises(InvalidInput, match="along"):
        cached_outputs(plain(), every(2), along="step")
    with pytest.raises(InvalidInput, match="a value a step"):
        cached_outputs(plain(), every(2), correction=acceleration.Correction(0.0, 0.0))
    joint = denoisers.denoiser(network(), processes.JointProcess({"a": FLOW}))
    with pytest.raises(InvalidInput, match="one noise level"):
        cached_outputs(joint, every(2), along="log_snr")
