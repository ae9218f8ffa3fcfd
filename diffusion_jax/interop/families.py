"""The networks whose checkpoints can be read and written, by the class name that their config.json gives."""

from typing import Any

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.interop.autoencoder import AUTOENCODER
from diffusion_jax.interop.clip import CLIP
from diffusion_jax.interop.controlnet import CONTROLNET
from diffusion_jax.interop.dinov2 import DINOV2
from diffusion_jax.interop.dit import DIT, DIT_ORIGINAL
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.pixart import PIXART, TRANSFORMER_2D
from diffusion_jax.interop.t5 import T5
from diffusion_jax.interop.unet import UNET

FAMILIES: dict[str, Family] = {
    "AutoencoderKL": AUTOENCODER,
    "ControlNetModel": CONTROLNET,
    "DiTTransformer2DModel": DIT,
    "PixArtTransformer2DModel": PIXART,
    "Transformer2DModel": TRANSFORMER_2D,
    "UNet2DConditionModel": UNET,
    "dit_original": DIT_ORIGINAL,
    **CLIP,
    **DINOV2,
    **T5,
}


def family_of(config: dict[str, Any], told: str | None = None) -> str:
    """The name of the family: `told`, or what config.json says. Raises InvalidInput for one that is not there."""
    name = told or config.get("_class_name") or (config.get("architectures") or [None])[0]
    if name is None:
        raise InvalidInput(
            "The checkpoint has no config.json that names its class (_class_name or architectures): give family=, "
            f"one of {', '.join(sorted(FAMILIES))}."
        )
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return name
