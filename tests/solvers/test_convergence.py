"""With the exact denoiser of a mixture in one dimension every deterministic solver converges at its order.

In one dimension the probability flow keeps the cumulative distribution, so the exact flow is `F_end^-1(F_start(x))`, a
reference that owes nothing to the library. Slopes are measured in float64, for float32 round-off would hide them, from
one compiled run per case: half the batch takes the coarse grid, padded by zero-length steps, half the fine one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import enable_x64
from scipy.optimize import brentq
from scipy.stats import norm

from diffusion_jax import processes, solvers
from diffusion_jax.denoisers.analytic import analytic, gaussian_mixture
from diffusion_jax.sampling import invert, sample

MEANS, STDS, WEIGHTS = np.array([0.0, 1.0, -1.5]), np.array([0.5, 0.3, 0.7]), np.array([0.5, 0.3, 0.2])
START, END, STEPS = 0.9, 0.2, 64
POINTS = np.array([-1.2, 0.1, 1.4])

PROCESSES = {
    "vp": processes.gvp(),
    "edm": processes.edm(sigma_max=10.0),
    "flow": processes.rectified_flow(),
}

SOLVERS = {
    "ddim": (solvers.ddim(), 1),
    "dpm_solver 2": (solvers.dpm_solver(2, lower_order_final=False), 2),
    "dpm_solver 3": (solvers.dpm_solver(3, lower_order_final=False), 3),
    "dpm_solver 2 singlestep": (solvers.dpm_solver(2, "singlestep"), 2),
    "dpm_solver 3 singlestep": (solvers.dpm_solver(3, "singlestep"), 3),
    "dpm_solver_pp 2": (solvers.dpm_solver_pp(2, lower_order_final=False), 2),
    "dpm_solver_pp 3": (solvers.dpm_solver_pp(3, lower_order_final=False), 3),
    "dpm_solver_pp 2 singlestep": (solvers.dpm_solver_pp(2, "singlestep"), 2),
    "dpm_solver_pp 3 singlestep": (solvers.dpm_solver_pp(3, "singlestep"), 3),
    "unipc 1": (solvers.unipc(1, lower_order_final=False), 2),
    "unipc 2": (solvers.unipc(2, lower_order_final=False), 3),
    "unipc 2 b1": (solvers.unipc(2, "b1", lower_order_final=False), 3),
    "unipc 3": (solvers.unipc(3, lower_order_final=False), 4),
    "sa_solver 3": (solvers.sa_solver(3, 3, tau=0.0, lower_order_final=False), 3),
    "deis 3": (solvers.deis(3, lower_order_final=False), 3),
    "deis 3 t": (solvers.deis(3, "t", lower_order_final=False), 3),
    "lms 2": (solvers.lms(2), 2),
    "lms 4": (solvers.lms(4), 4),
    "plms": (solvers.plms(), 2),
    "pndm": (solvers.pndm(), 2),
    "plms heun": (solvers.plms(start="heun"), 2),
    "unipc 2 eps": (solvers.unipc(2, lower_order_final=False, prediction="eps"), 3),
    "kdpm2": (solvers.kdpm2(), 2),
    "dpm_solver_pp 2 restarting": (solvers.dpm_solver_pp(2, "restarting", lower_order_final=False), 2),
    "dpm_solver_pp 2 heun": (solvers.dpm_solver_pp(2, lower_order_final=False, solver_type="heun"), 2),
    "heun": (solvers.heun(), 2),
    "flow_euler": (solvers.flow_euler(), 1),
    "flow_heun": (solvers.flow_heun(), 2),
    "flow_midpoint": (solvers.flow_midpoint(), 2),
}


def exact_flow(process, points, start, end):
    """F_end^-1(F_start(x)) for the mixture seen through `process`."""

    def at(t):
        alpha, sigma = float(process.alpha(jnp.float64(t))), float(process.sigma(jnp.float64(t)))
        return alpha * MEANS, np.sqrt((alpha * STDS) ** 2 + sigma**2)

    def cdf(x, t):
        means, stds = at(t)
        return float((WEIGHTS * norm.cdf((x - means) / stds)).sum())

    def carried(x):
        return brentq(lambda y: cdf(y, end) - cdf(x, start), -60, 60, xtol=1e-14)

    return np.array([carried(x) for x in points])


def refined_grid(process, steps, order, length):
    """Equal steps in log-SNR, with short ones first so that the low orders a history starts with do not dominate."""
    edges = jnp.asarray(process.log_snr(jnp.array([START, END])))
    values = jnp.linspace(edges[0], edges[1], steps + 1)
    powers = {1: (), 2: (), 3: (0.5,), 4: (1.0, 0.5)}[order]
    extra = jnp.array([values[0] + (values[1] - values[0]) * steps**-p for p in powers])
    times = process.inverse_log_snr(jnp.sort(jnp.concatenate([values, extra])))
    return jnp.pad(times, (0, length + 1 - times.shape[0]), mode="edge")


def scaled_points(process):
    return POINTS * float(jnp.sqrt(process.alpha(START) ** 2 + process.sigma(START) ** 2))


@pytest.mark.parametrize("process_name", PROCESSES)
@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name, process_name):
    with enable_x64(True):
        solver, order = SOLVERS[name]
        process = PROCESSES[process_name]
        mixture = gaussian_mixture(MEANS[:, None], STDS[:, None], WEIGHTS)
        points = scaled_points(process)
        exact = exact_flow(process, points, START, END)
        length = 2 * STEPS + 2
        grids = [refined_grid(process, n, order, length) for n in (STEPS, 2 * STEPS)]
        grid = jnp.repeat(jnp.stack(grids, axis=1), len(points), axis=1)
        x_init = jnp.asarray(np.tile(points, 2)[:, None])

        def run(grid, x_init):
            return sample(jax.random.key(0), analytic(process), mixture, solver, grid, x_init=x_init).x

        error = np.abs(np.asarray(jax.jit(run)(grid, x_init))[:, 0].reshape(2, -1) - exact).max(axis=1)
    slope = np.log2(error[0] / error[1])
    # Some cases converge faster than they must while errors of two orders cancel; none may be slower.
    assert order - 0.35 < slope < order + 0.9, f"slope {slope:.2f}, errors {error}"


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp 2", "dpm_solver 3 singlestep", "unipc 2", "heun", "flow_heun"])
def test_inversion_error_shrinks_at_the_order(name):
    """Data, to noise along the rising grid, and back: the error of the round trip against the number of steps."""
    with enable_x64(True):
        solver, order = SOLVERS[name]
        process = PROCESSES["vp"]
        mixture = gaussian_mixture(MEANS[:, None], STDS[:, None], WEIGHTS)
        x_init = jnp.asarray(POINTS[:, None])

        @jax.jit
        def round_trip(grid):
            args = (jax.random.key(0), analytic(process), mixture, solver, grid)
            return sample(*args, x_init=invert(*args, x_init=x_init).x).x

        # Padding in the middle of the grid is a pause, which leaves all entries where they are.
        coarse = jnp.pad(refined_grid(process, STEPS, 1, STEPS), (0, STEPS), mode="edge")
        fine = refined_grid(process, 2 * STEPS, 1, 2 * STEPS)
        error = [float(jnp.abs(round_trip(grid) - x_init).max()) for grid in (coarse, fine)]
    slope = np.log2(error[0] / error[1])
    # The histories start at both ends, so that no multi-step method does better than second order here.
    assert slope > min(order, 2) - 0.3, f"slope {slope:.2f}, errors {error}"


@pytest.mark.parametrize("process_name", PROCESSES)
def test_adaptive_reaches_its_tolerance(process_name):
    with enable_x64(True):
        process = PROCESSES[process_name]
        mixture = gaussian_mixture(MEANS[:, None], STDS[:, None], WEIGHTS)
        points = scaled_points(process)
        exact = exact_flow(process, points, START, END)
        grid = jnp.array([START, END])

        def run(tolerance):
            solver = solvers.adaptive(rtol=tolerance, atol=tolerance)
            args = (jax.random.key(0), analytic(process), mixture, solver, grid)
            return jax.jit(lambda x: sample(*args, x_init=x))(jnp.asarray(points[:, None]))

        loose, tight = run(1e-3), run(1e-9)
        assert np.abs(np.asarray(loose.x)[:, 0] - exact).max() < 1e-2
        assert np.abs(np.asarray(tight.x)[:, 0] - exact).max() < 1e-7
        assert tight.cost.evaluations > loose.cost.evaluations
