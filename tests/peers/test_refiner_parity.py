"""SDXL's refiner, alone and taking over from the base: images equal the peer's.

Needs the peers extra: `make test-peers`.
"""

import numpy as np
import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusion_jax import interop  # noqa: E402
from tests.peers.test_generation_parity import SIDE, normal, ours  # noqa: E402
from tests.peers.test_pipeline_parity import NEGATIVE, PROMPTS, compare, first  # noqa: E402
from tests.peers.tiny_pipelines import LATENTS, saved  # noqa: E402

pytestmark = pytest.mark.peers


def test_a_refiner_takes_over(tmp_path, monkeypatch):
    base, folder = saved("SDXL", tmp_path / "base")
    refiner, other = saved("refiner", tmp_path / "refiner")
    noise, steps = normal(LATENTS, LATENTS), 5
    options = {"negative_prompt": [NEGATIVE] * 2, "num_inference_steps": steps, "guidance_scale": 3.0}
    latents = base(
        PROMPTS, latents=first(noise), height=SIDE, width=SIDE, denoising_end=0.6, output_type="latent", **options
    ).images
    expected = refiner(PROMPTS, image=latents, denoising_start=0.6, output_type="np", **options).images
    pipeline, second = interop.load_pipeline(folder), interop.load_pipeline(other)
    found = ours(pipeline, noise, refiner=second, handover=0.4, negative=NEGATIVE, num_steps=steps)
    compare("SDXL with its refiner", found, expected)

    module = diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: first(noise))
    monkeypatch.setattr(module, "retrieve_latents", lambda output, *a, **k: output.latent_dist.mean)
    image = np.random.default_rng(1).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    expected = refiner(PROMPTS, image=first(image), strength=0.6, output_type="np", **options).images
    found = ours(second, noise, image=image, strength=0.6, num_steps=steps, negative=NEGATIVE)
    compare("SDXL refiner, image to image", found, expected)
