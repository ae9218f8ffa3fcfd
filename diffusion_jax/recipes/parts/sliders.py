"""Sliders: low-rank factors that move one measurable attribute of samples, and move with it to other models.

The attribute is the area of a digit's strokes. No condition names it, so the direction of the slider is not the
difference of two conditions but what that stands for: the gradient of the attribute of the predicted x0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from diffusion_jax import adapters, denoisers, objectives
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.frame import trained
from diffusion_jax.recipes.report import Claim, claim
from diffusion_jax.typing import Condition, Params


def stroke_area(images: Array | np.ndarray) -> np.ndarray:
    """The share of pixels brighter than half, `[N]` of images `[N, H, W, C]` in [-1, 1]."""
    return (np.asarray(images) > 0).reshape(len(images), -1).mean(axis=1)


def ink(prediction: Any, t: Any, cond: Condition) -> Any:
    """Minus the mean brightness of what is predicted: an energy whose descent adds ink."""
    return -jnp.mean((prediction.x0 + 1) / 2, axis=(1, 2, 3))


def trained_slider(config: ConfigDict, experiment: Experiment, params: Params, name: str, given: Any) -> Any:
    """The factors of a slider of the network of `experiment` at `params`, scaled so that 1 is the trained strength.

    config: an experiment of its own with `lora`, `strength` (of the ink's gradient) and `draw` besides. given: what the
    parameters were trained with, for the cache (`frame.trained`).
    """
    own = prepare(config)
    steered = denoisers.energy_guided(denoisers.denoiser(experiment.network, experiment.process), ink, config.strength)
    adapted = build(config.lora, network=experiment.network)
    objective = objectives.slider(adapted.network, experiment.process, steered, params, build(config.draw))
    batch = own.example(2)

    def init(key):
        return adapted.init(key, params, batch["x0"], jnp.zeros(2), batch["cond"])

    factors = trained(own._replace(objective=objective), name, init_params=init, given=given)
    return adapters.transplanted(factors, params, config.lora.alpha / config.lora.rank)


def beside(params: Params, factors: Any, strength: float) -> Any:
    """The parameters with a slider at `strength`, whoever it was trained on; 0 is `params`, below 0 the other way."""
    return adapters.merged(params, adapters.transplanted(factors, params, strength))


def areas(
    sliders: Mapping[str, Any],
    models: Mapping[str, tuple[Any, Callable[..., Any]]],
    strengths: Sequence[float],
    numbers: Sequence[int],
) -> dict[tuple[str, str], np.ndarray]:
    """The mean stroke area `[seed, strength]` of each slider on each model, by `(trained on, used on)`.

    models: parameters and how samples are drawn from them, `(key, params) -> images`.
    """

    def area(run, params, seed):
        return float(stroke_area(run(jax.random.key(seed), params)).mean())

    return {
        (own, used): np.array([[area(run, beside(params, factors, s), seed) for s in strengths] for seed in numbers])
        for own, factors in sliders.items()
        for used, (params, run) in models.items()
    }


def of_sliders(areas: dict[tuple, np.ndarray], strengths: Sequence[float]) -> list[Claim]:
    """Control distillation: what a slider does where it was not trained, against what it does at home."""
    slope = {pair: np.polyfit(strengths, area.T, 1)[0].tolist() for pair, area in areas.items()}
    claims = []
    for own, other in (("base", "student"), ("student", "base")):
        steps = np.diff(areas[own, other], axis=1).min(axis=1).tolist()
        claims += [
            claim(f"A slider of the {own} moves the {other} monotonically", "smallest rise of the stroke area from "
                  "strength to strength", 0.0, steps, "higher", "sliders work unchanged, shown in pictures",
                  reason="strengths beyond what was trained saturate"),
            claim(f"A slider of the {own} moves the {other} at least half as much", "rise of the stroke area per unit "
                  f"of strength; baseline: on the {own}", slope[own, own], slope[own, other], "higher",
                  "sliders work unchanged, shown in pictures", factor=0.5,
                  reason="the factors meet weights that the distillation has moved"),
        ]  # fmt: skip
    return claims
