"""Does what is ignored stay out: how much a prediction depends on the noise that stands for an ignored modality."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffusion_jax import randomness
from diffusion_jax.clock import single_step
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.time_axes import batch_size
from diffusion_jax.typing import Condition, Denoiser, Params


def leakage(
    key: Key[Array, ""],
    denoiser: Denoiser,
    params: Params,
    x0: Mapping[str, Any],
    t: Any,
    ignored: Sequence[str],
    cond: Condition = None,
    redraws: int = 16,
) -> dict[str, float]:
    """`mean Var_e[eps_m(x_t, e)] / mean eps_m(x_t, e)^2` for each modality m that is not ignored, e ~ N(0, I).

    At t = 1 a modality is integrated out, so its noise should not matter: 0 for the exact denoiser where alpha(1) = 0;
    a schedule that ends above leaks (Bao et al. 2023, UniDiffuser).

    x0: clean joint data `[B, ...]` by modality. t: `[B]` or a number, to which what is not ignored is noised.
    redraws: of the ignored modalities, at least 2, the same for x_t. Raises InvalidInput for names that x0 lacks.
    """
    for name in ignored:
        if name not in x0:
            raise unknown("a name in ignored", name, x0)
    if redraws < 2:
        raise invalid("redraws", redraws, "a variance needs at least 2")
    size = batch_size(x0)
    times = {name: jnp.broadcast_to(1.0 if name in ignored else t, (size,)) for name in x0}
    step = single_step(times)
    x_t, _ = denoiser.process.corrupt(randomness.sample_keys(key, jnp.arange(size)), x0, times)

    def predicted(key):
        noise = randomness.normal(key, {name: x_t[name].shape for name in ignored})
        x = {**x_t, **noise}
        prediction, _ = denoiser.apply(params, denoiser.init(params, x, cond), x, step, cond)
        return {name: eps for name, eps in prediction.eps.items() if name not in ignored}

    eps = jax.jit(lambda keys: jax.lax.map(predicted, keys))(jax.random.split(randomness.fold(key, 1), redraws))
    return {name: float(leaf.var(axis=0).mean() / jnp.square(leaf).mean()) for name, leaf in eps.items()}
