"""Multi-step solvers differentiate with respect to their grids, whatever history an entry has; a user's own one too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import solvers
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import half_log_snr, hub_step, with_history
from diffusion_jax.time_axes import expand
from tests.solvers.test_grid_gradients import check_derivatives
from tests.solvers.test_solver_laws import STEPS, each, ended, smooth

SOLVERS = {
    "deis t": lambda: solvers.deis(2, "t"),
    "dpm_solver": solvers.dpm_solver,
    "dpm_solver restarting": lambda: solvers.dpm_solver(2, "restarting"),
    "dpm_solver_pp": solvers.dpm_solver_pp,
    "lms": lambda: solvers.lms(2),
    "plms": lambda: solvers.plms(2, start="heun", combined="output"),
    "pndm": solvers.pndm,
    "sa_solver": lambda: solvers.sa_solver(2, 2, tau=0.7),
    "unipc": lambda: solvers.unipc(1),
    "unipc eps": lambda: solvers.unipc(1, prediction="eps"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_derivatives_are_finite_differences(name):
    check_derivatives(SOLVERS[name])


def two_step():
    """DPM-Solver++(2M) as a user writes it: the difference to the last x0 of each entry, in half log-SNR."""

    def update(process, x, history, pair, step, noise):
        start, end, before = (half_log_snr(process, t) for t in (step.t, step.t_next, history.times[0]))
        usable = (history.count > 0) & jnp.isfinite(start) & jnp.isfinite(end) & jnp.isfinite(before)
        h = jnp.where(usable, end - start, 1.0)
        gap = jnp.where(usable & (before != start), start - before, 1.0)
        slope = (pair.x0 - history.values[0]) / expand(gap, x)
        weight = jnp.where(usable & (step.remaining > 1), 0.5 * process.alpha(step.t_next) * -jnp.expm1(-h) * h, 0.0)
        return hub_step(process, *pair[:2], step.t_next) + expand(weight, x) * slope, pair.x0

    return with_history(update, length=1, order=2)


def test_a_users_own_multi_step_solver_is_the_built_in_one():
    """Coordinates that start, pause and end at different steps have histories of their own."""
    own = [1.0, 0.8, 0.6, 0.35, 0.15, 0.0]
    columns = [ended([own[0]] * delay + own) for delay in (0, 2, 4)]
    columns[1] = np.concatenate([columns[1][:5], columns[1][4:-1]])
    assert len(columns[1]) == STEPS + 1

    @jax.jit
    def both(grid):
        return [
            sample(jax.random.key(3), smooth(), None, solver, grid, shape=(2, 3)).x
            for solver in (two_step(), solvers.dpm_solver_pp(2))
        ]

    for grid in (each(*columns), each(ended(own), ended(own))):
        own_x, built_in = both(grid)
        np.testing.assert_allclose(own_x, built_in, atol=2e-6)


def test_derivatives_of_a_users_own_one_are_finite_differences():
    check_derivatives(two_step)
