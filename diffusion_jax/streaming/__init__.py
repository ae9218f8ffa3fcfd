"""Streams: runs without an end, on the same steps as `sample`. Rolling buffers, long clips, causal blocks.

A buffer holds entries (actions, frames) along axis 1 at rising levels: a call advances all of them, its first chunk
comes out clean, the others move up, fresh noise enters at the end (`rolling`). A window slides over a long clip, or
chunks begin with the last frames of the one before (`sample_windowed`, `sample_chained`), or a causal network finishes
block after block (`sample_autoregressive`; in a few steps and without an end, `block_stream`). All are pure functions
with an explicit carry; what runs when is a plan (`timesteps.plans`), which is data.
"""

from diffusion_jax.streaming.buffers import Rolling, Stream, rolling
from diffusion_jax.streaming.causal import (
    BlockStream,
    Flown,
    block_stream,
    in_flight,
    kv_cached,
    sample_stream,
    self_rollout,
)
from diffusion_jax.streaming.long_clips import sample_autoregressive, sample_chained, sample_windowed

__all__ = [
    "BlockStream",
    "Flown",
    "Rolling",
    "Stream",
    "block_stream",
    "in_flight",
    "kv_cached",
    "rolling",
    "sample_autoregressive",
    "sample_chained",
    "sample_stream",
    "sample_windowed",
    "self_rollout",
]
