"""Images of whole pipelines equal the peer's, from the same initial latents.

Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusion_jax import interop  # noqa: E402
from tests.peers import tiny_pipelines  # noqa: E402
from tests.peers.figures import record  # noqa: E402
from tests.peers.tiny_pipelines import LATENTS, PIPELINES, SCALED, saved  # noqa: E402

pytestmark = pytest.mark.peers

TOLERANCE = 1e-3
STEPS = 4
PROMPTS = ["A red cube on a Table", "two cats"]
NEGATIVE = "blurry picture"


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=(2, LATENTS, LATENTS, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, size=(2, 2 * LATENTS, 2 * LATENTS, 3)).astype(np.float32)
    mask = np.zeros((2 * LATENTS, 2 * LATENTS), bool)
    mask[3:11, 5:16] = True
    return image, mask


def first(x):
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def compare(name, found, expected, tolerance=TOLERANCE):
    expected = np.moveaxis(np.asarray(expected), 1, -1) if expected.shape[1] == 3 else np.asarray(expected)
    error = float(np.abs((np.asarray(found) + 1) / 2 - expected).max())
    assert expected.std() > 0.02, "the picture is not flat"
    assert error <= tolerance, error
    record("pipeline", name, error)


@pytest.mark.parametrize("name", PIPELINES)
def test_images_equal_the_peers(name, tmp_path, noise, monkeypatch):
    peer, folder = saved(name, tmp_path)
    options = {"num_inference_steps": STEPS, "output_type": "np"}
    key = jax.random.key(0)
    if name == "DiT":
        # The peer draws its latents itself.
        monkeypatch.setattr(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", lambda *a, **k: first(noise))
        expected = peer([3, 1], guidance_scale=3.0, **options).images
        found = interop.generate(
            interop.load_pipeline(folder), key, [3, "bee"], num_steps=STEPS, scale=3.0, noise=noise
        )
    else:
        options |= {"latents": first(noise), "negative_prompt": [NEGATIVE] * 2, "guidance_scale": 3.0}
        if name == "PixArt":
            options |= {"use_resolution_binning": False, "clean_caption": False}
        side = 2 * LATENTS
        expected = peer(PROMPTS, height=side, width=side, **options).images
        pipeline = interop.load_pipeline(folder)
        found = interop.generate(
            pipeline, key, PROMPTS, negative=NEGATIVE, num_steps=STEPS, scale=3.0, noise=noise, size=(side, side)
        )
    compare(name, found, expected)


def test_sdxl_without_a_negative_prompt_is_guided_away_from_zeros(tmp_path, noise):
    peer, folder = saved("SDXL", tmp_path)
    side = 2 * LATENTS
    expected = peer(
        PROMPTS, num_inference_steps=STEPS, output_type="np", latents=first(noise), height=side, width=side,
        guidance_scale=3.0,
    ).images  # fmt: skip
    pipeline = interop.load_pipeline(folder)
    found = interop.generate(
        pipeline, jax.random.key(0), PROMPTS, num_steps=STEPS, scale=3.0, noise=noise, size=(side, side)
    )
    compare("SDXL", found, expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_latent_consistency_model_is_told_the_scale_of_guidance(scale, tmp_path, noise):
    """In one step, behind which no noise is drawn."""
    encoder, tokenizer = tiny_pipelines.clip(tmp_path / "words")
    network = tiny_pipelines.unet(12, time_cond_proj_dim=6)
    scheduler = diffusers.LCMScheduler(**tiny_pipelines.SCALED)
    peer = diffusers.LatentConsistencyModelPipeline(
        tiny_pipelines.autoencoder(), encoder, tokenizer, network, scheduler, requires_safety_checker=False,
        **tiny_pipelines.NOTHING,
    )  # fmt: skip
    peer.save_pretrained(tmp_path / "folder")
    options = {"num_inference_steps": 1, "output_type": "np", "height": 16, "width": 16}
    expected = peer(PROMPTS, guidance_scale=scale, latents=first(noise), **options).images
    pipeline = interop.load_pipeline(tmp_path / "folder")
    assert (pipeline.num_steps, pipeline.scale) == (4, 8.5)
    found = interop.generate(pipeline, jax.random.key(0), PROMPTS, num_steps=1, scale=scale, noise=noise, size=(16, 16))
    compare("LCM", found, expected)


def test_without_guidance(tmp_path, noise):
    peer, folder = saved("SD 1.5", tmp_path)
    options = {"num_inference_steps": STEPS, "output_type": "np", "height": 16, "width": 16}
    expected = peer(PROMPTS, guidance_scale=1.0, latents=first(noise), **options).images
    pipeline = interop.load_pipeline(folder)
    found = interop.generate(
        pipeline, jax.random.key(0), PROMPTS, num_steps=STEPS, scale=1.0, noise=noise, size=(16, 16)
    )
    compare("SD 1.5", found, expected)


@pytest.fixture
def posterior_mean(monkeypatch):
    """The peer draws from the posterior of the latents; here it takes the mean, as we do."""
    for module in (
        diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img,
        diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint,
    ):
        monkeypatch.setattr(module, "retrieve_latents", lambda output, *a, **k: output.latent_dist.mean)


@pytest.fixture
def of_images(tmp_path, noise, pictures, posterior_mean, monkeypatch):
    """`(name) -> (redo, peer)`: image to image of both, from the same noise, with the peer's present scheduler."""
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: first(noise))

    def both(name):
        peer, folder = saved(name, tmp_path)
        peer = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(peer)
        peer.set_progress_bar_config(disable=True)
        pipeline = interop.load_pipeline(folder)

        def redo(strength, steps, scheduler=None):
            ours = pipeline
            if scheduler is not None:
                peer.scheduler = scheduler
                config = {**scheduler.config, "_class_name": type(scheduler).__name__}
                ours = pipeline._replace(scheduler=interop.read_scheduler(config))
            asked = {"image": first(pictures[0]), "guidance_scale": 3.0, "output_type": "np"}
            expected = peer(PROMPTS, strength=strength, num_inference_steps=steps, **asked).images
            options = {"image": pictures[0], "strength": strength, "num_steps": steps, "scale": 3.0, "noise": noise}
            return interop.generate(ours, jax.random.key(0), PROMPTS, **options), expected

        return redo

    return both


