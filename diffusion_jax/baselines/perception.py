"""Perception by diffusion: a transformer that paints answers about pictures, and a predictor of a smooth function.

Both predict the only right answer of a condition. Their processes are those of Stable Diffusion, from which published
models of this kind are fine-tuned.
"""

from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.config import call
from diffusion_jax.data.referring import WORDS
from diffusion_jax.experiment import defaults

SCHEDULE = "processes.vp_scaled_linear"


def answer_objective(prediction: str, share: float | None, degrade: ConfigDict | None) -> ConfigDict:
    """The loss. share: of uniform times beside contribution-aware ones, None for uniform times alone. degrade: what
    the answers are noised from, a call; low noise then counts less."""
    draw = call("timesteps.stratified")
    if share is not None:
        process, finest = call(SCHEDULE, prediction=prediction), call("timesteps.trailing", steps=1000)
        draw = call("timesteps.by_contribution", process=process, grid=finest, uniform_share=share)
    weight = None if degrade is None else call("timesteps.low_noise_weight", floor=0.05)
    return call("objectives.denoising", draw=draw, degrade=degrade, weight=weight)


def function_predictor(
    prediction: str, share: float | None, steps: int, degrade: ConfigDict | None = None, length: int = 50_000
) -> ConfigDict:
    """A network that predicts a smooth function of six numbers. length: examples that it is trained on."""
    config = defaults(steps=steps, batch_size=128)
    config.data = call("data.smooth_function", length=length)
    config.held_out = call("data.smooth_function", split="test", length=512)
    config.model = call("models.mlp", width=64, depth=2, conditions=(call("models.pooled"),))
    config.process = call(SCHEDULE, prediction=prediction)
    config.objective = answer_objective(prediction, share, degrade)
    rate = call("training.optimizers.cosine", peak=2e-3, total_steps=steps, warmup_steps=0)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate)
    return config


def painting_transformer(
    steps: int, share: float | None = None, degrade: ConfigDict | None = None, **fields: Any
) -> ConfigDict:
    """A transformer that paints what a request about a picture asks for: a mask, or a map of disparities.

    It is trained in about a minute of one core. fields: of `models.dit` that differ.
    """
    config = defaults(steps=steps, batch_size=32)
    config.data = call("data.referring_scenes", length=6000, real=0.3)
    config.held_out = None
    conditions = (call("models.text", vocab_size=len(WORDS) + 1, depth=1, heads=2), call("models.concat", channels=3))
    size = {"preset": "S/2", "patch": 4, "width": 64, "depth": 3, "heads": 2, "mlp_ratio": 2.0, "qk_norm": True}
    config.model = call("models.dit", **{**size, "conditions": conditions, **fields})
    config.process = call(SCHEDULE, prediction="v")
    config.objective = answer_objective("v", share, degrade)
    rate = call("training.optimizers.cosine", peak=2e-3, total_steps=steps, warmup_steps=min(100, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config
