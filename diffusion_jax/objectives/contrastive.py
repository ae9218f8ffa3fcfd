"""Losses of the encoders around a diffusion model of pairs: matching vectors, and text decoded from latents."""

import jax
import jax.numpy as jnp

from diffusion_jax.models.caption_decoder import Captioner
from diffusion_jax.models.dual_encoder import DualEncoder
from diffusion_jax.objectives.batches import refuse_weight
from diffusion_jax.typing import Aux, Objective


def contrastive(network: DualEncoder) -> Objective:
    """Images find their texts within the batch, and texts their images; batches `{"x0": {"image", "text"}}`.

    With cosines c_ij of image i and text j, times the scale, and P_i the texts j equal to text i,

        loss_i = - mean_(j in P_i) [ log softmax_j(c_i.) + log softmax_j(c_.i) ] / 2                              (1)

    Radford et al. 2021 (section 2.3) where all texts differ; equal texts are all right answers (Khosla et al. 2020,
    equation 2). Metrics: `retrieval`, the share of images whose nearest text is theirs. Per example: `loss`.
    """

    def init(key, params, batch):
        refuse_weight(batch, "contrastive")
        return ()

    def loss(params, state, batch, key):
        text = batch["x0"]["text"]
        vectors = {name: one.astype(jnp.float32) for name, one in network.embed(params, batch["x0"]).items()}
        cosines = network.scale(params) * vectors["image"] @ vectors["text"].T
        same = (text[:, None] == text[None]).all(axis=-1)
        right = same / same.sum(axis=1, keepdims=True)
        there, back = (-(right * jax.nn.log_softmax(c, axis=1)).sum(axis=1) for c in (cosines, cosines.T))
        total = 0.5 * (there + back)
        retrieval = jnp.take_along_axis(same, cosines.argmax(axis=1)[:, None], axis=1).mean()
        return total, Aux(state, {"retrieval": retrieval}, {"loss": total})

    return Objective(init, loss)


def caption_loss(network: Captioner) -> Objective:
    """Cross-entropy of the tokens of a text given its latents, mean over places.

    Batches `{"x0": hidden [B, M, D], "cond": {"tokens": int [B, N]}}`, hidden from an encoder that is not trained here.
    Metrics: `exact`, the share of texts whose every token is the likeliest after the true ones. Per example: `loss`.
    """

    def init(key, params, batch):
        refuse_weight(batch, "caption_loss")
        return ()

    def loss(params, state, batch, key):
        tokens = batch["cond"]["tokens"]
        logits = network.logits(params, network.encode(params, batch["x0"]), tokens).astype(jnp.float32)
        cost = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0].mean(axis=1)
        exact = (logits.argmax(-1) == tokens).all(axis=1).mean()
        return cost, Aux(state, {"exact": exact}, {"loss": cost})

    return Objective(init, loss)
