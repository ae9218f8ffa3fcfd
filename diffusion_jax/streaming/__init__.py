"""Streams: runs without an end, made of the same steps as `sample`. Rolling buffers, long clips, causal blocks.

A rolling buffer (`rolling`) holds entries (actions, frames) along axis 1 at rising noise levels. Each call advances all
of them: the first chunk comes out clean, the others move up, and fresh noise enters at the end. Long clips are made by
a window that slides (`sample_windowed`), by chunks that begin with the last frames of the one before
(`sample_chained`), or block after block by a causal network (`sample_autoregressive`, and `block_stream` with few steps
and no end). All of them are pure functions with an explicit carry. At which times they run is a plan, which is an array
(`timesteps.plans`).
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
