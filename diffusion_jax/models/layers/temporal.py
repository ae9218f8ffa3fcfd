"""Layers of clips `[B, F, N, C]`, F frames of N tokens: which frame sees which, and branches that attend over space,
over time, over both, and to each frame's own audio. Keys and values that outlive a call are in `models.incremental`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffusion_jax.errors import invalid
from diffusion_jax.models.layers.attention import Attention, key_mask
from diffusion_jax.models.layers.branches import Branch, modulated_input
from diffusion_jax.models.layers.embeddings import rotate


class Frames(NamedTuple):
    """What the frames of a clip are told, an entry of `Side`; unused entries are None.

    mask: `[F, F]`, True where a frame (row) sees another. rotary: `[F, D_head / 2]`, angles of temporal attention.
    audio: `[B, F, M, C]`, for cross-attention frame by frame. audio_mask: `[F, M]`, True where visible.
    """

    mask: Any = None
    rotary: Any = None
    audio: Any = None
    audio_mask: Any = None


def frame_mask(frames: int, block: int = 0, window: int = 0, references: int = 0) -> Bool[np.ndarray, "F F"] | None:
    """Which frame (row) sees which (column), or None where all see all.

        (i sees j)  =  0 <= floor(i / block) - floor(j / block) [<= window]

    block: frames that see each other, and the blocks before theirs; 1 is temporal-causal (Sun et al. 2025), several
        are block-causal, 0 lets all frames see each other. window: how many blocks before its own a frame sees; 0 for
        all of them.
    references: so many frames stand before the clip's F: all see them, they see only themselves.
    Raises InvalidInput for negative numbers, for a window without blocks, and if the blocks do not divide the frames.
    """
    for name, value in (("block", block), ("window", window), ("references", references)):
        if value < 0:
            raise invalid(name, value, "it must not be negative")
    if window and not block:
        raise invalid("window", window, "it counts blocks, so block must be positive")
    if block and frames % block:
        raise invalid("frames", frames, f"blocks of {block} frames must divide them")
    if (block in (0, frames)) and not references:
        return None
    index = np.arange(frames) // (block or frames)
    distance = index[:, None] - index
    seen = (distance >= 0) & (distance <= (window or frames))
    mask = np.ones((references + frames, references + frames), bool)
    mask[:references, references:] = False
    mask[references:, references:] = seen
    return mask


def temporal_angles(positions: Any, features: int, axes: int = 1, theta: float = 10000.0) -> Float[Array, "*N half"]:
    """Angles `[..., features / 2]` at temporal positions `[...]`: the first axis of `rotary_angles` with `axes` axes.

    Positions may be traced. Turning by a sum is turning twice, so keys that were turned to their place in a block are
    moved along with it by turning them on.
    """
    share = features // 2 // axes
    frequencies = theta ** (-np.arange(share) / max(share, 1))
    angles = jnp.asarray(positions, jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.pad(angles, [(0, 0)] * (angles.ndim - 1) + [(0, features // 2 - share)])


def moved(keys: Float[Array, "B N H D"], by: Any, axes: int = 1) -> Float[Array, "B N H D"]:
    """Rotary keys as they are `by` frames later: a number, or one for each key `[N]`."""
    angles = temporal_angles(by, keys.shape[-1], axes)
    return rotate(keys, jnp.broadcast_to(angles, (keys.shape[1], angles.shape[-1])))


class SpatialAttentionBranch(Branch):
    """`gate * attention(modulate(norm(h)))` within each frame; `side.rotary` has the angles of the N tokens."""

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = modulated_input(h, c, self.dtype)
        y = y.reshape(-1, *y.shape[2:])
        y = Attention(self.heads, self.qk_norm, self.dtype, name="attention")(y, y, None, side.rotary)
        return gate * y.reshape(h.shape)


class TemporalAttentionBranch(Branch):
    """`gate * attention(modulate(norm(h)))` over the frames at each place; masked and turned as `side.frames` says.

    Each frame keeps its own shift, scale and gate.
    """

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = modulated_input(h, c, self.dtype)
        batch, frames, tokens, width = h.shape
        y = y.swapaxes(1, 2).reshape(batch * tokens, frames, width)
        mask = None if side.frames.mask is None else jnp.asarray(side.frames.mask)[None, None]
        y = Attention(self.heads, self.qk_norm, self.dtype, name="attention")(y, y, mask, side.frames.rotary)
        return gate * y.reshape(batch, tokens, frames, width).swapaxes(1, 2)


class JointAttentionBranch(Branch):
    """`gate * attention(modulate(norm(h)))` over all F N tokens of the clip; `side.rotary` has the angles of each."""

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = modulated_input(h, c, self.dtype)
        batch, frames, tokens, width = h.shape
        y = y.reshape(batch, frames * tokens, width)
        mask = side.frames.mask
        if mask is not None:
            mask = jnp.asarray(np.repeat(np.repeat(mask, tokens, axis=0), tokens, axis=1))[None, None]
        y = Attention(self.heads, self.qk_norm, self.dtype, name="attention")(y, y, mask, side.rotary)
        return gate * y.reshape(h.shape)


class AudioAttentionBranch(Branch):
    """`gate * attention(modulate(norm(h)), audio)`: the tokens of each frame attend to that frame's audio."""

    heads: int
    qk_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, c, side):
        y, gate = modulated_input(h, c, self.dtype)
        audio = side.frames.audio.astype(y.dtype)
        batch, frames, features = audio.shape[:3]
        mask = side.frames.audio_mask
        if mask is not None:
            mask = key_mask(jnp.tile(jnp.asarray(mask), (batch, 1)))
        y = y.reshape(batch * frames, *y.shape[2:])
        audio = audio.reshape(batch * frames, features, audio.shape[3])
        y = Attention(self.heads, self.qk_norm, self.dtype, name="attention")(y, audio, mask, None)
        return gate * y.reshape(h.shape)
