"""Networks as pure functions: diffusion transformers, U-Nets, MLP, text transformer, KL autoencoder, published text and
vision encoders.

Constructors return a `typing.Network` (`kl_vae` an `Autoencoder`, encoders an `Encoder`). What a network is conditioned
on is a tuple of values, its `conditions` (`label`, `context`, ...; your own kind is a `ConditionStream`). `intercepted`
and the functions beside it look into a network without changing its code. The linen modules inside are built of uniform
blocks (`layers.branches`). What is attached to a frozen network is in `adapters`.
"""

from diffusion_jax.models.caption_decoder import CaptionDecoder, Captioner, caption_decoder
from diffusion_jax.models.choosing import Chooser, chooser
from diffusion_jax.models.conditions import (
    audio,
    concat,
    context,
    guidance_scale,
    label,
    pooled,
    reference,
    sizes,
    target_time,
    text,
)
from diffusion_jax.models.controlnet import ControlNet, control_from_unet, controlled, controlnet
from diffusion_jax.models.detailed import DetailDecoder, detailed
from diffusion_jax.models.dit import DiT, dit, pixart
from diffusion_jax.models.dual_encoder import DualEncoder, dual_encoder
from diffusion_jax.models.early_exit import EarlyExit, Layers, early_exit
from diffusion_jax.models.edits import cached, edit, exits, gates, inner_modules, override, replaced, reweighted, taps
from diffusion_jax.models.encoders import Encoded, Encoder, as_network
from diffusion_jax.models.framewise import framewise
from diffusion_jax.models.incremental import Incremental, KVCache, incremental
from diffusion_jax.models.interception import intercepted, wrapped
from diffusion_jax.models.joint_transformer import JointTransformer, joint_transformer
from diffusion_jax.models.latent_space import LatentSpace, latent_space, patch_autoencoder, principal_components
from diffusion_jax.models.layers.conditioning import (
    Attended,
    ConditionStream,
    CondKey,
    Place,
    check_values,
    empty_condition,
)
from diffusion_jax.models.mlp import Mlp, mlp
from diffusion_jax.models.network import count_params, network, param_shapes
from diffusion_jax.models.observing import FrameEncoder, observing, watching
from diffusion_jax.models.paths import by_path, depth_axes, per_layer
from diffusion_jax.models.reconstruction import Reconstructor, pixel_reconstructor
from diffusion_jax.models.references import (
    Referenced,
    cache_references,
    concatenating,
    null_cache,
    referenced,
    with_references,
)
from diffusion_jax.models.routing import (
    Costs,
    executed_ratio,
    gumbel_sigmoid_st,
    largest_gates,
    token_router,
    width_costs,
    width_gates,
)
from diffusion_jax.models.slicing import Sliced, sliced
from diffusion_jax.models.stages import Staged, staged
from diffusion_jax.models.text_encoders import T5, CLIPText, clip_text, t5_encoder
from diffusion_jax.models.text_transformer import TextTransformer, text_transformer
from diffusion_jax.models.tiling import sharded_rows, tiled
from diffusion_jax.models.unet import UNet, unet
from diffusion_jax.models.vae import KLVAE, Autoencoder, GaussianPosterior, kl_vae
from diffusion_jax.models.video_dit import VideoDiT, video_dit
from diffusion_jax.models.vision_encoders import VisionTransformer, clip_vision, dinov2

__all__ = [
    "KLVAE",
    "T5",
    "Attended",
    "Autoencoder",
    "CLIPText",
    "CaptionDecoder",
    "Captioner",
    "Chooser",
    "CondKey",
    "ConditionStream",
    "ControlNet",
    "Costs",
    "DetailDecoder",
    "DiT",
    "DualEncoder",
    "EarlyExit",
    "Encoded",
    "Encoder",
    "FrameEncoder",
    "GaussianPosterior",
    "Incremental",
    "JointTransformer",
    "KVCache",
    "LatentSpace",
    "Layers",
    "Mlp",
    "Place",
    "Reconstructor",
    "Referenced",
    "Sliced",
    "Staged",
    "TextTransformer",
    "UNet",
    "VideoDiT",
    "VisionTransformer",
    "as_network",
    "audio",
    "by_path",
    "cache_references",
    "cached",
    "caption_decoder",
    "check_values",
    "chooser",
    "clip_text",
    "clip_vision",
    "concat",
    "concatenating",
    "context",
    "control_from_unet",
    "controlled",
    "controlnet",
    "count_params",
    "depth_axes",
    "detailed",
    "dinov2",
    "dit",
    "dual_encoder",
    "early_exit",
    "edit",
    "empty_condition",
    "executed_ratio",
    "exits",
    "framewise",
    "gates",
    "guidance_scale",
    "gumbel_sigmoid_st",
    "incremental",
    "inner_modules",
    "intercepted",
    "joint_transformer",
    "kl_vae",
    "label",
    "largest_gates",
    "latent_space",
    "mlp",
    "network",
    "null_cache",
    "observing",
    "override",
    "param_shapes",
    "patch_autoencoder",
    "per_layer",
    "pixart",
    "pixel_reconstructor",
    "pooled",
    "principal_components",
    "reference",
    "referenced",
    "replaced",
    "reweighted",
    "sharded_rows",
    "sizes",
    "sliced",
    "staged",
    "t5_encoder",
    "taps",
    "target_time",
    "text",
    "text_transformer",
    "tiled",
    "token_router",
    "unet",
    "video_dit",
    "watching",
    "width_costs",
    "width_gates",
    "with_references",
    "wrapped",
]
