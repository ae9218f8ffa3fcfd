"""The loss that trains a KL autoencoder, reconstruction and the posterior's divergence from the standard normal, and
the one that trains what `models.detailed` adds to its decoder.

The autoencoder itself is `models.kl_vae`. Perceptual and adversarial terms, which sharpen large ones, are not here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.models import Autoencoder, DetailDecoder
from diffusion_jax.objectives.batches import batch_size, example_keys, refuse_weight
from diffusion_jax.objectives.entries import per_example
from diffusion_jax.typing import Aux, Frozen, Objective, Params

RECONSTRUCTIONS = {"l1": jnp.abs, "l2": lambda residual: 0.5 * jnp.square(residual)}
"""-log p(x | z) up to a constant: of a Laplace distribution, as in latent diffusion, or of a Gaussian, unit scale."""


def vae_loss(autoencoder: Autoencoder, kl_weight: float = 1e-6, reconstruction: str = "l1") -> Objective:
    """Negative evidence lower bound per data dimension, on batches `{"x0", "index" (optional)}`.

    loss = (sum -log p(x0 | z) + kl_weight KL(q(z | x0) || N(0, I))) / d,    z ~ q(z | x0), over d data dimensions,

    (Kingma & Welling 2014, equation 3; `kl_weight` as in Rombach et al. 2022, appendix G: 1e-6.)
    x0: images `[B, H, W, C]`, or whatever the autoencoder takes: clips `[B, F, H, W, C]` with `models.framewise`.
    reconstruction: a key of `RECONSTRUCTIONS`. index: `[B]` global index of each example, to which its sample of z
        belongs; 0 .. B - 1 when absent.
    Metrics: `reconstruction` (per data dimension), `kl` (nats per example). Per example: `loss`.

    Raises InvalidInput for a negative `kl_weight` or a reconstruction that does not exist.
    """
    if not kl_weight >= 0:
        raise invalid("kl_weight", kl_weight, "it must not be negative")
    if reconstruction not in RECONSTRUCTIONS:
        raise unknown("reconstruction", reconstruction, RECONSTRUCTIONS)
    distance = RECONSTRUCTIONS[reconstruction]

    def init(key, params, batch):
        refuse_weight(batch, "autoencoder")
        return ()

    def loss(params, state, batch, key):
        batch = {"index": jnp.arange(batch_size(batch)), **batch}
        x0 = batch["x0"]
        posterior = autoencoder.posterior(params, x0)
        latents = autoencoder.scale(posterior.sample(example_keys(key, batch["index"])))
        error = per_example(distance(autoencoder.decode(params, latents).astype(jnp.float32) - x0))
        kl = posterior.kl()
        total = error + kl_weight * kl * (x0.shape[0] / x0.size)
        metrics = {"reconstruction": error.mean(), "kl": kl.mean()}
        return total, Aux(state, metrics, {"loss": total})

    return Objective(init, loss)


class DetailState(NamedTuple):
    """autoencoder: its parameters, which do not learn."""

    autoencoder: Frozen


def detail_loss(
    decoder: DetailDecoder, autoencoder: Autoencoder, params: Params, key: str = "picture", latents: str | None = None
) -> Objective:
    """The mean absolute error of `decoder.decode(learned, params, z, y)` as a reconstruction of x0, on batches of x0
    `[B, H, W, C]` with y in `cond[key]`, the picture whose details are taken.

    z: the latents of x0, or those in `cond[latents]`: of a diffusion model's answers, say, whose errors the decoder
    then learns to expect. autoencoder, params: the frozen one (`typing.Frozen`). What learns is `decoder.init(key)`.
    Metrics: `reconstruction`. Per example: `loss`. Raises InvalidInput for batches without these entries.
    """

    def init(random, learned, batch):
        refuse_weight(batch, "the decoder's")
        cond = batch.get("cond") or {}
        for name in [key, *([] if latents is None else [latents])]:
            if name not in cond:
                raise InvalidInput(f"The decoder needs cond[{name!r}]; cond has {sorted(cond)}.")
        return DetailState(Frozen(params))

    def loss(learned, state, batch, random):
        frozen, x0, cond = jax.lax.stop_gradient(state.autoencoder.value), batch["x0"], batch["cond"]
        z = autoencoder.encode(frozen, x0) if latents is None else cond[latents]
        error = per_example(jnp.abs(decoder.decode(learned, frozen, z, cond[key]) - x0))
        return error, Aux(state, {"reconstruction": error.mean()}, {"loss": error})

    return Objective(init, loss)
