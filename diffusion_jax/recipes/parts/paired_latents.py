"""The latents of UniDiffuser (Bao et al. 2023, section 4.1), small: what images and texts are to its joint network.

An image has two parts: the latent of an autoencoder, from which it is drawn again, and a vector that is trained to find
its text, because the first alone says little of what the image shows. A text is the hidden vectors of the same pair's
text encoder, shortened by a linear layer; a causal decoder reads it back. They are trained here, and measured around
a joint network: text in, image out, and image in, text out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.data import captioned_digits
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.frame import seeds, trained
from diffusion_jax.recipes.parts.latents import trained_latents
from diffusion_jax.recipes.parts.paired_samples import CONDITIONALS, TASKS, pair_sampler, save_pairs
from diffusion_jax.recipes.report import Claim, claim


class PairedLatents(NamedTuple):
    """source, held_out: pairs as standardised latents, `{"image", "text", "vector"}`.

    encode: `{"image", "text" (ids)}` to latents. image, text: latents of either to images in [-1, 1] and to strings.
    retrieval: share of held-out images whose nearest of all held-out texts is theirs.
    exact: share of held-out texts that come back from their latents.
    """

    source: data.ArraySource
    held_out: data.ArraySource
    encode: Callable[[Any], dict]
    image: Callable[[Any], Any]
    text: Callable[[Any], list[str]]
    retrieval: float
    exact: float


def paired_latents(config: ConfigDict) -> PairedLatents:
    """Trains the autoencoder, the pair of encoders and the decoder of captions that `config` describes, or reads them.

    config: experiments `image`, `pairs` and `captions`; the last reads what the second one's text encoder says.
    """
    space, pairs = trained_latents(config.image, "unidiffuser-autoencoder"), prepare(config.pairs)
    matched, network = trained(pairs, "unidiffuser-pairs"), pairs.network
    source, held_out = pairs.source.x0, pairs.held_out.x0
    hidden = jax.jit(lambda tokens: network.encoders["text"].apply(matched["text"], tokens).hidden)
    embed = jax.jit(lambda x: network.embed(matched, x))

    written = data.ArraySource(np.asarray(hidden(source["text"])), {"tokens": source["text"]})
    captions = prepare(config.captions)._replace(source=written)
    reading, captioner = trained(captions, "unidiffuser-captions", given=config.pairs.to_dict()), captions.network
    decode = jax.jit(lambda latents: captioner.decode(reading, latents))

    def meant(x):
        """Text latents and image vectors as they come."""
        text = captioner.encode(reading, hidden(x["text"]))
        return {"text": np.asarray(text), "vector": np.asarray(embed({"image": x["image"]})["image"])}

    scales = {name: (latents.mean(), latents.std()) for name, latents in meant(source).items()}

    def encode(x):
        parts = {name: (latents - scales[name][0]) / scales[name][1] for name, latents in meant(x).items()}
        return {"image": np.asarray(space.encode(x["image"])), **parts}

    def text(latents):
        mean, deviation = scales["text"]
        return [pairs.source.tokenizer.decode(ids) for ids in np.asarray(decode(latents * deviation + mean))]

    vectors, latents = embed(held_out), encode(held_out)
    nearest = np.asarray(vectors["image"] @ vectors["text"].T).argmax(axis=1)
    retrieval = (held_out["text"][nearest] == held_out["text"]).all(axis=1).mean()
    exact = np.mean([a == pairs.source.tokenizer.decode(b) for a, b in zip(text(latents["text"]), held_out["text"])])
    sources = data.ArraySource(encode(source)), data.ArraySource(latents)
    return PairedLatents(*sources, encode, space.decode, text, float(retrieval), float(exact))


def through_latents(
    config: ConfigDict, pixels: Mapping[str, Any], logits: Callable[[Any], Any], path: Path
) -> list[Claim]:
    """The whole pipeline: text in, image out, and image in, text out, by a network that sees latents only."""
    latent, pairs = paired_latents(config.latent), prepare(config.latent.joint)
    experiment = pairs._replace(source=latent.source, held_out=latent.held_out, shape=latent.source.shape)
    stages = {name: config.latent[name].to_dict() for name in ("image", "pairs", "captions")}
    params, made = trained(experiment, "unidiffuser-latent", given=stages), pair_sampler(experiment, config.steps)

    held_out, length = pairs.held_out.x0["image"], latent.source.shape["text"][0]
    asked, number = np.arange(config.count) % len(held_out), np.arange(config.count) % 10
    tokens = np.stack([captioned_digits.encode(captioned_digits.NAMES[i], length) for i in number])
    known = latent.encode({"image": held_out[asked], "text": tokens})
    label = captioned_digits.values(captioned_digits.decode(pairs.held_out.x0["text"]))

    def shown(drawn):
        return np.asarray(latent.image(drawn["image"])), latent.text(drawn["text"])

    images, texts = [], []
    for seed in seeds(config):
        drawn = [made.draw(params, jax.random.key(seed), TASKS[task], known) for task, _, _ in CONDITIONALS]
        images.append((logits(shown(drawn[0])[0]).argmax(axis=1) == number).mean())
        texts.append((captioned_digits.values(shown(drawn[1])[1]) == label[asked]).mean())
    save_pairs(path, made, params, known, shown)
    before, after = (
        (logits(x).argmax(axis=1) == label).mean()
        for x in (held_out, np.asarray(latent.image(latent.held_out.x0["image"])))
    )
    whole = "the published system works in latents; its network sees no pixel and no character"
    return [
        claim(
            "stage 1: texts come back from their latents", "share of held-out texts, every character; above 0.99",
            0.99, latent.exact, "higher", "expected above 99 % before diffusion is trained",
        ),
        claim(
            "stage 1: image vectors find their texts", "share of held-out images, against chance; 70 points more",
            0.1, latent.retrieval, "higher", "trained contrastively, as CLIP", margin=0.7,
        ),
        claim(
            "stage 1: images come back from their latents", "share of held-out images read right, before and after",
            before, after, "higher", "the autoencoder is no bottleneck", margin=-0.03,
        ),
        claim(
            "latents: text in, image out", "images that show it, against pixels, one training seed; 10 points less",
            pixels["image | text: ours"], images, "higher", whole, margin=-0.1,
        ),
        claim(
            "latents: image in, text out", "texts that name it, against pixels, one training seed; 10 points less",
            pixels["text | image: ours"], texts, "higher", whole, margin=-0.1,
        ),
    ]  # fmt: skip
