"""The latents of UniDiffuser (Bao et al. 2023, section 4.1), small: what images and texts are to its joint network.

An image has two parts: the latent of an autoencoder, from which it is drawn again, and a vector that is trained to find
its text, because the first alone says little of what the image shows. A text is the hidden vectors of the same pair's
text encoder, shortened by a linear layer; a causal decoder reads it back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, models
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.study import Study
from diffusion_jax.stages import Stage


class PairedLatents(NamedTuple):
    """joint: the network of latents. held_out: pairs as they are, `{"image", "text" (ids)}`.

    encode: those to standardised latents, `{"image", "text", "vector"}`. image, text: latents of either to images in
    [-1, 1] and to strings. exact: share of held-out texts that come back from their latents.
    """

    joint: Stage
    held_out: dict[str, Any]
    encode: Callable[[Any], dict]
    image: Callable[[Any], Any]
    text: Callable[[Any], list[str]]
    exact: float


def paired_latents(s: Study) -> PairedLatents:
    """Trains the autoencoder, the pair of encoders, the decoder of captions and the network of their latents."""
    config = s.config.latent
    image, pairs = (s.stage(name, config[name]) for name in ("image", "pairs"))
    captions = s.stage("captions", config.captions, pairs, prepare=captions_of)
    joint = s.stage("joint", config.joint, image, pairs, captions, prepare=in_latents)
    encode, decode = codec(image, pairs, captions)
    space, held_out = space_of(image), pairs.trained.held_out.x0
    tokenizer = pairs.trained.source.tokenizer

    def text(latents):
        return [tokenizer.decode(ids) for ids in np.asarray(decode(latents))]

    written = [tokenizer.decode(ids) for ids in held_out["text"]]
    exact = np.mean([a == b for a, b in zip(text(encode(held_out)["text"]), written, strict=True)])
    return PairedLatents(joint, held_out, encode, space.decode, text, float(exact))


def captions_of(config: ConfigDict, pairs: Stage) -> Experiment:
    """The decoder of captions reads what the pair's text encoder says."""
    tokens = pairs.trained.source.x0["text"]
    return prepare(config, source=data.ArraySource(np.asarray(hidden_of(pairs)(tokens)), {"tokens": tokens}))


def in_latents(config: ConfigDict, image: Stage, pairs: Stage, captions: Stage) -> Experiment:
    """The joint network in the latents of both encoders."""
    encode, _ = codec(image, pairs, captions)
    return prepare(config, source=data.ArraySource(encode(pairs.trained.source.x0)))


def hidden_of(pairs: Stage) -> Callable[[Any], Any]:
    encoder, params = pairs.trained.network.encoders["text"], pairs.value["text"]
    return jax.jit(lambda tokens: encoder.apply(params, tokens).hidden)


def space_of(image: Stage) -> models.LatentSpace:
    """The autoencoder's, standardised over its first pictures."""
    experiment = image.trained
    return models.latent_space(experiment.network, image.value, experiment.source.take(np.arange(256))["x0"])


def codec(image: Stage, pairs: Stage, captions: Stage) -> tuple[Callable[[Any], dict], Callable[[Any], Any]]:
    """encode: pairs to latents, each of variance 1 over the training pairs. decode: latents of texts to ids."""
    hidden, network, captioner = hidden_of(pairs), pairs.trained.network, captions.trained.network
    space, embed = space_of(image), jax.jit(lambda x: network.embed(pairs.value, x)["image"])

    def meant(x):
        text = captioner.encode(captions.value, hidden(x["text"]))
        return {"text": np.asarray(text), "vector": np.asarray(embed({"image": x["image"]}))}

    scales = {name: (latents.mean(), latents.std()) for name, latents in meant(pairs.trained.source.x0).items()}

    def encode(x):
        parts = {name: (latents - scales[name][0]) / scales[name][1] for name, latents in meant(x).items()}
        return {"image": np.asarray(space.encode(x["image"])), **parts}

    def decode(latents):
        mean, deviation = scales["text"]
        return captioner.decode(captions.value, latents * deviation + mean)

    return encode, jax.jit(decode)
