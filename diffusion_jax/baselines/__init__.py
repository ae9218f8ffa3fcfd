"""Small base models that studies, benchmarks and notebooks share, as configs of experiments."""

from diffusion_jax.baselines.clips import clip_grid, clip_transformer, frame_times

__all__ = ["clip_grid", "clip_transformer", "frame_times"]
