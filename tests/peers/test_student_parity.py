"""A student that was distilled here is diffusers' own: an LCM-LoRA is read there, and one step of it is ours.

Needs the peers extra: `make test-peers`.
"""

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusion_jax import finetune, interop  # noqa: E402
from diffusion_jax.command import run_command  # noqa: E402
from tests.peers.test_generation_parity import theirs  # noqa: E402
from tests.peers.test_pipeline_parity import PROMPTS, compare, noise  # noqa: E402, F401
from tests.peers.tiny_pipelines import LATENTS, saved  # noqa: E402

pytestmark = pytest.mark.peers


def test_an_lcm_lora_is_read_by_diffusers(tmp_path, noise):  # noqa: F811
    peer, folder = saved("SD 1.5", tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(PROMPTS[i % 2])
    flags = [f"--pretrained={folder}", f"--data={photos}", f"--workdir={tmp_path / 'out'}", f"--size={2 * LATENTS}"]
    student = ["--lora-rank=2", "--lcm=3", "--steps=3", "--batch-size=2", "--learning-rate=0.05"]
    assert run_command(finetune.main, [*flags, *student, "--config.mesh.devices=1", "--no-progress"]) == 0

    plain = interop.with_scheduler(interop.load_pipeline(folder), "LCMScheduler")
    file = tmp_path / "out" / finetune.LORA_FILE
    pipeline = interop.with_scheduler(interop.load_pipeline(folder, loras=[(file, 1.0)]), "LCMScheduler")
    how = {"num_steps": 1, "scale": 1.0, "noise": noise, "size": (16, 16)}
    found, before = (interop.generate(one, jax.random.key(0), PROMPTS, **how) for one in (pipeline, plain))
    assert np.abs(found - before).max() > 1e-3

    peer.load_lora_weights(tmp_path / "out")
    peer.scheduler = diffusers.LCMScheduler.from_config(peer.scheduler.config)
    compare("LCM-LoRA", found, theirs(peer, noise, num_inference_steps=1, guidance_scale=1.0))
