"""Where two models of the same data agree: their predictions from the same noise, as a function of t."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import randomness
from diffusion_jax.clock import single_step
from diffusion_jax.processes import need_gaussian
from diffusion_jax.typing import Condition, Data, Denoiser, Keys, Numbers, Params


def epsilon_gap(
    key: Keys,
    pair: Sequence[Denoiser],
    params: Sequence[Params],
    x0: Numbers | Data,
    times: Numbers,
    cond: Condition = None,
) -> np.ndarray:
    """`E |eps_1(x_t, t) - eps_2(x_t, t)|^2`, the mean over samples and entries, at each of `times [T]`: `[T]`.

    x_t are the samples `x0 [B, ...]` with the same noise at every t and for both. Where the gap is small, either model
    can run: T-Stitch (Pan et al. 2024) gives those steps to the smaller one. Denoisers of other processes join by
    `denoisers.on_process`. Raises InvalidInput for discrete data.
    """
    first, second = pair
    need_gaussian("epsilon_gap", first.process)
    x0 = jnp.asarray(x0)
    keys = randomness.sample_keys(key, jnp.arange(len(x0)))

    @jax.jit
    def gaps(params, times):
        def at(t):
            x, _ = first.process.corrupt(keys, x0, t)
            one, other = (
                denoiser.apply(own, denoiser.init(own, x, cond), x, single_step(t), cond)[0].eps
                for denoiser, own in zip((first, second), params, strict=True)
            )
            return jnp.mean(jnp.square(one - other))

        return jax.lax.map(at, times)

    return np.asarray(gaps(tuple(params), jnp.asarray(times, jnp.float32)), np.float64)
