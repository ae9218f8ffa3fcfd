"""Every solver differentiates with respect to grid, x, parameters and condition, as finite differences say.

Those with a history and those that draw are in `test_grid_gradients_history` and `test_grid_gradients_noise`.

One compiled program per solver. Its batch holds a process a row and a grid a column: the standard one from 1 to 0, one
that stays inside, one that pauses, and one that begins late and ends early.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import enable_x64

from diffusion_jax import processes, solvers
from diffusion_jax.processes import safe_log, safe_sqrt
from diffusion_jax.sampling import sample
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Cost, Denoiser


@dataclasses.dataclass(frozen=True)
class Rows:
    """Three schedules in few operations, one a row of t `[3, N]`: VP with alpha(1) = 0, EDM, rectified flow.

    `alpha^p = 1 - a t`, `sigma^p = s t`; the VP one has infinite slopes at both ends.
    """

    def _powered(self, t):
        squared, a, s = (np.array(row)[:, None] for row in ([True, False, False], [1, 0, 1], [1, 10, 1]))
        return squared, a, s

    def alpha(self, t):
        squared, a, _ = self._powered(t)
        return jnp.where(squared, safe_sqrt(1 - a * t), 1 - a * t)

    def sigma(self, t):
        squared, _, s = self._powered(t)
        return jnp.where(squared, safe_sqrt(s * t), s * t)

    def log_snr(self, t):
        return 2 * (safe_log(self.alpha(t)) - safe_log(self.sigma(t)))

    def inverse_log_snr(self, log_snr):
        squared, a, s = self._powered(log_snr)
        ratio = jnp.exp(jnp.where(squared, -log_snr, -0.5 * log_snr))
        return ratio / (s + a * ratio)


PROCESS = processes.GaussianProcess(Rows(), "v")

COLUMNS = np.array(
    [
        [1.0, 0.83, 0.61, 0.42, 0.21, 0.0],
        [0.91, 0.77, 0.58, 0.37, 0.22, 0.11],
        [0.91, 0.77, 0.77, 0.41, 0.41, 0.0],
        [1.0, 1.0, 0.74, 0.52, 0.0, 0.0],
    ]
)
GRID = np.repeat(COLUMNS.T[:, None], 3, axis=1)
X = np.random.default_rng(0).standard_normal((*GRID.shape[1:], 2))
PARAMS, SHIFT = np.array([1.5, 0.5, -0.2]), np.array([0.3, -0.1])


SOLVERS = {
    "adaptive": lambda: solvers.adaptive(1e-6, 1e-6, 64),
    "constrained": lambda: solvers.constrained(solvers.ddim(), jnp.tanh),
    "ddim": solvers.ddim,
    "dpm_solver singlestep": lambda: solvers.dpm_solver(2, "singlestep"),
    "euler": solvers.euler,
    "flow_euler": solvers.flow_euler,
    "flow_heun": solvers.flow_heun,
    "flow_midpoint": solvers.flow_midpoint,
    "heun": solvers.heun,
    "inpainted": lambda: solvers.inpainted(solvers.ddim(), np.zeros(X.shape), np.tile([True, False], (3, 2))),
    "kdpm2": solvers.kdpm2,
    "optimised": lambda: solvers.optimised(solvers.ddim(), lambda x, step: jnp.sum(x**4)),
    "released": lambda: solvers.released(solvers.ddim(), np.zeros(X.shape), np.full((3, 4), 0.5)),
    "repainted": lambda: solvers.repainted(solvers.ddim(), np.zeros(X.shape), np.zeros((3, 4), bool), repeats=2),
    "strided": lambda: solvers.strided(solvers.ddim()),
    "tcd": solvers.tcd,
    "with_hooks": lambda: solvers.with_hooks(solvers.ddim(), after=lambda p, x, step, key: x * (1 + step.t[..., None])),
}


def smooth():
    """A denoiser of a few operations, with parameters, which knows x0 where there is no noise."""

    def apply(params, carry, x, step, cond):
        t, alpha, sigma = (expand(value, x) for value in (step.t, PROCESS.alpha(step.t), PROCESS.sigma(step.t)))
        guess = params[2] * jnp.tanh(params[0] * x + params[1] * t) + cond["shift"]
        x0 = (alpha * x + sigma**2 * guess) / (alpha**2 + sigma**2)
        return PROCESS.from_x0(x0, x, step.t)._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(lambda params, x, cond: (), apply, PROCESS)


@functools.cache
def directions():
    """How grid, x, parameters and condition are moved; what stands still stays, and so do the ends 1 and 0."""
    rng = np.random.default_rng(1)
    grid = rng.standard_normal(GRID.shape)
    for i in range(1, len(grid)):
        grid[i] = np.where(GRID[i] == GRID[i - 1], grid[i - 1], grid[i])
    return np.where((GRID == 1) | (GRID == 0), 0.0, grid), *(rng.standard_normal(v.shape) for v in (X, PARAMS, SHIFT))


def check_derivatives(solver, size=1e-5, rtol=1e-4):
    """Gradients of a weighted sum of the samples against central differences along one direction of each input."""
    weights = np.cos(np.arange(X.size)).reshape(X.shape)

    @jax.jit
    def run(*inputs):
        def end(grid, x, params, shift):
            key, cond = jax.random.key(3), {"shift": shift}
            return sample(key, smooth(), params, solver(), grid, x_init=x, cond=cond).x

        x, pull = jax.vjp(end, *inputs)
        return x, pull(weights)

    with enable_x64(True):
        inputs = GRID, X, PARAMS, SHIFT
        gradients = jax.device_get(run(*inputs)[1])
        for i, (part, direction) in enumerate(zip(("grid", "x", "params", "cond"), directions(), strict=True)):
            assert np.isfinite(gradients[i]).all(), f"{part}: {np.argwhere(~np.isfinite(gradients[i])).tolist()}"
            moved = (run(*inputs[:i], inputs[i] + by * direction, *inputs[i + 1 :])[0] for by in (size, -size))
            slope = np.sum(weights * np.subtract(*map(np.asarray, moved))) / (2 * size)
            np.testing.assert_allclose(np.sum(gradients[i] * direction), slope, rtol=rtol, atol=1e-5, err_msg=part)


@pytest.mark.parametrize("name", SOLVERS)
def test_derivatives_are_finite_differences(name):
    # The steps that an adaptive solver chooses are not smooth in the grid: differences along a longer way.
    check_derivatives(SOLVERS[name], *((1e-3, 1e-2) if name == "adaptive" else ()))
