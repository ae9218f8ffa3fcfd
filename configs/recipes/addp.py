"""ADDP: times drawn by what they contribute, and answers degraded as late steps meet them; a curve fit, and perception.

The predictor is small enough that all its seeds are trained in one program; the generalist segments what an expression
refers to and paints depth, on generated scenes and on patches of a real stereo pair.
"""

from typing import Any

from diffusion_jax.config import ConfigDict, call
from diffusion_jax.data.referring import WORDS
from diffusion_jax.experiment import defaults

SCHEDULE = "processes.vp_scaled_linear"
FINEST = call("timesteps.trailing", steps=1000)


def trained_on(prediction: str, share: float | None, degrade: ConfigDict | None) -> ConfigDict:
    """The loss of an arm. share: of uniform times beside contribution-aware ones; None for uniform times alone."""
    draw = call("timesteps.stratified")
    if share is not None:
        process = call(SCHEDULE, prediction=prediction)
        draw = call("timesteps.by_contribution", process=process, grid=FINEST, uniform_share=share)
    weight = None if degrade is None else call("timesteps.low_noise_weight", floor=0.05)
    return call("objectives.denoising", draw=draw, degrade=degrade, weight=weight)


def predictor(
    prediction: str, share: float | None, steps: int, jitter: float = 0.0, length: int = 50_000
) -> ConfigDict:
    """A network that predicts a smooth function of six numbers, by diffusion."""
    config = ConfigDict({"steps": steps, "batch_size": 128})
    config.data = call("data.smooth_function", length=length)
    config.held_out = call("data.smooth_function", split="test", length=512)
    config.model = call("models.mlp", width=64, depth=2, conditions=(call("models.pooled"),))
    config.process = call(SCHEDULE, prediction=prediction)
    config.objective = trained_on(prediction, share, call("objectives.jittered", amount=jitter) if jitter else None)
    rate = call("training.optimizers.cosine", peak=2e-3, total_steps=steps, warmup_steps=0)
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate)
    return config


def generalist(steps: int, share: float | None, degrade: ConfigDict | None, **network: Any) -> ConfigDict:
    """A transformer that paints the answer to a request about a picture."""
    config = defaults(steps=steps, batch_size=32)
    config.data = call("data.referring_scenes", length=6000, real=0.3)
    config.held_out = None
    conditions = (call("models.text", vocab_size=len(WORDS) + 1, depth=1, heads=2), call("models.concat", channels=3))
    size = {"preset": "S/2", "patch": 4, "width": 64, "depth": 3, "heads": 2, "mlp_ratio": 2.0, "qk_norm": True}
    config.model = call("models.dit", **{**size, "conditions": conditions, **network})
    config.process = call(SCHEDULE, prediction="v")
    config.objective = trained_on("v", share, degrade)
    rate = call("training.optimizers.cosine", peak=2e-3, total_steps=steps, warmup_steps=min(100, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=rate, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


def masks_and_depths(amount: float = 1.0) -> ConfigDict:
    """Shapes, places, shades and sharpness of an answer that drifts: a pixel or a fifth of the range, at t = 0."""
    parts = (
        call("objectives.warped", pixels=amount, cells=3),
        call("objectives.thickened", amount=0.5 * amount),
        call("objectives.shaded", amount=0.2 * amount, cells=3),
        call("objectives.blurred", pixels=0.5 * amount),
    )
    return call("objectives.one_after_another", parts=parts)


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102), "steps": 10, "few": (1, 2, 5)})
    eps, v = 1000, 500
    config.predictors = {
        "noise, uniform": predictor("epsilon", None, eps),
        "noise, contributions": predictor("epsilon", 0.0, eps),
        "noise, half": predictor("epsilon", 0.5, eps),
        "noise, both": predictor("epsilon", 0.5, eps, jitter=0.3),
        "v, uniform": predictor("v", None, v),
        "v, contributions": predictor("v", 0.0, v),
        "v, both": predictor("v", 0.5, v, jitter=0.3),
        "v, uniform, few data": predictor("v", None, v, length=256),
        "v, contributions, few data": predictor("v", 0.0, v, length=256),
    }
    config.generalists = {
        "uniform": generalist(2000, None, None),
        "addp": generalist(2000, 0.5, masks_and_depths()),
    }
    # Steps of an answer, examples of each set, and how strongly a correction counts.
    config.perception = {"steps": 5, "count": 128, "correction": 2.0}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Narrow networks after a step or none, few examples."""
    config.update({"seed_numbers": (0,), "steps": 4, "few": (1, 2)})
    kept = {name: one for name, one in config.predictors.items() if name in ("v, uniform", "v, both")}
    config.predictors = {}
    for name, one in kept.items():
        one.update({"steps": 1, "batch_size": 4})
        one.model.update({"width": 8, "depth": 1})
        one.data.length = one.held_out.length = 16
        config.predictors[name] = one
    tiny = {"width": 12, "depth": 1, "patch": 8}
    config.generalists = {name: generalist(2, None, None, **tiny) for name in config.generalists}
    for one in config.generalists.values():
        one.train.steps = 0
        one.update({"ema": {}, "mesh": call("distributed.make_mesh", devices=1)})
        one.data.update({"length": 8, "real": 0.0})
    config.perception = {"steps": 2, "count": 4, "correction": 2.0}
    return config


def paper() -> ConfigDict:
    """Marigold's network: Stable Diffusion 2 with the latent of the picture beside x, v on scaled-linear betas."""
    config = ConfigDict({"inputs": {"x0": (64, 64, 4), "cond": {"concat": (64, 64, 4), "context": (77, 1024)}}})
    conditions = (call("models.context", projection="none"), call("models.concat", channels=4))
    config.model = call("models.unet", preset="sd21", conditions=conditions)
    config.process = call(SCHEDULE, prediction="v")
    config.objective = trained_on("v", 0.5, masks_and_depths())
    return config
