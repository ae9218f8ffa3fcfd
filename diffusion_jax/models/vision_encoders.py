"""Published vision encoders: the image half of CLIP, and DINOv2, which are one vision transformer with other fields.

The preprocessing of an image (size, mean and standard deviation of the colours) belongs to the checkpoint:
`interop.load_preprocessor`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.models.encoders import Encoded, Encoder, check_mask, make_encoder, prenorm_stack
from diffusion_jax.models.layers.branches import Side
from diffusion_jax.models.layers.dense import projection
from diffusion_jax.models.layers.embeddings import bicubic_matrix
from diffusion_jax.models.layers.prenorm import affine_norm


class VisionTransformer(nn.Module):
    """A transformer over patches behind a class token (Dosovitskiy et al. 2021).

    image_size: the size of images that the table of positions is for, in pixels a side; for any other size whose sides
        divide by `patch` the table is interpolated, bicubic. antialias: whether that filters where it shrinks.
    patch: pixels a side. channels: of the images. mlp_width: hidden width of the feed-forward layers.
    gated: whether these are gated. layer_scale: see `PreNormBranch`.
    patch_bias: whether the embedding of patches has a bias. qkv_bias: see `Attention`.
    pre_norm: whether the stream is normed before the first block.
    norm_tokens: whether the last norm is applied to all tokens; otherwise `hidden` is the stream, and pooled is normed.
    registers: learned tokens behind the class token (Darcet et al. 2024).
    mask_token: whether patches may be hidden, which then are a learned vector (Oquab et al. 2024, section 4).
    projection: length of the pooled vector; 0 leaves it unprojected, `[B, width]`.
    The other fields are those of `CLIPText`. `hidden` is `[B, 1 + registers + patches, width]`.
    """

    image_size: int = 224
    patch: int = 14
    channels: int = 3
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: str = "quick_gelu"
    gated: bool = False
    eps: float = 1e-5
    layer_scale: bool = False
    patch_bias: bool = False
    qkv_bias: bool = True
    pre_norm: bool = True
    norm_tokens: bool = False
    registers: int = 0
    mask_token: bool = False
    antialias: bool = False
    projection: int = 0
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, mask):
        h = self._embedded(images, mask)
        if self.pre_norm:
            h = affine_norm("layer", self.eps, name="norm_in")(h)
        scale = {"layer_scale": self.layer_scale}
        last, states = prenorm_stack(
            self, h, Side(), {"qkv_bias": self.qkv_bias, **scale}, {"gated": self.gated, **scale}
        )
        norm = affine_norm("layer", self.eps)
        hidden = norm(last) if self.norm_tokens else last
        pooled = hidden[:, 0] if self.norm_tokens else norm(hidden[:, 0])
        if self.projection:
            layer = projection(self.projection, use_bias=False, dtype=jnp.dtype(self.dtype), name="projection")
            pooled = layer(pooled).astype(jnp.float32)
        return Encoded(hidden, pooled, states)

    def _embedded(self, images, mask):
        if images.ndim != 4 or images.shape[3] != self.channels or not jnp.issubdtype(images.dtype, jnp.floating):
            given = f"{images.dtype}{list(images.shape)}"
            raise invalid("images", given, f"floating-point [B, H, W, {self.channels}] are needed")
        batch, height, width, channels = images.shape
        patch = self.patch
        if not height or not width or height % patch or width % patch:
            raise invalid("images.shape", images.shape, f"height and width must divide by the patch, {patch}")
        rows, columns = height // patch, width // patch
        check_mask(mask, (batch, rows * columns))
        init = nn.initializers.normal(0.02)

        y = images.reshape(batch, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, rows * columns, patch * patch * channels)
        dtype = jnp.dtype(self.dtype)
        y = projection(self.width, use_bias=self.patch_bias, dtype=dtype, name="patch_embed")(y).astype(jnp.float32)
        if self.mask_token:
            blank = self.param("mask_token", nn.initializers.zeros, (self.width,))
            y = y if mask is None else jnp.where(mask[..., None], y, blank)
        elif mask is not None:
            raise invalid("mask", f"bool{list(mask.shape)}", "this encoder has no mask token: None is needed")
        first = self.param("class_token", init, (self.width,))
        table = self._positions(rows, columns)
        parts = [jnp.broadcast_to(first + table[0], (batch, 1, self.width)), y + table[1:]]
        if self.registers:
            registers = self.param("registers", init, (self.registers, self.width))
            parts.insert(1, jnp.broadcast_to(registers, (batch, *registers.shape)))
        return jnp.concatenate(parts, axis=1)

    def _positions(self, rows, columns):
        side = self.image_size // self.patch
        table = self.param("positions", nn.initializers.normal(0.02), (1 + side * side, self.width))
        if (rows, columns) == (side, side):
            return table
        down, across = (jnp.asarray(bicubic_matrix(side, size, self.antialias)) for size in (rows, columns))
        grid = table[1:].reshape(side, side, self.width)
        grid = jnp.einsum("ri,cj,ijd->rcd", down, across, grid, precision="highest")
        return jnp.concatenate([table[:1], grid.reshape(rows * columns, self.width)])


CLIP_VISION = {
    "vit_l": {},
    "vit_h": {
        "width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120, "activation": "gelu", "projection": 1024,
    },
    "big_g": {
        "width": 1664, "depth": 48, "heads": 16, "mlp_width": 8192, "activation": "gelu", "projection": 1280,
    },
    "small": {"image_size": 32, "patch": 8, "width": 64, "depth": 2, "heads": 2, "mlp_width": 256},
}  # fmt: skip
"""Fields of `VisionTransformer`: OpenAI's ViT-L/14, and the two of OpenCLIP that image prompts are encoded with."""

_DINOV2 = {
    "image_size": 518,
    "activation": "gelu",
    "eps": 1e-6,
    "layer_scale": True,
    "patch_bias": True,
    "pre_norm": False,
    "norm_tokens": True,
    "mask_token": True,
}
DINOV2 = {
    "small": {**_DINOV2, "width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "base": {**_DINOV2, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "large": {**_DINOV2},
    "giant": {
        **_DINOV2, "width": 1536, "depth": 40, "heads": 24, "mlp_width": 4096, "activation": "silu", "gated": True,
    },
}  # fmt: skip
"""Fields of `VisionTransformer` in the published sizes; with `registers=4, antialias=True` those with registers."""


def clip_vision(preset: str = "vit_l", **fields: Any) -> Encoder:
    """The image half of CLIP: a preset of `CLIP_VISION`, and any fields of `VisionTransformer` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    return _checked(make_encoder(VisionTransformer, CLIP_VISION, preset, fields, "clip_vision"))


def dinov2(preset: str = "base", **fields: Any) -> Encoder:
    """DINOv2 (Oquab et al. 2024): a preset of `DINOV2`, and any fields of `VisionTransformer` that differ from it.

    Raises InvalidInput for a preset, field or value that does not exist.
    """
    return _checked(make_encoder(VisionTransformer, DINOV2, preset, fields, "dinov2"))


def _checked(made: Encoder) -> Encoder:
    if made.module.patch > made.module.image_size:
        raise invalid("patch", made.module.patch, f"an image of {made.module.image_size} pixels must hold one")
    return made