@pytest.mark.parametrize("name", ["SD 2.1", "SD 1.5"])
def test_image_to_image(name, of_images):
    """With the scheduler that the checkpoint ships: DDIM of v, and PNDM."""
    compare(f"{name}, image to image", *of_images(name)(0.6, 10))


def test_image_to_image_with_other_schedulers(of_images):
    """In the place of the checkpoint's own, in one pipeline: what the network is told is the new one's."""
    redo = of_images("SD 1.5")
    karras = {**SCALED, "use_karras_sigmas": True}
    for name, scheduler, strength, steps in (
        ("DPM++ 2M Karras", diffusers.DPMSolverMultistepScheduler(**karras), 0.1, 100),
        ("DPM++ order 3", diffusers.DPMSolverMultistepScheduler(**SCALED, solver_order=3), 0.5, 20),
        ("LMS", diffusers.LMSDiscreteScheduler(**SCALED), 0.5, 20),
        ("Heun", diffusers.HeunDiscreteScheduler(**SCALED), 0.5, 8),
        ("v", diffusers.DDIMScheduler(**SCALED, clip_sample=False, prediction_type="v_prediction"), 0.5, 8),
    ):
        compare(f"SD 1.5, image to image, {name}", *redo(strength, steps, scheduler))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_with_schedulers_that_ask_twice_a_step(
    strength, tmp_path, noise, pictures, posterior_mean, monkeypatch
):
    """The known region is put back between two evaluations of a step too: PNDM's first, all of Heun's."""
    peer, folder = saved("SD 1.5", tmp_path)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: first(noise))
    peer = diffusers.StableDiffusionInpaintPipeline.from_pipe(peer)
    peer.set_progress_bar_config(disable=True)
    pipeline, (image, mask) = interop.load_pipeline(folder), pictures
    masks = torch.tensor(np.broadcast_to(mask, (2, 1, *mask.shape)).copy()).float()
    told = {"strength": strength, "output_type": "np", "num_inference_steps": 6, "guidance_scale": 1.0}
    options = {"image": image, "mask": mask, "strength": strength, "num_steps": 6, "scale": 1.0, "noise": noise}
    for name, scheduler in (("PNDM", peer.scheduler), ("Heun", diffusers.HeunDiscreteScheduler(**SCALED))):
        peer.scheduler = scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        ours = pipeline._replace(scheduler=interop.read_scheduler(config))
        found = interop.generate(ours, jax.random.key(0), PROMPTS, **options)
        expected = peer(PROMPTS, image=first(image), mask_image=masks, height=16, width=16, **told).images
        compare(f"SD 1.5, inpainting, {name}", found, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_inpainting(trained, tmp_path, noise, pictures, posterior_mean, monkeypatch):
    peer, folder = saved("inpainting" if trained else "SD 2.1", tmp_path)
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: first(noise))
    if not trained:
        peer = diffusers.StableDiffusionInpaintPipeline.from_pipe(peer)
        peer.set_progress_bar_config(disable=True)
        folder = tmp_path / "inpaint"
        peer.save_pretrained(folder)
    image, mask = pictures
    expected = peer(
        PROMPTS,
        image=first(image),
        mask_image=torch.tensor(np.broadcast_to(mask, (2, 1, *mask.shape)).copy()).float(),
        height=16,
        width=16,
        strength=1.0,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
    ).images
    found = interop.generate(
        interop.load_pipeline(folder),
        jax.random.key(0),
        PROMPTS,
        image=image,
        mask=mask,
        num_steps=STEPS,
        scale=3.0,
        noise=noise,
    )
    compare("SD, inpainting" if trained else "SD 2.1, inpainting", found, expected)
