"""PixArt-alpha and PixArt-Sigma as diffusers stores them (`PixArtTransformer2DModel`), and folders from before DiT and
PixArt had classes of their own (`Transformer2DModel`)."""

from diffusion_jax.errors import invalid
from diffusion_jax.interop import dit as dit_layout
from diffusion_jax.interop.dit import (
    BLOCK,
    PLAIN,
    attention_layer,
    block_layers,
    check_stored,
    common_config,
    common_fields,
    patch_embedding,
    shapes,
)
from diffusion_jax.interop.family import Family, take
from diffusion_jax.interop.tables import TensorTable, dense, vector
from diffusion_jax.models import dit

NAME = "PixArtTransformer2DModel"


def _fields(config, files):
    take(config, "norm_type", "ada_norm_single", ("ada_norm_single",))
    take(config, "attention_type", "default", ("default",))
    fields = common_fields(config, 128, 8)
    size = take(config, "sample_size", 128)
    captions, crossed = take(config, "caption_channels", None), take(config, "cross_attention_dim", 1152)
    if captions is not None and crossed != fields["width"]:
        raise invalid("config.json: cross_attention_dim", crossed, f"with caption_channels it is {fields['width']}")
    if crossed is None:
        raise invalid("config.json: cross_attention_dim", crossed, "the width of the captions is needed")
    scale, sizes = config.get("interpolation_scale"), config.get("use_additional_conditions")
    eps = take(config, "norm_eps", 1e-6)
    return {
        **fields,
        "modulation": "single",
        "context": True,
        "context_projection": "none" if captions is None else "mlp",
        "context_channels": crossed if captions is None else captions,
        "interpolation_scale": float(max(size // 64, 1) if scale is None else scale),
        "sizes": size == 128 if sizes is None else sizes,
        "norm_eps": eps,
        "mlp_norm_eps": eps,
    }


def _embedder(ours: str, theirs: str) -> TensorTable:
    table = dense(f"condition/{ours}/up", f"adaln_single.emb.{theirs}.linear_1")
    return table | dense(f"condition/{ours}/down", f"adaln_single.emb.{theirs}.linear_2")


def _table(module) -> TensorTable:
    check_stored(module, NAME, **PLAIN, positions="sincos", modulation="single", context=True, num_classes=0)
    if module.context_projection == "linear":
        raise invalid("context_projection", "linear", f"a {NAME} has 'mlp' or 'none'")
    table = patch_embedding(module, "pos_embed.proj") | _embedder("time", "timestep_embedder")
    if module.sizes:
        table |= _embedder("size", "resolution_embedder") | _embedder("aspect", "aspect_ratio_embedder")
    if module.context_projection == "mlp":
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
    projected = module.context_projection == "mlp"
    return {
        "_class_name": NAME,
        **common_config(module),
        "cross_attention_dim": module.width if projected else module.context_channels,
        "caption_channels": module.context_channels if projected else None,
        "interpolation_scale": module.interpolation_scale,
        "use_additional_conditions": module.sizes,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_eps": module.norm_eps,
        "attention_type": "default",
    }


# Folders of the first releases also hold the caption that stands for none, which their networks do not read.
IGNORED = (r"^pos_embed\.pos_embed$", r"^caption_projection\.y_embedding$")

PIXART = Family("diffusers", dit, _fields, _table, _config, shapes, ignored=IGNORED)


def _either(module) -> Family:
    return PIXART if module.modulation == "single" else dit_layout.DIT


def _either_fields(config, files):
    kind = take(config, "norm_type", "layer_norm", ("ada_norm_zero", "ada_norm_single"))
    return (PIXART if kind == "ada_norm_single" else dit_layout.DIT).fields(config, files)


TRANSFORMER_2D = Family(
    "diffusers",
    dit,
    _either_fields,
    lambda module: _either(module).table(module),
    lambda module: _either(module).config(module),
    shapes,
    ignored=IGNORED,
)
"""A folder whose config says `Transformer2DModel`; it is stored as the class that took its place."""
