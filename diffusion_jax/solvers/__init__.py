"""One step of a reverse (or inverse) diffusion: one `Solver` per method, and wrappers around solvers.

Each constructor takes plain values and returns a `typing.Solver`; `sampling.sample` runs it over a grid. A solver sees
predictions of x0 and eps and the process's alpha and sigma. The solvers for continuous data therefore work for VP, VE,
EDM and flow matching alike, and with a time for each entry.
"""

from diffusion_jax.solvers.adams import deis, lms, plms, pndm
from diffusion_jax.solvers.adaptive import adaptive
from diffusion_jax.solvers.base import half_log_snr, hub_step, sigma_hat
from diffusion_jax.solvers.consistency import lcm, tcd
from diffusion_jax.solvers.ddim import ddim, ddpm, euler, euler_ancestral
from diffusion_jax.solvers.discrete import ancestral, joint, unmask
from diffusion_jax.solvers.dpm_solver import dpm_solver, dpm_solver_pp
from diffusion_jax.solvers.edm import edm, heun, kdpm2
from diffusion_jax.solvers.flow import flow_euler, flow_heun, flow_midpoint, flow_sde, flow_sde_moments
from diffusion_jax.solvers.history import History, with_history
from diffusion_jax.solvers.predictor_corrector import sa_solver, unipc
from diffusion_jax.solvers.switching import switched
from diffusion_jax.solvers.transformations import (
    constrained,
    inpainted,
    optimised,
    released,
    repainted,
    strided,
    with_hooks,
)

__all__ = [
    "History",
    "adaptive",
    "ancestral",
    "constrained",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_pp",
    "edm",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "flow_midpoint",
    "flow_sde",
    "flow_sde_moments",
    "half_log_snr",
    "heun",
    "hub_step",
    "inpainted",
    "joint",
    "kdpm2",
    "lcm",
    "lms",
    "optimised",
    "plms",
    "pndm",
    "released",
    "repainted",
    "sa_solver",
    "sigma_hat",
    "strided",
    "switched",
    "tcd",
    "unipc",
    "unmask",
    "with_history",
    "with_hooks",
]
