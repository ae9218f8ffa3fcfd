"""Whole pipelines of the peer in miniature: real classes, random weights, saved as folders.

Imported by tests of the peers extra only.
"""

import json

import diffusers
import torch
import transformers

from tests.interop.vocabularies import clip_folder, t5_folder
from tests.peers.comparison import randomised

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENTS = 8
"""Height and width of the latents; images are twice as large."""


def autoencoder():
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=2 * LATENTS,
    )
    return randomised(model, 1)


def clip(folder, projected=False, width=12, act="quick_gelu"):
    """A text encoder and its tokenizer."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder(folder))
    config = transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size + 2,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=act,
        projection_dim=10,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomised(kind(config), 2), tokenizer


def unet(context, **fields):
    model = diffusers.UNet2DConditionModel(
        sample_size=LATENTS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=context,
        attention_head_dim=(2, 4),
        **fields,
    )
    return randomised(model, 3)


NOTHING = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def dit(folder):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=8, sample_size=LATENTS,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(randomised(transformer), autoencoder(), scheduler)


def pixart(folder, sigma=False):
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=8, sample_size=LATENTS,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip
    tokenizer = transformers.T5Tokenizer.from_pretrained(t5_folder(folder))
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=12,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    encoder = transformers.T5EncoderModel(config).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(**({} if sigma else SCALED))
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    return kind(tokenizer, encoder, autoencoder(), randomised(transformer), scheduler)


def sd1(folder):
    encoder, tokenizer = clip(folder)
    scheduler = diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        autoencoder(), encoder, tokenizer, unet(12), scheduler, requires_safety_checker=False, **NOTHING
    )


def sd2(folder):
    encoder, tokenizer = clip(folder, act="gelu")
    network = unet(12, use_linear_projection=True)
    scheduler = diffusers.DDIMScheduler(
        **SCALED, prediction_type="v_prediction", clip_sample=False, steps_offset=1, set_alpha_to_one=False
    )
    return diffusers.StableDiffusionPipeline(
        autoencoder(), encoder, tokenizer, network, scheduler, requires_safety_checker=False, **NOTHING
    )


def sdxl_refiner(folder):
    encoder, tokenizer = clip(folder / "second", projected=True, width=14, act="gelu")
    network = unet(
        14,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=5 * 4 + 10,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, steps_offset=1, timestep_spacing="leading")
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        autoencoder(), None, encoder, None, tokenizer, randomised(network, 5), scheduler, add_watermarker=False,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def sdxl(folder):
    first, tokenizer = clip(folder / "first")
    second, other = clip(folder / "second", projected=True, width=14, act="gelu")
    network = unet(
        12 + 14,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, steps_offset=1, timestep_spacing="leading")
    nothing = {"feature_extractor": None, "image_encoder": None}
    return diffusers.StableDiffusionXLPipeline(
        autoencoder(), first, second, tokenizer, other, network, scheduler, add_watermarker=False, **nothing
    )


def inpainting(folder):
    encoder, tokenizer = clip(folder)
    scheduler = diffusers.DDIMScheduler(**SCALED, clip_sample=False)
    return diffusers.StableDiffusionInpaintPipeline(
        autoencoder(), encoder, tokenizer, unet(12, in_channels=9), scheduler, requires_safety_checker=False, **NOTHING
    )


PIPELINES = {"DiT": dit, "PixArt": pixart, "SD 1.5": sd1, "SD 2.1": sd2, "SDXL": sdxl}


def saved(name, folder):
    """The peer's pipeline and the folder that it was saved to."""
    torch.set_num_threads(1)
    pipeline = (PIPELINES | {"inpainting": inpainting, "refiner": sdxl_refiner})[name](folder / "vocabulary")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    if name == "DiT":
        # As the published folder has it; the peer does not write it.
        file = folder / "pipeline" / "model_index.json"
        names = {"0": "ant, emmet", "1": "bee"}
        file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": names}))
    return pipeline, folder / "pipeline"
