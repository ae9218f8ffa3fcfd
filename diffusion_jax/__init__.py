"""diffusion_jax: diffusion models in JAX, composed along the timestep.

The rooms (`processes`, `timesteps`, `models`, `denoisers`, `solvers`, ...) are imported one by one, so that importing
the package costs nothing: `from diffusion_jax import processes, solvers`. The loop is `sampling.sample`.
"""

__version__ = "0.1.0"
