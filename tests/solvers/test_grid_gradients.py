"""Every solver differentiates with respect to its grid, to x and to the parameters, as finite differences say.

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
PARAMS = np.array([1.5, 0.5, -0.2])


SOLVERS = {
    "adaptive": lambda: solvers.adaptive(1e-4, 1e-4, 64),
    "constrained": lambda: solvers.constrained(solvers.ddim(), jnp.tanh),
    "ddim": solvers.ddim,
    "ddim eta": lambda: solvers.ddim(0.5),
    "ddpm": solvers.ddpm,
    "ddpm large": lambda: solvers.ddpm("large"),
    "deis": solvers.deis,
    "deis t": lambda: solvers.deis(2, "t"),
    "dpm_solver": lambda: solvers.dpm_solver(3),
    "dpm_solver singlestep": lambda: solvers.dpm_solver(2, "singlestep"),
    "dpm_solver restarting": lambda: solvers.dpm_solver(2, "restarting"),
    "dpm_solver_pp": lambda: solvers.dpm_solver_pp(2, equation="sde"),
    "dpm_solver_pp singlestep": lambda: solvers.dpm_solver_pp(2, "singlestep", "sde"),
    "edm": lambda: solvers.edm(1.0),
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "flow_euler": solvers.flow_euler,
    "flow_heun": solvers.flow_heun,
    "flow_midpoint": solvers.flow_midpoint,
    "flow_sde": solvers.flow_sde,
    "flow_sde odds": lambda: solvers.flow_sde(diffusion="odds"),
    "heun": solvers.heun,
    "inpainted": lambda: solvers.inpainted(solvers.ddim(), np.zeros(X.shape), np.tile([True, False], (3, 2))),
    "kdpm2": solvers.kdpm2,
    "kdpm2 ancestral": lambda: solvers.kdpm2(ancestral=True),
    "lcm": solvers.lcm,
    "lms": lambda: solvers.lms(3),
    "optimised": lambda: solvers.optimised(solvers.ddim(), lambda x, step: jnp.sum(x**4)),
    "plms": lambda: solvers.plms(start="heun", combined="output"),
    "pndm": solvers.pndm,
    "repainted": lambda: solvers.repainted(solvers.ddim(), np.zeros(X.shape), np.zeros((3, 4), bool), repeats=2),
    "sa_solver": lambda: solvers.sa_solver(2, 2, tau=0.7),
    "strided": lambda: solvers.strided(solvers.ddim()),
    "tcd": solvers.tcd,
    "unipc": solvers.unipc,
    "unipc eps": lambda: solvers.unipc(2, prediction="eps"),
    "wrapped": lambda: solvers.wrapped(solvers.ddim(), after=lambda process, x, step, key: x * (1 + step.t[..., None])),
}


def smooth():
    """A denoiser of a few operations, with parameters."""

    def apply(params, carry, x, step, cond):
        t = expand(step.t, x)
        x0 = jnp.tanh(params[0] * x + params[1] * t) + params[2] * t
        return PROCESS.from_x0(x0, x, step.t)._replace(cost=Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(lambda params, x, cond: (), apply, PROCESS)


@functools.cache
def directions():
    """How grid, x and parameters are moved; what stands still stays, and so do the ends 1 and 0."""
    rng = np.random.default_rng(1)
    grid = rng.standard_normal(GRID.shape)
    for i in range(1, len(grid)):
        grid[i] = np.where(GRID[i] == GRID[i - 1], grid[i - 1], grid[i])
    return np.where((GRID == 1) | (GRID == 0), 0.0, grid), rng.standard_normal(X.shape), rng.standard_normal(3)


@pytest.mark.parametrize("name", SOLVERS)
def test_derivatives_are_finite_differences(name):
    weights = np.cos(np.arange(X.size)).reshape(X.shape)

    def run(*inputs):
        def end(grid, x, params):
            return sample(jax.random.key(3), smooth(), params, SOLVERS[name](), grid, x_init=x).x

        x, pull = jax.vjp(end, *inputs)
        return x, pull(weights)

    with enable_x64(True):
        run = jax.jit(run)
        inputs, size = (GRID, X, PARAMS), 1e-5
        gradients = jax.device_get(run(*inputs)[1])
        for i, (part, direction) in enumerate(zip(("grid", "x", "params"), directions(), strict=True)):
            assert np.isfinite(gradients[i]).all(), f"{part}: {np.argwhere(~np.isfinite(gradients[i])).tolist()}"
            there, back = (run(*inputs[:i], inputs[i] + by * direction, *inputs[i + 1 :])[0] for by in (size, -size))
            slope = np.sum(weights * (np.asarray(there) - np.asarray(back))) / (2 * size)
            np.testing.assert_allclose(np.sum(gradients[i] * direction), slope, rtol=1e-4, atol=1e-5, err_msg=part)
