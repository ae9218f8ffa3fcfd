"""How data becomes noise: schedules; Gaussian, discrete and joint processes; what networks predict and are fed."""

from diffusion_jax.processes.discrete import LOG_ZERO, Absorbing, Uniform, absorbing, uniform
from diffusion_jax.processes.discrete_vp import (
    BETAS,
    INTERPOLATIONS,
    DiscreteVP,
    betas,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr_betas,
)
from diffusion_jax.processes.gaussian import NETWORK_TIMES, PARAMETERIZATIONS, GaussianProcess, Schedule
from diffusion_jax.processes.joint import JointProcess
from diffusion_jax.processes.keep import KEEP_SCHEDULES, KeepCosine, KeepGeometric, KeepPolynomial
from diffusion_jax.processes.named import (
    cosine,
    edm,
    gvp,
    rectified_flow,
    variance_exploding,
    vp_continuous,
    vp_cosine,
    vp_linear,
    vp_scaled_linear,
)
from diffusion_jax.processes.schedules import EDM, Cosine, Linear, LinearVP, Shifted, VarianceExploding

__all__ = [
    "BETAS",
    "EDM",
    "INTERPOLATIONS",
    "KEEP_SCHEDULES",
    "LOG_ZERO",
    "NETWORK_TIMES",
    "PARAMETERIZATIONS",
    "Absorbing",
    "Cosine",
    "DiscreteVP",
    "GaussianProcess",
    "JointProcess",
    "KeepCosine",
    "KeepGeometric",
    "KeepPolynomial",
    "Linear",
    "LinearVP",
    "Schedule",
    "Shifted",
    "Uniform",
    "VarianceExploding",
    "absorbing",
    "betas",
    "cosine",
    "cosine_betas",
    "edm",
    "gvp",
    "linear_betas",
    "rectified_flow",
    "scaled_linear_betas",
    "sigmoid_betas",
    "uniform",
    "variance_exploding",
    "vp_continuous",
    "vp_cosine",
    "vp_linear",
    "vp_scaled_linear",
    "zero_terminal_snr_betas",
]
