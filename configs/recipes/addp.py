"""ADDP: times drawn by what they contribute, and answers degraded as late steps meet them; a curve fit, and perception.

The predictor is small enough that all its seeds are trained in one program; the generalist segments what an expression
refers to and paints depth, on generated scenes and on patches of a real stereo pair.
"""

from diffusion_jax.baselines import answer_objective, function_predictor, painting_transformer
from diffusion_jax.config import ConfigDict, call


def masks_and_depths() -> ConfigDict:
    """An answer that drifts at t = 0: a pixel in shape, half a pixel in sharpness, a tenth of the range in shade."""
    parts = (
        call("objectives.warped", pixels=1.0, cells=3),
        call("objectives.thickened", amount=0.5),
        call("objectives.tinted", amount=0.2, cells=3),
        call("objectives.blurred", pixels=0.5),
    )
    return call("objectives.one_after_another", parts=parts)


def get_config(variant: str = "") -> ConfigDict:
    if variant == "paper":
        return paper()
    config = ConfigDict({"seed_numbers": (10, 11, 12), "tuned_on": (100, 101, 102), "steps": 10, "few": (1, 2, 5)})
    jitter, noise, v = call("objectives.perturbed", amount=0.3), ("epsilon", 1000), ("v", 500)
    config.predictors = {
        f"{name}, {arm}": function_predictor(prediction, share, steps, degrade)
        for name, (prediction, steps) in {"noise": noise, "v": v}.items()
        for arm, share, degrade in (("uniform", None, None), ("contributions", 0.0, None), ("both", 0.5, jitter))
    }
    config.predictors["noise, half"] = function_predictor("epsilon", 0.5, noise[1])
    for arm, share in (("uniform", None), ("contributions", 0.0)):
        config.predictors[f"v, {arm}, few data"] = function_predictor("v", share, v[1], length=256)
    config.generalists = {"uniform": painting_transformer(2000)}
    config.generalists.addp = painting_transformer(2000, 0.5, masks_and_depths())
    # Steps of an answer, examples of each set, and how strongly a correction counts.
    config.perception = {"steps": 5, "count": 128, "correction": 2.0}
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Narrow networks after a step or none, few examples."""
    config.update({"seed_numbers": (0,), "steps": 4, "few": (1, 2)})
    config.predictors = {name: config.predictors[name] for name in ("v, uniform", "v, both")}
    for one in config.predictors.values():
        one.train.update({"steps": 1, "batch_size": 4})
        one.model.update({"width": 8, "depth": 1})
        one.data.length = one.held_out.length = 16
    for name in config.generalists:
        config.generalists[name] = one = painting_transformer(2, width=12, depth=1, patch=8)
        one.train.steps, one.ema, one.mesh = 0, {}, call("distributed.make_mesh", devices=1)
        one.data.update({"length": 8, "real": 0.0})
    config.perception.update({"steps": 2, "count": 4})
    return config


def paper() -> ConfigDict:
    """Marigold's network: Stable Diffusion 2 with the latent of the picture beside x, v on scaled-linear betas."""
    config = ConfigDict({"inputs": {"x0": (64, 64, 4), "cond": {"concat": (64, 64, 4), "context": (77, 1024)}}})
    conditions = (call("models.context", projection="none"), call("models.concat", channels=4))
    config.model = call("models.unet", preset="sd21", conditions=conditions)
    config.process = call("processes.vp_scaled_linear", prediction="v")
    config.objective = answer_objective("v", 0.5, masks_and_depths())
    return config
