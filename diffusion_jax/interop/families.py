"""The networks whose checkpoints can be read and written, by the class name that their config.json gives."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.interop.autoencoder import AUTOENCODER
from diffusion_jax.interop.clip import CLIP
from diffusion_jax.interop.controlnet import CONTROLNET
from diffusion_jax.interop.dinov2 import DINOV2
from diffusion_jax.interop.dit import DIT, DIT_ORIGINAL
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import MOST_LAYERS, Fields
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


def family_of(config: Mapping[str, Any], told: str | None = None, source: str = "config.json") -> str:
    """The name of the family: `told`, or what config.json says. Raises InvalidInput for one that is not there."""
    fields = Fields(config, source)
    name = told or fields.text("_class_name", None)
    if name is None:
        classes = fields.items("architectures", None) or (None,)
        name = classes[0]
    if name is None:
        raise InvalidInput(
            "The checkpoint has no config.json that names its class (_class_name or architectures): give family=, "
            f"one of {', '.join(sorted(FAMILIES))}."
        )
    if not isinstance(name, str):
        raise fields.wrong("architectures", "a list of names is needed")
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return name


def network_fields(
    family: str, config: Mapping[str, Any], files: Any = None, source: str = "config.json"
) -> dict[str, Any]:
    """Our fields of the network that their config describes.

    files: its tensors, or None. source: what messages call the config. Raises InvalidInput for a field of another type
    or size than it can have, and for an option that we do not have; warns of one that seems misspelt.
    """
    entry = FAMILIES[family]
    fields = Fields(config, source, MOST_LAYERS if files is None else len(files.names), entry.synonyms)
    for name in ("quantization_config", "per_layer_config", "pruned_heads"):
        if fields.raw(name):
            raise fields.wrong(name, "only null can be loaded")
    made = entry.fields(fields, files)
    fields.warn_of_unknown(entry.irrelevant)
    return made


def sample_size(family: str, config: Mapping[str, Any], source: str = "config.json") -> tuple[int, int] | None:
    """Height and width of the x that a network was trained on, None where its config does not say."""
    return Fields(config, source).pair("sample_size", FAMILIES[family].sample_size)
