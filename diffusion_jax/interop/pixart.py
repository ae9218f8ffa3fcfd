"""PixArt-alpha and PixArt-Sigma as diffusers stores them (`PixArtTransformer2DModel`), and folders from before DiT and
PixArt had classes of their own (`Transformer2DModel`)."""

from typing import Any

from diffusion_jax.errors import invalid
from diffusion_jax.interop.dit import (
    BLOCK,
    DIT,
    IRRELEVANT,
    PLAIN,
    attention_layer,
    block_layers,
    check_stored,
    common_config,
    common_fields,
    dit_fields,
    patch_embedding,
    shapes,
    stored_conditions,
)
from diffusion_jax.interop.family import Family
from diffusion_jax.interop.fields import Fields
from diffusion_jax.interop.tables import TensorTable, dense, vector
from diffusion_jax.models import context, dit, sizes
from diffusion_jax.models.conditions import Context, Sizes

NAME = "PixArtTransformer2DModel"


def pixart_fields(config: Fields, files: Any) -> dict[str, Any]:
    """Fields of `DiT` that make a PixArt."""
    config.choice("norm_type", ("ada_norm_single",))
    config.choice("attention_type", ("default",))
    fields = common_fields(config, 128, 8)
    size = config.raw("sample_size", 128)
    captions = config.whole("caption_channels", None)
    crossed = config.whole("cross_attention_dim", 1152)
    if captions is not None and crossed != fields["width"]:
        raise config.wrong("cross_attention_dim", f"with caption_channels it is the width, {fields['width']}")
    told = context("none", crossed) if captions is None else context("mlp", captions)
    scale, given = config.positive("interpolation_scale", None), config.flag("use_additional_conditions", None)
    eps = config.number("norm_eps", 1e-6, least=0.0)
    return {
        **fields,
        "modulation": "single",
        "conditions": (told, sizes()) if (size == 128 if given is None else given) else (told,),
        "interpolation_scale": float(max(size // 64, 1) if scale is None else scale),
        "norm_eps": eps,
        "mlp_norm_eps": eps,
    }


def _embedder(ours: str, theirs: str) -> TensorTable:
    table = dense(f"condition/{ours}/up", f"adaln_single.emb.{theirs}.linear_1")
    return table | dense(f"condition/{ours}/down", f"adaln_single.emb.{theirs}.linear_2")


def _conditions(module: Any) -> list[Any]:
    """Its context, and its sizes or None."""
    told, sized = stored_conditions(module, NAME, Context, Sizes)
    if told is None or told.projection == "linear":
        raise invalid("conditions", module.conditions, f"a {NAME} has a context with projection 'mlp' or 'none'")
    return [told, sized]


def _table(module) -> TensorTable:
    check_stored(module, NAME, **PLAIN, positions="sincos", modulation="single")
    told, sized = _conditions(module)
    table = patch_embedding(module, "pos_embed.proj") | _embedder("time", "timestep_embedder")
    if sized:
        table |= _embedder("size", "resolution_embedder") | _embedder("aspect", "aspect_ratio_embedder")
    if told.projection == "mlp":
        table |= dense("condition/context_up", "caption_projection.linear_1")
        table |= dense("condition/context_down", "caption_projection.linear_2")
    table |= dense("modulation", "adaln_single.linear")
    table |= block_layers(module) | attention_layer(module, "cross_attention", "attn2")
    for part, branch in enumerate(("attention", "mlp")):
        ours = f"{BLOCK}/{branch}/modulation/table"
        table |= vector(ours, "transformer_blocks.{}.scale_shift_table", part=part, parts=2)
    return table | vector("final_modulation/table", "scale_shift_table") | dense("final", "proj_out")


def _config(module):
    check_stored(module, NAME, frequency_shift=0.0, mlp_norm_eps=module.norm_eps, mlp_ratio=4.0)
    told, sized = _conditions(module)
    projected = told.projection == "mlp"
    return {
        "_class_name": NAME,
        **common_config(module),
        "cross_attention_dim": module.width if projected else told.channels,
        "caption_channels": told.channels if projected else None,
        "interpolation_scale": module.interpolation_scale,
        "use_additional_conditions": sized is not None,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_eps": module.norm_eps,
        "attention_type": "default",
    }


# Folders of the first releases also hold the caption that stands for none, which their networks do not read.
IGNORED = (r"^pos_embed\.pos_embed$", r"^caption_projection\.y_embedding$")

# The number of classes is handed on by the peer and not used.
PIXART = Family(
    "diffusers",
    dit,
    pixart_fields,
    _table,
    _config,
    shapes,
    ignored=IGNORED,
    irrelevant=(*IRRELEVANT, "num_embeds_ada_norm"),
    sample_size=128,
)


def _either(module) -> Family:
    return PIXART if module.modulation == "single" else DIT


def _either_fields(config, files):
    # The peer remaps such a folder by its norm, so defaults are those of the class that took its place; these are gone.
    for name in ("only_cross_attention", "double_self_attention"):
        config.choice(name, (False,))
    config.choice("num_vector_embeds", (None,))
    kind = config.choice("norm_type", ("ada_norm_zero", "ada_norm_single"), "layer_norm")
    if kind == "ada_norm_single":
        return pixart_fields(config, files)
    config.choice("attention_type", ("default",))
    for name in ("cross_attention_dim", "caption_channels"):
        config.choice(name, (None,))
    return dit_fields(config, files)


TRANSFORMER_2D = Family(
    "diffusers",
    dit,
    _either_fields,
    lambda module: _either(module).table(module),
    lambda module: _either(module).config(module),
    shapes,
    ignored=IGNORED,
    irrelevant=(
        *IRRELEVANT,
        "interpolation_scale",
        "num_embeds_ada_norm",
        "use_additional_conditions",
        "use_linear_projection",
    ),
)
"""A folder whose config says `Transformer2DModel`; it is stored as the class that took its place."""
