"""What is asked of a pipeline beside its prompts: images equal the peer's, from the same initial latents.

Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusion_jax import interop  # noqa: E402
from diffusion_jax.errors import InvalidInput  # noqa: E402
from diffusion_jax.interop.prompts import PLAIN  # noqa: E402
from tests.peers.test_pipeline_parity import NEGATIVE, PROMPTS, STEPS, compare, first  # noqa: E402
from tests.peers.tiny_pipelines import LATENTS, saved  # noqa: E402

pytestmark = pytest.mark.peers

KEY = jax.random.key(0)
SIDE = 2 * LATENTS


def normal(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 4)).astype(np.float32)


def theirs(peer, noise, prompts=PROMPTS, **options):
    side = {"height": 2 * noise.shape[1], "width": 2 * noise.shape[2]}
    # It asks for multiples of 8 whatever the factor of its autoencoder.
    peer.check_inputs = lambda *a, **k: None
    options = {"num_inference_steps": STEPS, "output_type": "np", "guidance_scale": 3.0, **options}
    if isinstance(peer, diffusers.PixArtAlphaPipeline):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    return peer(prompts, latents=first(noise), **side, **options).images


def ours(pipeline, noise, prompts=PROMPTS, **options):
    side = (2 * noise.shape[1], 2 * noise.shape[2])
    return interop.generate(
        pipeline, KEY, prompts, noise=noise, size=side, **{"num_steps": STEPS, "scale": 3.0, **options}
    )


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_what_is_asked_of_the_text_encoders(name, tmp_path):
    peer, folder = saved(name, tmp_path)
    pipeline, noise = interop.load_pipeline(folder), normal(LATENTS, LATENTS)
    # Where the peer looks for the last norm, which newer versions of transformers keep in the model itself.
    object.__setattr__(peer.text_encoder, "text_model", peer.text_encoder)
    expected = theirs(peer, noise, negative_prompt=[NEGATIVE] * 2, clip_skip=1)
    compare(f"{name}, clip_skip", ours(pipeline, noise, negative=NEGATIVE, clip_skip=1), expected)

    # Guidance of 1 or less is none, whatever the scale.
    compare(f"{name}, no guidance", ours(pipeline, noise, scale=0.0), theirs(peer, noise, guidance_scale=0.0))

    # The peer takes what prompts are encoded to: chunks and weights change nothing beside it.
    long = ["value of the name " * 30 + "on a (beach:1.4)", "[two] ((cats))"]
    reading = PLAIN._replace(chunks=pipeline.prompter.chunks(long, PLAIN), weighting="a1111")
    main, null = (side(texts, (SIDE, SIDE), reading) for side, texts in zip(pipeline.prompter, (long, [NEGATIVE] * 2)))
    given = {"prompt_embeds": main["context"], "negative_prompt_embeds": null["context"]}
    if name == "SDXL":
        given |= {"pooled_prompt_embeds": main["pooled"], "negative_pooled_prompt_embeds": null["pooled"]}
    given = {key: torch.tensor(np.asarray(value)) for key, value in given.items()}
    assert given["prompt_embeds"].shape[1] > 77
    expected = theirs(peer, noise, prompts=None, **given)
    found = ours(pipeline, noise, long, negative=NEGATIVE, chunks="auto", weighting="a1111")
    compare(f"{name}, chunks and weights", found, expected)

    if name == "SD 1.5":
        odd = normal(7, 9)
        compare("SD 1.5, odd sizes", ours(pipeline, odd, scale=1.0), theirs(peer, odd, guidance_scale=1.0))


def test_sizes_of_patches(tmp_path):
    peer, folder = saved("PixArt", tmp_path)
    noise = normal(6, 10)
    pipeline = interop.load_pipeline(folder)
    compare("PixArt, another size", ours(pipeline, noise), theirs(peer, noise))
    with pytest.raises(InvalidInput, match="multiples of 4"):
        ours(pipeline, normal(7, 10))
