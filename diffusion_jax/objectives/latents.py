"""Objectives of latent diffusion on batches of pictures: what encodes them is part of the step and does not learn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.objectives.batches import refuse_weight
from diffusion_jax.typing import Objective


def on_latents(objective: Objective, encode: Callable[[Any], Any]) -> Objective:
    """`objective` on `encode(x0)` in the place of x0: pictures `[B, H, W, C]` become latents `[B, h, w, c]` in a step.

    encode: x0 to latents, such as the `encode` of an autoencoder at its parameters. No gradient flows through it. With
        gradient accumulation each part of the batch is encoded by itself.

    The alternative is to encode once (`data.encoded`); this is for data that augmentation changes from epoch to epoch.
    Hand the autoencoder's parameters to the step by `with_constants`. Raises InvalidInput for a batch with weights of
    its pixels, which latents have none of.
    """

    def latents(batch):
        refuse_weight(batch, "an objective on latents")
        return {**batch, "x0": jax.lax.stop_gradient(encode(batch["x0"]))}

    def init(key, params, batch):
        return objective.init(key, params, latents(batch))

    def loss(params, state, batch, key):
        return objective.loss(params, state, latents(batch), key)

    def prepare(state, batch, key):
        # Draws read the shape of x0 alone, and the pictures stay as they are until their part of the batch is trained.
        shape = jax.eval_shape(encode, batch["x0"])
        drawn = objective.prepare(state, {**batch, "x0": jnp.zeros(shape.shape, shape.dtype)}, key)
        return {**drawn, "x0": batch["x0"]}

    return Objective(init, loss, objective.prepare and prepare)
