"""What a run makes of noise when its denoiser is linear: an exact covariance in the place of samples."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Params, Plan, Solver


def run_covariance(
    denoiser: Denoiser, params: Params, solver: Solver, plan: Plan, shape: tuple[int, ...]
) -> Float[Array, "D D"]:
    """The covariance of what `solver` makes along `plan`, over noise at its beginning, x `[*shape]` flattened to D.

    With the exact denoiser of a Gaussian (`denoisers.analytic`) and a solver that draws nothing, a run is affine in the
    x that it begins with, x = A e + b. So D + 1 runs, of each unit vector and of 0, give A and with it the covariance
    A A', without the error of samples: that of Gaussian data tells what a solver, a grid, or a denoiser that sees only
    part of the data does to it. Of anything else the result means nothing.

    plan: a grid, or one for each entry with a batch axis of 1. What does not move keeps unit variance. Can be traced:
    under `jax.jit` plans of one shape are one program.
    """
    size = math.prod(shape)
    basis = jnp.concatenate([jnp.eye(size), jnp.zeros((1, size))]).reshape(size + 1, *shape)
    begin = basis * denoiser.process.sigma(1.0)
    x = sample(jax.random.key(0), denoiser, params, solver, plan, x_init=begin).x.reshape(size + 1, size)
    linear = x[:-1] - x[-1]
    return linear.T @ linear
