"""Configs of the small base models that studies, benchmarks and notebooks share.

Each is a function that returns a config for `experiment.prepare`. Two users of the same config share one training.
"""

from diffusion_jax.baselines.actions import action_transformer
from diffusion_jax.baselines.clips import clip_grid, clip_transformer, frame_times
from diffusion_jax.baselines.digits import CLASSES, NULL, digit_transformer, on_garments, tiny_digit_transformer
from diffusion_jax.baselines.perception import answer_objective, function_predictor, painting_transformer
from diffusion_jax.baselines.scenes import scene_transformer, warmed_adam
from diffusion_jax.baselines.talking import TALKING_FRAMES, talking_transformer
from diffusion_jax.baselines.try_on import try_on_transformer
from diffusion_jax.baselines.world import often_at_the_ends, world_transformer

__all__ = [
    "CLASSES",
    "NULL",
    "TALKING_FRAMES",
    "action_transformer",
    "answer_objective",
    "clip_grid",
    "clip_transformer",
    "digit_transformer",
    "frame_times",
    "function_predictor",
    "often_at_the_ends",
    "on_garments",
    "painting_transformer",
    "scene_transformer",
    "talking_transformer",
    "tiny_digit_transformer",
    "try_on_transformer",
    "warmed_adam",
    "world_transformer",
]
