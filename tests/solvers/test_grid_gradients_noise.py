"""Solvers that draw differentiate with respect to their grids at fixed noise; no solver is left out."""

import pytest

from diffusion_jax import solvers
from tests.solvers import test_grid_gradients, test_grid_gradients_history
from tests.solvers.test_grid_gradients import check_derivatives

SOLVERS = {
    "ddim eta": lambda: solvers.ddim(0.5),
    "ddpm": solvers.ddpm,
    "ddpm large": lambda: solvers.ddpm("large"),
    "dpm_solver_pp singlestep": lambda: solvers.dpm_solver_pp(2, "singlestep", "sde"),
    "edm": lambda: solvers.edm(1.0),
    "euler_ancestral": solvers.euler_ancestral,
    "flow_sde": solvers.flow_sde,
    "flow_sde odds": lambda: solvers.flow_sde(diffusion="odds"),
    "kdpm2 ancestral": lambda: solvers.kdpm2(ancestral=True),
    "lcm": solvers.lcm,
    "switched": lambda: solvers.switched([solvers.ddim(0.5), solvers.ddpm()], lambda step: step.index // 2),
    "tcd": solvers.tcd,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_derivatives_are_finite_differences(name):
    check_derivatives(SOLVERS[name])


def test_no_solver_is_left_out():
    """Solvers of discrete data have no derivatives; what else is exported is no solver."""
    discrete = {"ancestral", "unmask", "joint"}
    parts = {"History", "flow_sde_moments", "half_log_snr", "hub_step", "sigma_hat", "with_history"}
    tested = {
        name.split()[0] for name in [*SOLVERS, *test_grid_gradients.SOLVERS, *test_grid_gradients_history.SOLVERS]
    }
    assert tested == set(solvers.__all__) - discrete - parts
