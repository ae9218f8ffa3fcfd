"""Stitched trajectories: ends, equal models, other parameterisations, segments, devices, histories, fewer steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, processes, sampling, solvers, timesteps
from diffusion_jax.denoisers import by_share, on_process, switched, time_table
from diffusion_jax.distributed import make_mesh
from tests import shipped

STEPS = 10
GRID = timesteps.linspace(STEPS)
KEY = jax.random.key(0)
VP = processes.vp_linear()
SHAPE, COND = (8, 4, 4, 1), {"label": jnp.arange(8) % 4}


@functools.cache
def table(share):
    """Which of two models runs at each step."""
    return np.asarray(jax.jit(lambda: time_table(by_share(share), GRID))())


def generate(d, params, solver=None, **more):
    return sampling.sample(KEY, d, params, solver or solvers.ddim(), GRID, cond=COND, **more)


@pytest.fixture(scope="module")
def pair():
    """A small and a large transformer on 4 x 4 images, with weights that do something."""
    made = []
    for width, depth in ((8, 1), (16, 2)):
        network = models.dit("S/2", width=width, depth=depth, heads=2, conditions=(models.label(4),))
        inputs = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
        params, draws = jax.jit(network.init)(KEY, *inputs), np.random.default_rng(width)
        params = jax.tree.map(
            lambda leaf, draws=draws: jnp.asarray(leaf + 0.2 * draws.normal(size=leaf.shape), jnp.float32), params
        )
        made.append((denoisers.denoiser(network, VP), params))
    return tuple(zip(*made, strict=True))


@pytest.fixture(scope="module")
def run(pair):
    """One compiled program for every table."""
    both, params = pair

    compiled = shipped.jit(lambda params, which: generate(switched(both, which), params, shape=SHAPE).x)
    return lambda which: np.asarray(compiled(params, jnp.asarray(which, jnp.int32)))


@pytest.mark.parametrize("number", [0, 1])
def test_a_share_of_one_or_none_is_the_sampler_of_one_model_bit_for_bit(pair, run, number):
    (both, params), which = pair, table(1.0 - number)
    assert which.tolist() == [number] * STEPS
    alone = shipped.jit(lambda p: generate(both[number], p, shape=SHAPE).x)
    np.testing.assert_array_equal(run(which), alone(params[number]))
    assert np.abs(run(which) - run(1 - which)).max() > 0.1


def test_equal_models_are_the_same_at_every_share_and_in_any_order(pair):
    """Nothing of a turn is left in the next one: not in x, not in the solver, not in what a denoiser keeps."""
    both, params = pair

    @jax.jit
    def sample(which):
        d = switched((both[0], both[0]), which)
        return generate(d, (params[0], params[0]), solvers.dpm_solver_pp(2), shape=SHAPE).x

    one = sample(jnp.zeros(STEPS, jnp.int32))
    tables = [table(share) for share in (0.2, 0.4, 1.0)] + [np.random.default_rng(0).integers(0, 2, STEPS)]
    for which in tables:
        np.testing.assert_array_equal(sample(jnp.asarray(which, jnp.int32)), one)


def test_one_denoiser_in_other_parameterisations_and_schedules_gives_one_trajectory():
    mixture = denoisers.gaussian_mixture([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]], 0.3)
    exact = [denoisers.analytic(processes.vp_linear(prediction=name)) for name in ("epsilon", "v", "x0")]
    others = [denoisers.analytic(p) for p in (processes.rectified_flow(), processes.cosine("x0"))]
    every = [*exact, *(on_process(other, VP) for other in others)]

    @jax.jit
    def sample(which):
        d = switched(every, which)
        result = sampling.sample(KEY, d, (mixture,) * 5, solvers.ddim(), GRID, shape=(16, 2), save_every=1)
        return result.trace

    one = sample(jnp.zeros(STEPS, jnp.int32))
    tables = [np.where(table(share) == 0, other, 0) for share in (0.4, 0.8) for other in range(1, 5)]
    for which in [*tables, np.arange(STEPS) % 5]:
        np.testing.assert_allclose(sample(jnp.asarray(which, jnp.int32)), one, rtol=1e-5, atol=1e-5)


def test_one_scan_of_a_switch_is_a_scan_for_each_segment_with_the_solvers_state_passed_on(pair):
    (both, params), solver = pair, solvers.dpm_solver_pp(2)

    @shipped.jit
    def segments(p):
        first = generate(both[0], p[0], solver, shape=SHAPE, stop=4)

        def rest(**changed):
            handed = first.run._replace(carry=None, **changed)
            made = generate(both[1], p[1], solver, resume=handed, start=4, save_every=1)
            return made.x, made.trace[0]

        step = generate(both[1], p[1], x_init=first.x, start=4, stop=5).x
        return rest(), rest(state=None), step

    carried, (end, after), first_order = segments(params)
    whole = shipped.jit(lambda p: generate(switched(both, by_share(0.4)), p, solver, shape=SHAPE).x)
    np.testing.assert_allclose(whole(params), carried[0], rtol=1e-6, atol=1e-6)
    # Without its history the multi-step method begins with a first-order step.
    np.testing.assert_allclose(after, first_order, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(after - carried[1]).max()) > 1e-4
    assert float(jnp.abs(end - carried[0]).max()) < 0.2 * float(jnp.abs(end).max())


def test_a_mesh_splits_the_batch_and_every_device_switches(pair, run):
    both, params = pair
    mesh = make_mesh(data=8)
    sampler = sampling.make_sampler(switched(both, by_share(0.4)), solvers.ddim(), shape=(4, 4, 1), mesh=mesh)
    split = sampler(KEY, params, GRID, COND, jnp.arange(8))
    whole = run(table(0.4))
    # Random weights drive x far out, and rounding with it.
    np.testing.assert_allclose(split.x, whole, atol=1e-6 * float(jnp.abs(whole).max()))
    assert float(split.cost.evaluations) == STEPS


def test_fewer_steps_and_three_models_are_values_of_one_program():
    ring = denoisers.gaussian_mixture(np.eye(4, 2), 0.15)
    params = *(denoisers.merged_components(ring, groups) for groups in ([0] * 4, [0, 0, 1, 1])), ring

    @jax.jit
    def sample(which, grid):
        d = switched((denoisers.analytic(VP),) * 3, which, compute=(0.1, 0.3, 1.0))
        return sampling.sample(KEY, d, params, solvers.ddim(), grid, shape=(8, 2))

    mixed = sample(time_table(by_share(0.5, 0.2), GRID), GRID)
    np.testing.assert_allclose(float(mixed.cost.compute), 5 * 0.1 + 2 * 0.3 + 3.0, rtol=1e-5)
    fewer = timesteps.linspace(6)
    inside = sample(jnp.full(STEPS, 2), timesteps.padded(fewer, STEPS)).x
    np.testing.assert_allclose(inside, sample(jnp.full(6, 2), fewer).x, atol=1e-6)
