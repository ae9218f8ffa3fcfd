"""Runs that one model begins and another ends, by one solver or each by its own: who steps, at which noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, processes, solvers, timesteps
from diffusion_jax.denoisers import denoiser, recorded, switched
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from tests import shipped
from tests.models.drawn import drawn

VP = processes.vp_linear()
NETWORK = models.dit("S/2", width=16, depth=2, heads=2, conditions=(models.label(3),))
DENOISER = denoiser(NETWORK, VP)
SHAPE = (4, 4, 1)
COND = {"label": jnp.array([0, 1, 2, 1])}
GRID = timesteps.from_array([0.7, 0.25, 0.12, 0.05, 0.0])
KEY = jax.random.key(3)
BASE, STUDENT = (drawn(models.param_shapes(NETWORK, (1, *SHAPE), {"label": np.zeros(1, np.int32)}), s) for s in (1, 2))
SOLVERS = {"lcm": solvers.lcm(), "ddim": solvers.ddim()}


def draw(solver, inner, params, grid=GRID, **options):
    options = {"shape": (4, *SHAPE), "cond": COND, **options}
    return sample(KEY, inner, params, solver, grid, **options)


@pytest.mark.parametrize("name", SOLVERS)
def test_none_and_all_steps_of_the_base_are_the_two_samplers(name):
    @shipped.jit
    def run(params, which):
        found = draw(SOLVERS[name], recorded(switched((DENOISER, DENOISER), which), 4), params)
        return found.x, found.run.carry.values, found.cost

    plain = shipped.jit(lambda params: draw(SOLVERS[name], DENOISER, params).x)
    tables = [timesteps.spliced(GRID, GRID, k).which for k in range(5)]
    both = [run((BASE, STUDENT), which) for which in tables]
    np.testing.assert_array_equal(both[0][0], plain(STUDENT))
    np.testing.assert_array_equal(both[4][0], plain(BASE))
    assert float(jnp.abs(both[1][0] - both[0][0]).max()) > 1e-3
    for k, (x, said, cost) in enumerate(both):
        # A model that takes over from itself changes nothing, whatever the table: noise belongs to the step.
        np.testing.assert_array_equal(run((BASE, BASE), tables[k])[0], both[4][0])
        assert cost.evaluations == 4, k
        # The same first step until the base makes one, the same last one as long as the student does.
        np.testing.assert_array_equal(said[0], both[4 if k else 0][1][0])
        np.testing.assert_allclose(said[-1], x, atol=1e-5)


def test_the_base_is_asked_k_times_and_the_student_in_the_other_steps():
    @jax.jit
    def asked(params, which):
        return draw(SOLVERS["lcm"], switched((DENOISER, DENOISER), which, compute=(1.0, 100.0)), params).cost

    for k in range(5):
        cost = asked((BASE, STUDENT), timesteps.spliced(GRID, GRID, k).which)
        assert cost.evaluations == 4
        assert cost.compute == k + 100 * (4 - k)


def test_each_solver_makes_its_own_steps_as_in_two_segments():
    """A run handed over on a grid of the first model's own, with a multi-step method in front and noise behind."""
    grid, which, stop = timesteps.spliced(timesteps.linspace(8), GRID, 1)
    assert (stop, len(which)) == (6, 9)
    first, second = solvers.dpm_solver_pp(2), solvers.lcm()

    @jax.jit
    def run(params, which):
        both = solvers.switched((first, second), which)
        whole = draw(both, recorded(switched((DENOISER, DENOISER), which), 9), params, grid)
        begun = draw(first, DENOISER, params[0], grid, stop=stop).run._replace(state=None)
        ended = sample(KEY, DENOISER, params[1], second, grid, resume=begun, cond=COND, start=stop)
        return whole.x, ended.x, whole.cost, ended.cost

    whole, parts, *costs = run((BASE, STUDENT), which)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)
    assert costs[0].evaluations == costs[1].evaluations == 9


def test_a_solver_that_takes_over_again_begins_anew_and_one_alone_is_itself():
    first, second = solvers.dpm_solver_pp(2), solvers.ddim()

    @jax.jit
    def run(which):
        return draw(solvers.switched((first, second), which), DENOISER, BASE).x

    plain = jax.jit(lambda: (draw(first, DENOISER, BASE).x, draw(second, DENOISER, BASE).x))()
    for number in (0, 1):
        np.testing.assert_allclose(run(jnp.full(4, number)), plain[number], atol=1e-5)
    # Without a history its step is of first order, which DDIM's is too.
    np.testing.assert_allclose(run(jnp.array([0, 1, 0, 1])), run(jnp.array([1, 1, 1, 1])), atol=1e-4)
    assert np.abs(run(jnp.array([0, 0, 1, 1])) - plain[1]).max() > 1e-3


def test_samples_do_not_depend_on_their_batch():
    """`make_sampler` asks solvers where the batch stands in what they remember."""
    both = solvers.switched((solvers.dpm_solver_pp(2), solvers.lcm()), (0.2,))
    run = make_sampler(DENOISER, both, shape=SHAPE)
    whole = run(KEY, BASE, GRID, COND, jnp.arange(4)).x
    half = run(KEY, BASE, GRID, {"label": COND["label"][2:]}, jnp.array([2, 3])).x
    np.testing.assert_allclose(whole[2:], half, atol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(InvalidInput, match="Two solvers or more"):
        solvers.switched((solvers.ddim(),))
    with pytest.raises(InvalidInput, match="1 boundaries between 2 solvers"):
        solvers.switched((solvers.ddim(), solvers.lcm()), (0.5, 0.3))
    with pytest.raises(InvalidInput, match="which"):
        solvers.switched((solvers.ddim(), solvers.lcm()), 0.5)
