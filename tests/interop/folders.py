"""Whole pipelines in miniature, written by this library alone: random weights, real layouts."""

import json

import jax
import numpy as np

from diffusion_jax import interop, models
from tests.interop.vocabularies import clip_folder

LATENTS = 8
SIZE = 2 * LATENTS
UNET = {
    "channels": 8,
    "multipliers": (1,),
    "num_residual": 1,
    "attention": (0,),
    "heads": 2,
    "groups": 4,
    "time_features": 8,
    "in_channels": 4,
    "conditions": (models.context("none", 12),),
}
VAE = {"channels": 8, "multipliers": (1, 2), "groups": 4, "scaling_factor": 0.18215, "num_residual": 1}


def drawn(family, network, seed=0):
    """The network with random parameters of a size that lets every one of them speak."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        size = 0.1 if len(leaf.shape) < 2 else np.prod(leaf.shape[-2:-1]) ** -0.5
        return jax.device_put((size * rng.normal(size=leaf.shape)).astype(np.float32))

    params = jax.tree.map(draw, interop.FAMILIES[family].shapes(network))
    return interop.Pretrained(network, params, family, {})


def written(folder, info, scheduler, **components):
    """A folder with model_index.json, a scheduler and the given components."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(info))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name, pretrained in components.items():
        interop.save_pretrained(folder / name, pretrained)
    return folder


def autoencoder():
    return drawn("AutoencoderKL", models.kl_vae("kl_f8", **VAE), 1)


def dit_folder(folder):
    network = models.dit(
        "S/2", width=16, depth=2, heads=2, conditions=(models.label(5),), learn_sigma=True, in_channels=4,
        base_size=LATENTS // 2, frequency_shift=1.0,
    )  # fmt: skip
    return written(
        folder,
        {"_class_name": "DiTPipeline", "id2label": {"0": "ant, emmet", "1": "bee"}},
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        transformer=drawn("DiTTransformer2DModel", network),
        vae=autoencoder(),
    )


def sd_folder(folder, **fields):
    """Stable Diffusion; fields of its U-Net."""
    network = models.unet("sd15", **{**UNET, **fields})
    made = clip_folder(folder / "tokenizer")
    vocabulary = len(json.loads((made / "vocab.json").read_text()))
    text = models.clip_text(
        "vit_l", vocab_size=vocabulary, width=12, depth=2, heads=2, eos=vocabulary - 1, mlp_width=24
    )
    return written(
        folder,
        {"_class_name": "StableDiffusionPipeline"},
        {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "timestep_spacing": "leading"},
        unet=drawn("UNet2DConditionModel", network)._replace(
            config={"_class_name": "UNet2DConditionModel", "sample_size": LATENTS}
        ),
        text_encoder=drawn("CLIPTextModel", text, 2),
        vae=autoencoder(),
    )
