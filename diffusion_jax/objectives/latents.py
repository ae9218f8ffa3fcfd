"""Objectives of latent diffusion on batches of pictures: what encodes them is part of the step and does not learn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.objectives.batches import refuse_weight
from diffusion_jax.typing import Frozen, Objective, Params


class LatentState(NamedTuple):
    """encoder: its parameters. inner: the state of the objective on latents."""

    encoder: Frozen
    inner: Any


def on_latents(objective: Objective, encode: Callable[[Params, Any], Any], params: Params) -> Objective:
    """`objective` on `encode(params, x0)` in the place of x0: batches hold pictures `[B, H, W, C]`, not latents.

    encode: such as the `encode` of an autoencoder, at its parameters `params`, which do not learn (`typing.Frozen`). No
        gradient flows through it. With gradient accumulation each part of the batch is encoded by itself.

    The alternative is to encode once (`data.encoded`); this is for pictures that augmentation changes from epoch to
    epoch, and for more of them than fit into memory. Raises InvalidInput for a batch with weights of its pixels, which
    latents have none of.
    """

    def latents(encoder, batch):
        refuse_weight(batch, "an objective on latents")
        return {**batch, "x0": jax.lax.stop_gradient(encode(encoder, batch["x0"]))}

    def init(key, learned, batch):
        return LatentState(Frozen(params), objective.init(key, learned, latents(params, batch)))

    def loss(learned, state, batch, key):
        losses, aux = objective.loss(learned, state.inner, latents(state.encoder.value, batch), key)
        return losses, aux._replace(state=LatentState(state.encoder, aux.state))

    draw = objective.prepare
    if draw is None:
        return Objective(init, loss)

    def prepare(state, batch, key):
        # Draws read the shape of x0 alone, and the pictures stay as they are until their part of the batch is trained.
        shape = jax.eval_shape(encode, state.encoder.value, batch["x0"])
        drawn = draw(state.inner, {**batch, "x0": jnp.zeros(shape.shape, shape.dtype)}, key)
        return {**drawn, "x0": batch["x0"]}

    return Objective(init, loss, prepare)
