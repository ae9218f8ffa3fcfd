"""A denoiser of the same data with another noise schedule or parameterisation.

Whatever alpha and sigma are, `x_t / alpha` is data plus noise of strength sigma / alpha, so two schedules meet at equal
log-SNR `log(alpha^2 / sigma^2)` and differ there by a factor alone:

    log_snr'(t') = log_snr(t),        x' = x alpha' / alpha = x sigma' / sigma,        (x0', eps') = (x0, eps)      (1)

Parameterisations need no conversion: every denoiser returns x0 and eps.
"""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.denoisers.base import with_pair
from diffusion_jax.errors import invalid
from diffusion_jax.processes import by_modality, members, need_gaussian
from diffusion_jax.time_axes import each, expand
from diffusion_jax.timesteps import matching_time
from diffusion_jax.typing import Denoiser


def on_process(inner: Denoiser, process: Any) -> Denoiser:
    """`inner` as a denoiser of `process`, by equation (1): what `switched` and `averaged` need to mix schedules.

    Guidance, bounds and caches of `inner` use its own time; extras are its own. Where `process` is noisier than
    `inner` ever is, `inner` is evaluated at its t' = 1, and eps follows from x and x0. Equal schedules change nothing,
    bit for bit. Raises InvalidInput for processes that are not Gaussian, or not of the same modalities.
    """
    need_gaussian("on_process", process)
    need_gaussian("on_process", inner.process)
    ours, theirs = members(process), members(inner.process)
    if set(ours) != set(theirs):
        raise invalid("process", sorted(ours), f"the modalities of the denoiser, {sorted(theirs)}, were expected")
    if all(ours[name].schedule == theirs[name].schedule for name in ours):
        return inner._replace(process=process)
    ours, theirs = by_modality(process), by_modality(inner.process)

    def matched(t):
        return each(lambda ours, theirs, t: matching_time(ours, theirs, t), ours, theirs, t)

    def scale(x, ours, theirs, t, t_inner):
        # The ratio of both lengths is that of both halves in (1), and finite where one of them vanishes.
        length = jnp.hypot(ours.alpha(t), ours.sigma(t))
        return expand(jnp.hypot(theirs.alpha(t_inner), theirs.sigma(t_inner)) / length, x) * x

    def pair(x, ours, theirs, x0, eps, t):
        known = ours.log_snr(t) >= theirs.log_snr(1.0)
        return x0, jnp.where(expand(known, x), eps, ours.from_x0(x0, x, t).eps)

    def apply(params, carry, x, step, cond):
        moved = step._replace(t=matched(step.t), t_next=matched(step.t_next))
        prediction, carry = inner.apply(params, carry, each(scale, x, ours, theirs, step.t, moved.t), moved, cond)
        answer = each(pair, x, ours, theirs, prediction.x0, prediction.eps, step.t)
        return with_pair(prediction, answer), carry

    return inner._replace(apply=apply, process=process)
