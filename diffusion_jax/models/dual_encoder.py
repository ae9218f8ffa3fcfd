"""Two encoders whose vectors are compared: images and texts in one space, as in CLIP (Radford et al. 2021).

The encoders are any of `vision_encoders` and `text_encoders` with a pooled vector; the loss that trains the pair is
`objectives.contrastive`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.encoders import Encoder
from diffusion_jax.processes import safe_inverse, safe_sqrt


class DualEncoder(NamedTuple):
    """A pair of encoders as pure functions; x is `{"image": [B, H, W, C], "text": int [B, N]}`.

    init:  (key, x) -> params, `{"image", "text", "log_scale"}`
    embed: (params, x) -> `{"image": [B, P], "text": [B, P]}`, unit vectors, of the modalities that x has
    scale: (params) -> exp(log_scale), by which their cosines are multiplied; at most 100
    encoders: by modality
    """

    init: Callable[..., Any]
    embed: Callable[..., Any]
    scale: Callable[..., Any]
    encoders: dict[str, Encoder]


def _unit(vector):
    """The vector over its length, in float32; 0, with a finite derivative, where it has none."""
    vector = vector.astype(jnp.float32)
    square = jnp.sum(jnp.square(vector), axis=-1, keepdims=True)
    return vector * safe_inverse(safe_sqrt(square))


def dual_encoder(image: Encoder, text: Encoder, temperature: float = 0.07) -> DualEncoder:
    """The pair, with a learned scale that begins at `1 / temperature`.

    Raises InvalidInput, when it is initialised, for encoders without pooled vectors of the same length.
    """
    encoders = {"image": image, "text": text}

    def init(key, x):
        keys = jax.random.split(key, 2)
        params = {name: encoders[name].init(k, x[name]) for name, k in zip(("image", "text"), keys, strict=True)}
        pooled = {name: jax.eval_shape(encoders[name].apply, params[name], x[name]).pooled for name in encoders}
        lengths = {name: None if vector is None else vector.shape[-1] for name, vector in pooled.items()}
        if None in lengths.values() or lengths["image"] != lengths["text"]:
            raise InvalidInput(f"The pooled vectors have the lengths {lengths}: two of the same length are needed.")
        return {**params, "log_scale": -jnp.log(jnp.float32(temperature))}

    def embed(params, x):
        pooled = {name: encoders[name].apply(params[name], value).pooled for name, value in x.items()}
        return {name: _unit(vector) for name, vector in pooled.items()}

    def scale(params):
        return jnp.minimum(jnp.exp(params["log_scale"]), 100.0)

    return DualEncoder(init, embed, scale, encoders)
