"""Configs of the small base models that studies, benchmarks and notebooks share.

Each is a function that returns a config (`experiment.prepare`); whoever asks with the same fields shares one training.
"""

from diffusion_jax.baselines.try_on import try_on_transformer

__all__ = ["try_on_transformer"]
