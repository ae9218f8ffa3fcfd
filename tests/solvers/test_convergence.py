"""With the exact denoiser of a mixture in one dimension every deterministic solver converges at its order.

In one dimension the probability flow keeps the cumulative distribution, so the exact flow is `F_end^-1(F_start(x))`, a
reference that owes nothing to the library. Slopes are measured in float64, for float32 round-off would hide them, from
one compiled run per solver: each process has its part of the batch, half of which takes the coarse grid, padded by
zero-length steps, and half the fine one.
"""

import dataclasses
import functools

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


@dataclasses.dataclass(frozen=True)
class Side:
    """The schedules of `PROCESSES` side by side: of a batch `[3 n]` n rows have the first, and so on."""

    def _each(self, name, value):
        values = [getattr(process, name)(value) for process in PROCESSES.values()]
        which = np.repeat(np.arange(len(values)), value.shape[-1] // len(values))
        return jnp.select([which == number for number in range(len(values))], values)

    def alpha(self, t):
        return self._each("alpha", t)

    def sigma(self, t):
        return self._each("sigma", t)

    def log_snr(self, t):
        return self._each("log_snr", t)

    def inverse_log_snr(self, log_snr):
        return self._each("inverse_log_snr", log_snr)


SIDE_BY_SIDE = processes.GaussianProcess(Side(), "velocity")


@functools.cache
def mixture():
    return jax.device_get(gaussian_mixture(MEANS[:, None], STDS[:, None], WEIGHTS))


@functools.cache
def levels():
    """alpha, sigma and log-SNR at `START` and `END`, `[3 processes, 2]`."""

    @jax.jit
    def program(t):
        each = PROCESSES.values()
        return tuple(jnp.stack([getattr(one, name)(t) for one in each]) for name in ("alpha", "sigma", "log_snr"))

    return jax.device_get(program(np.array([START, END])))


@functools.cache
def exact_flow():
    """Where the points start, and F_end^-1(F_start(x)) for the mixture seen through each process: `[3, points]`."""
    alphas, sigmas, _ = levels()

    def cdf(x, alpha, sigma):
        stds = np.sqrt((alpha * STDS) ** 2 + sigma**2)
        return float((WEIGHTS * norm.cdf((x - alpha * MEANS) / stds)).sum())

    def carried(x, alpha, sigma):
        begun = cdf(x, alpha[0], sigma[0])
        return brentq(lambda y: cdf(y, alpha[1], sigma[1]) - begun, -60, 60, xtol=1e-14)

    points = POINTS * np.hypot(alphas, sigmas)[:, :1]
    return points, np.array([[carried(x, a, s) for x in row] for row, a, s in zip(points, alphas, sigmas, strict=True)])


@functools.cache
def inverse_log_snr():
    return jax.jit(
        lambda values: jnp.stack(
            [one.inverse_log_snr(row) for one, row in zip(PROCESSES.values(), values, strict=True)]
        )
    )


def refined_grids(order, counts, length):
    """Equal steps in log-SNR, with short ones first so that the low orders a history starts with do not dominate.

    `[3 processes, len(counts), length + 1]`, padded at the end.
    """
    powers = {1: (), 2: (), 3: (0.5,), 4: (1.0, 0.5)}[order]

    def log_snrs(start, end, steps):
        values = np.linspace(start, end, steps + 1)
        extra = [values[0] + (values[1] - values[0]) * steps**-p for p in powers]
        values = np.sort(np.concatenate([values, extra]))
        return np.pad(values, (0, length + 1 - len(values)), mode="edge")

    edges = levels()[2]
    return np.asarray(inverse_log_snr()(np.array([[log_snrs(*pair, n) for n in counts] for pair in edges])))


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name):
    with enable_x64(True):
        solver, order = SOLVERS[name]
        points, exact = exact_flow()
        grids = refined_grids(order, (STEPS, 2 * STEPS), 2 * STEPS + 2)
        grid = np.repeat(grids.reshape(-1, grids.shape[-1]), len(POINTS), axis=0).T
        x_init = np.repeat(points[:, None], 2, axis=1).reshape(-1, 1)
        params = mixture()

        @jax.jit
        def run(grid, x_init):
            return sample(jax.random.key(0), analytic(SIDE_BY_SIDE), params, solver, grid, x_init=x_init).x

        found = np.asarray(run(grid, x_init)).reshape(len(PROCESSES), 2, len(POINTS))
    errors = np.abs(found - exact[:, None]).max(axis=-1)
    for process, error in zip(PROCESSES, errors, strict=True):
        slope = np.log2(error[0] / error[1])
        # Some cases converge faster than they must while errors of two orders cancel; none may be slower.
        assert order - 0.35 < slope < order + 0.9, f"{process}: slope {slope:.2f}, errors {error}"


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp 2", "dpm_solver 3 singlestep", "unipc 2", "heun", "flow_heun"])
def test_inversion_error_shrinks_at_the_order(name):
    """Data, to noise along the rising grid, and back: the error of the round trip against the number of steps."""
    with enable_x64(True):
        solver, order = SOLVERS[name]
        process = PROCESSES["vp"]
        x_init, params = POINTS[:, None], mixture()

        @jax.jit
        def round_trip(grid):
            args = (jax.random.key(0), analytic(process), params, solver, grid)
            return sample(*args, x_init=invert(*args, x_init=x_init).x).x

        # Padding in the middle of the grid is a pause, which leaves all entries where they are.
        grids = refined_grids(1, (STEPS, 2 * STEPS), 2 * STEPS)[list(PROCESSES).index("vp")]
        error = [float(np.abs(round_trip(grid) - x_init).max()) for grid in grids]
    slope = np.log2(error[0] / error[1])
    # The histories start at both ends, so that no multi-step method does better than second order here.
    assert slope > min(order, 2) - 0.3, f"slope {slope:.2f}, errors {error}"


def adaptive(name, tolerance):
    solver = solvers.adaptive(rtol=tolerance, atol=tolerance)
    args = (jax.random.key(0), analytic(PROCESSES[name]), mixture(), solver, np.array([START, END]))
    return jax.jit(lambda x: sample(*args, x_init=x))


@pytest.mark.parametrize("name", PROCESSES)
def test_adaptive_reaches_its_tolerance(name):
    with enable_x64(True):
        points, exact = (values[list(PROCESSES).index(name)] for values in exact_flow())
        loose, tight = (jax.device_get(adaptive(name, tolerance)(points[:, None])) for tolerance in (1e-3, 1e-9))
    assert np.abs(loose.x[:, 0] - exact).max() < 1e-2
    assert np.abs(tight.x[:, 0] - exact).max() < 1e-7
    assert tight.cost.evaluations > loose.cost.evaluations
