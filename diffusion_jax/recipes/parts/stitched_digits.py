"""Digits by stitched transformers: their quality against that of fewer steps, their trajectories, and real time."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, solvers, timesteps
from diffusion_jax.baselines import CLASSES
from diffusion_jax.costs import evaluation_flops
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.frame import trained
from diffusion_jax.recipes.parts.digits import judged
from diffusion_jax.recipes.parts.stitching import (
    Model,
    backwards,
    gap,
    padded_run,
    relative_cost,
    stitch_table,
    stitched,
)


class Digits(NamedTuple):
    """Fréchet distances and accuracies, one a seed, by arm; costs of the arms; what the first seed's samples look like.

    An arm is ("stitched" or "fewer", share), ("few", share or "fewer"), "reversed" or "three".
    noise: standard deviation of the large model's distance over the seeds for it. similarity: cosine of the two models'
    own x by step, `[S + 1]` a seed. gap: mean squared difference in epsilon at `gap_times()`. seconds: of whole runs,
    medians by share.
    """

    distance: dict[Any, list[float]]
    accuracy: dict[Any, list[float]]
    noise: float
    cost: dict[Any, float]
    images: dict[Any, np.ndarray]
    similarity: list[np.ndarray]
    gap: list[float]
    seconds: dict[float, float]


def digit_models(configs: Any) -> list[Model]:
    """The smallest first, trained, with the FLOPs of an evaluation in units of the large one's."""
    models = []
    for name in [name for name in ("small", "middle", "large") if name in configs]:
        made = prepare(configs[name])
        # The large one is shared with other recipes.
        params = trained(made, "digits-transformer" if name == "large" else f"t_stitch-{name}")
        inputs = jnp.zeros((1, *made.shape)), {"label": jnp.zeros(1, jnp.int32)}
        flops = evaluation_flops(made.network, params, *inputs)
        models.append(Model(denoisers.denoiser(made.network, made.process), params, flops))
    return [model._replace(cost=model.cost / models[-1].cost) for model in models]


def stitch_digits(config: ConfigDict, numbers: Sequence[int]) -> Digits:
    models, steps, size = digit_models(config.models), config.steps, config.size
    sampler = stitched(models, solvers.ddim(), (8, 8, 1))
    label = np.arange(size) % CLASSES
    # Those between the small and the large model have no steps of their own.
    between = (0.0,) * (len(models) - 2)
    arms = {("stitched", share): stitch_table(steps, share, *between) for share in config.shares}
    arms |= {("fewer", share): equal_cost(arms["stitched", share], models) for share in config.fewer}
    arms |= {"reversed": backwards(steps, 0.4, large=len(models) - 1)}
    if config.three:
        arms["three"] = stitch_table(steps, *config.three)
    arms |= {("few", share): stitch_table(config.few_steps, share, *between) for share in (0.0, 0.4)}
    arms["few", "fewer"] = equal_cost(arms["few", 0.4], models)

    def made(seed, which):
        found = sampler(jax.random.key(seed), *padded_run(which, steps), {"label": label}, size=size)
        return found, judged(found.x, label)

    noise = np.std([made(seed, arms["stitched", 0.0])[1].distance for seed in config.noise_seeds], ddof=1)
    distance, accuracy, images, traces = ({arm: [] for arm in arms} for _ in range(4))
    for arm, which in arms.items():
        for seed in numbers:
            found, verdict = made(seed, which)
            distance[arm].append(verdict.distance)
            accuracy[arm].append(verdict.accuracy)
            images[arm].append(np.asarray(found.x[: 2 * CLASSES]))
            if arm in (("stitched", 0.0), ("stitched", 1.0)):
                traces[arm].append(np.concatenate([found.run.carry.values, found.x[None]]))
    alike = [metrics.trajectory_similarity(*pair) for pair in zip(traces["stitched", 0.0], traces["stitched", 1.0])]
    held_out = data.digits(split="test")
    gaps = gap(jax.random.key(0), models[0], models[-1], held_out.x0, dict(held_out.cond))
    cost = {arm: relative_cost(which, models) * len(which) / steps for arm, which in arms.items()}
    first = {arm: rows[0] for arm, rows in images.items()}
    return Digits(distance, accuracy, float(noise), cost, first, alike, gaps, median_seconds(sampler, config, between))


def equal_cost(which: np.ndarray, models: Sequence[Model]) -> np.ndarray:
    """Fewer steps of the large model alone, at the cost of `which`."""
    return np.full(max(round(relative_cost(which, models) * len(which)), 1), len(models) - 1)


def median_seconds(sampler: Callable, config: ConfigDict, between: Sequence[float]) -> dict[float, float]:
    """Medians of the seconds of a whole run by share of the small model, the shares measured in turns."""
    timing, found = config.timing, {share: [] for share in config.shares}
    cond, grid = {"label": np.arange(timing.size) % CLASSES}, timesteps.linspace(timing.steps)
    for turn in range(timing.repeats + 1):
        for share, taken in found.items():
            which, begun = stitch_table(timing.steps, share, *between), time.perf_counter()
            jax.block_until_ready(sampler(jax.random.key(turn), which, grid, cond, size=timing.size).x)
            # The first turn compiles.
            if turn:
                taken.append(time.perf_counter() - begun)
    return {share: statistics.median(taken) for share, taken in found.items()}
