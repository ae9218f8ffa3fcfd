"""diffusion_jax: diffusion models in JAX, composed along the timestep.

The packages (`processes`, `timesteps`, `models`, `denoisers`, `solvers`, ...) are imported one by one, so that
importing this one costs nothing: `from diffusion_jax import processes, solvers`. The loop is `sampling.sample`.

Importing has one side effect: the C library keeps freed memory (`diffusion_jax.malloc` says why, and how to avoid it).
"""

from diffusion_jax.malloc import keep_freed_memory

__version__ = "0.1.0"

keep_freed_memory()
