"""Solvers that are one another in limiting cases, and those that only look alike."""

import functools

import jax
import numpy as np
import pytest

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.sampling import sample

FLOW = processes.rectified_flow()
MIXTURE = jax.device_get(gaussian_mixture([[0.0, 1.0, 0.5], [1.0, -1.0, 0.0]], [0.5, 0.3]))
GRID = np.array([1.0, 0.7, 0.4, 0.1, 0.0], np.float32)
DDIM, HEUN, LCM, DPM = solvers.ddim(), solvers.heun(), solvers.lcm(), solvers.dpm_solver_pp(2)
DDIM_1 = solvers.ddim(1.0)

SAME = {
    "ddim(eta=1) is ddpm": (DDIM_1, solvers.ddpm("small")),
    "ddim(eta=1) is the sde of order 1": (DDIM_1, solvers.dpm_solver_pp(1, equation="sde")),
    "dpm_solver_pp(1) is ddim": (solvers.dpm_solver_pp(1), DDIM),
    "dpm_solver(1) is ddim": (solvers.dpm_solver(1, "singlestep"), DDIM),
    "deis(1) is ddim": (solvers.deis(1), DDIM),
    "restarting after every step is ddim": (solvers.dpm_solver_pp(1, "restarting"), DDIM),
    "no run of 4 steps is shorter than 4": (solvers.lms(3, 4), solvers.lms(3, False)),
    "a run of 4 steps is shorter than 5": (solvers.lms(3, 5), solvers.lms(3, True)),
    "without its corrector unipc(1) is ddim": (solvers.unipc(1, disable_corrector=(0, 1, 2)), DDIM),
    "midpoint and heun differ": (solvers.dpm_solver_pp(2, solver_type="heun"), DPM),
    "flow_euler is ddim": (solvers.flow_euler(), DDIM),
    "tcd(0) is ddim": (solvers.tcd(0.0), DDIM),
    "tcd(1) is lcm": (solvers.tcd(1.0), LCM),
    "edm without churn is heun": (solvers.edm(s_churn=0.0), HEUN),
    "a whole run lacks no outputs": (solvers.lms(3, start="zeros"), solvers.lms(3)),
    "a run from the beginning is never late": (solvers.plms(start="diffusers"), solvers.plms(start="heun")),
    "b1 and b2 differ": (solvers.unipc(2, "b1"), solvers.unipc(2, "b2")),
}


@functools.cache
def compiled(solver):
    """What a solver makes of the mixture, `(grid, x_init) -> x`."""

    @jax.jit
    def program(grid, x_init):
        return sample(jax.random.key(3), analytic(FLOW), MIXTURE, solver, grid, x_init=x_init).x

    return lambda *args: jax.device_get(program(*args))


X = np.random.default_rng(3).standard_normal((2, 3)).astype(np.float32)


@pytest.mark.parametrize("name", SAME)
def test_limiting_cases_agree(name):
    one, other = (compiled(solver)(GRID, X) for solver in SAME[name])
    assert np.allclose(one, other, atol=2e-5) != ("differ" in name)


def test_a_run_from_the_middle_keeps_the_blocks_of_the_whole_grid():
    """Seven steps in blocks of 1, 2, 3: from step 3 on they are those of the rest of the grid, from step 2 on not."""
    solver, grid = solvers.dpm_solver_pp(3, "restarting", lower_order_final=False), np.linspace(0.9, 0.1, 8)

    def run(solver, grid, start):
        return sample(jax.random.key(3), analytic(FLOW), MIXTURE, solver, grid, x_init=X, start=start).x

    np.testing.assert_allclose(run(solver, grid, 3), run(solver, grid[3:], 0), atol=2e-6)
    # Its first step is of first order, and then a block begins.
    first = run(DDIM, grid[2:4], 0)
    expected = sample(jax.random.key(3), analytic(FLOW), MIXTURE, solver, grid[3:], x_init=first).x
    np.testing.assert_allclose(run(solver, grid, 2), expected, atol=2e-6)
    assert np.abs(run(solver, grid, 2) - run(solver, grid[2:], 0)).max() > 1e-5


def test_outputs_of_steps_that_were_not_made_count_as_nothing():
    """From step 2, three terms of equal steps in sigma / alpha: x / alpha moves by 23 / 12 of Euler's step."""
    grid = np.asarray(1.0 / (1.0 + 1.0 / np.array([0.9, 0.7, 0.5, 0.3])))
    ran = {
        name: sample(
            jax.random.key(3), analytic(FLOW), MIXTURE, solver, grid, x_init=X, start=2
        ).x / FLOW.alpha(grid[-1])
        for name, solver in {"zeros": solvers.lms(3, start="zeros"), "ddim": DDIM}.items()
    }  # fmt: skip
    begun = X / FLOW.alpha(grid[2])
    np.testing.assert_allclose(ran["zeros"] - begun, 23 / 12 * (ran["ddim"] - begun), rtol=2e-4, atol=2e-5)


LAST = {
    "heun": HEUN,
    "flow_heun": solvers.flow_heun(),
    "dpm_solver_pp": DPM,
    "unipc": solvers.unipc(3),
    "lms": solvers.lms(),
}


@pytest.mark.parametrize("name", LAST)
def test_one_step_to_zero_is_the_prediction_of_x0(name):
    x = np.array([[0.3, -0.5, 1.0], [2.0, 0.1, 0.0]], np.float32)
    grid = np.array([0.6, 0.0], np.float32)
    np.testing.assert_allclose(compiled(LAST[name])(grid, x), compiled(DDIM)(grid, x), atol=1e-6)
