"""SeaCache for whole outputs: steps are skipped while the picture behind the noise does not change.

How far the input moved since the last computed step is measured on what of it is signal. Pictures have spectra that
fall like |f|^-p, noise has a flat one, so the best linear estimate of x0 from `x_t = alpha x0 + sigma eps` weights the
frequency f by

    g(f) = alpha |f|^-p / (alpha^2 |f|^-p + sigma^2),        divided by its mean over f                        (1)

which follows the process: at high noise only the coarsest structure counts, on clean data everything alike. With G_t x
the filtered input, the changes of a skipped run of steps add up,

    d <- d + mean |G_t x_t - G_s x_s| / mean |G_s x_s|,        s the step before t                             (2)

and the step at which d reaches the threshold is computed, whereupon d is 0 again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.acceleration.forecasting import Forecaster
from diffusion_jax.acceleration.gated import relative_error
from diffusion_jax.acceleration.outputs import Outputs, cached_outputs, parameterized
from diffusion_jax.acceleration.refresh import Refresh, due, first_and_last
from diffusion_jax.denoisers.conditions import sample_time
from diffusion_jax.errors import invalid
from diffusion_jax.time_axes import batch_axes, each, expand
from diffusion_jax.typing import Denoiser, Number


class Moved(NamedTuple):
    """The carry. outputs: of `cached_outputs`. filtered: G_t x of the last step, like x. change: d of equation (2)."""

    outputs: Outputs
    filtered: Any
    change: Float[Array, ""]


def sea_cached(
    inner: Denoiser,
    threshold: Number | Float[Array, ""] = 0.3,
    *,
    exponent: float = 2.0,
    refresh: Refresh | None = None,
    forecaster: Forecaster | None = None,
    axis: str | tuple[str, ...] | None = None,
    **options: Any,
) -> Denoiser:
    """`inner` where its filtered input has moved by `threshold` since it was asked, its outputs reused or forecast
    elsewhere (after Chung et al. 2026, SeaCache: spectral-evolution-aware caching).

    threshold: of d in equation (2); 0 computes every step. Published: 0.3 for FLUX.1, less for video.
    exponent: p of equation (1), 2 for pictures; 3 is published for video.
    refresh: where everything is computed whatever the change; `first_and_last()` when None.
    forecaster: what is made of the outputs; `reuse()` when None, as published.
    axis: the mesh axes over which `shard_map` splits the batch, see `gated`.
    options: `prediction`, `residual`, `along` and `correction` of `cached_outputs`.

    The decision is one for the batch; of joint data, the entry that moved most decides. Frequencies are those of all
    axes between the batch and the channels, in radius; vectors have none and are compared as they are, and where t has
    more axes than the batch, the noisiest entry of a sample says how noisy it is. `extras` are left out, as in
    `cached_outputs`, whose carry is held besides one filtered input. The publication compares the modulated input of
    the first block and reuses what the blocks add to it; this asks x itself, so it goes around any denoiser, guided
    ones too. Its code adds the gains of the axes where equation (1) takes the radius. Raises InvalidInput for a
    negative plain threshold, an exponent of 0 or less, and what `cached_outputs` refuses.
    """
    if isinstance(threshold, float | int) and not threshold >= 0:
        raise invalid("threshold", threshold, "it must not be negative; 0 computes every step")
    if not exponent > 0:
        raise invalid("exponent", exponent, "it must be positive")
    refresh = first_and_last() if refresh is None else refresh

    def cached(refresh: Refresh) -> Denoiser:
        return cached_outputs(inner, refresh, forecaster, **options)

    whole = cached(refresh)

    parts = parameterized(inner.process, None)

    def filtered(x, t):
        return each(lambda x, process, t: signal(x, process, t, exponent), x, parts, t)

    def init(params, x, cond):
        return Moved(whole.init(params, x, cond), jax.tree.map(jnp.zeros_like, x), jnp.float32(0.0))

    def apply(params, carry, x, step, cond):
        # A decision has no derivative, and that of a ratio to nothing would be NaN.
        now = jax.lax.stop_gradient(filtered(x, step.t))
        errors = jax.tree.map(lambda new, old: relative_error(old, new, old, axis), now, carry.filtered)
        change = carry.change + jnp.stack(jax.tree.leaves(errors)).max()
        asked = due(refresh, step, carry.outputs.history) | (change >= threshold)
        prediction, outputs = cached(lambda step, history: asked).apply(params, carry.outputs, x, step, cond)
        return prediction, Moved(outputs, now, jnp.where(asked, 0.0, change))

    def axes(carry):
        return Moved._make((batch_axes(whole, carry.outputs), 0, None))

    return Denoiser(init, apply, inner.process, axes)


def signal(x: Array, process: Any, t: Any, exponent: float = 2.0) -> Array:
    """G_t x of equation (1), for `x [B, ..., C]` and `t [], [B]` or with more axes."""
    places = tuple(range(1, x.ndim - 1))
    if not places:
        return x
    t = sample_time(t)
    squares = [jnp.fft.fftfreq(x.shape[place]) ** 2 for place in places]
    radius = sum(jnp.expand_dims(one, [i for i in range(len(places)) if i != k]) for k, one in enumerate(squares))
    alpha, sigma = (expand(jnp.atleast_1d(level), x[..., 0]) for level in (process.alpha(t), process.sigma(t)))
    # (1) times |f|^p / alpha, which the division by the mean takes out again; pure noise leaves the lowest frequency.
    gain = 1.0 / (jnp.maximum(alpha, 1e-3) ** 2 + sigma**2 * jnp.power(radius, exponent / 2))
    gain = gain / gain.mean(axis=places, keepdims=True)
    return jnp.fft.ifftn(jnp.fft.fftn(x, axes=places) * gain[..., None], axes=places).real.astype(x.dtype)
