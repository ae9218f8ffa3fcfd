"""Configs of the small base models that studies, benchmarks and notebooks share.

Each is a function that returns a config (`experiment.prepare`); whoever asks with the same fields shares one training.
"""

from diffusion_jax.baselines.digits import CLASSES, NULL, digit_transformer, tiny_digit_transformer

__all__ = ["CLASSES", "NULL", "digit_transformer", "tiny_digit_transformer"]
