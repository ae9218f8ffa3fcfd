"""The latents of UniDiffuser (Bao et al. 2023, section 4.1), small: what images and texts are to its joint network.

An image has two parts: the latent of an autoencoder, from which it is drawn again, and a vector that is trained to find
its text, because the first alone says little of what the image shows. A text is the hidden vectors of the same pair's
text encoder, shortened by a linear layer; a causal decoder reads it back.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, models
from diffusion_jax.data import captioned_digits
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.parts.paired_tasks import CONDITIONALS, asker, save_pairs
from diffusion_jax.recipes.study import Study, by_seed
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.stages import Stage


class PairedLatents(NamedTuple):
    """joint: the network of latents. images, names: held-out pairs.

    encode: `{"image", "text" (ids)}` to standardised latents, with a "vector". image, text: latents of either to images
    in [-1, 1] and to strings. exact: share of held-out texts that come back from their latents.
    """

    joint: Stage
    images: Any
    names: list[str]
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

    names = [tokenizer.decode(ids) for ids in held_out["text"]]
    exact = np.mean([a == b for a, b in zip(text(encode(held_out)["text"]), names, strict=True)])
    return PairedLatents(joint, held_out["image"], names, encode, space.decode, text, float(exact))


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


def latent_rows(s: Study, found: Mapping[str, list[float]], logits: Callable[[Any], Any]) -> list[Row]:
    """The whole pipeline: text in, image out, and image in, text out, by a network that sees latents only."""
    latent = paired_latents(s)
    experiment = latent.joint.trained
    ask = asker(denoisers.denoiser(experiment.network, experiment.process), experiment, s.config.steps)
    images, label = latent.images, captioned_digits.values(latent.names)
    asked, number = np.arange(s.config.count) % len(images), np.arange(s.config.count) % 10
    tokens = np.stack([captioned_digits.encode(captioned_digits.NAMES[i], 6) for i in number])
    known, params = latent.encode({"image": images[asked], "text": tokens}), latent.joint.value

    def shown(drawn):
        return np.asarray(latent.image(drawn["image"])), latent.text(drawn["text"])

    def measured(seed):
        drawn = {task: shown(ask(params, jax.random.key(seed), task, known)) for task in CONDITIONALS}
        seen = logits(drawn["image | text"][0]).argmax(axis=1)
        return {
            "image | text": (seen == number).mean(),
            "text | image": (captioned_digits.values(drawn["text | image"][1]) == label[asked]).mean(),
        }

    through = by_seed(s.seeds, measured)
    save_pairs(s.picture("latents"), partial(ask, params), known, shown)
    rows = [Row("Texts come back from their latents", "held-out texts", latent.exact, 0.99, "higher", "above 99 %")]
    for task in CONDITIONALS:
        title, figure = f"p({task}) in latents: at most 10 points less", "share that shows what was given"
        rows.append(Row(title, figure, through[task], found[f"{task}: ours"], "higher", "its latents", margin=-0.1))
    return rows
