"""A ring of Gaussians, the case in which everything is known about stitching trajectories.

The large model is the exact denoiser of eight Gaussians on a circle. The small one is that of a single Gaussian with
the same mean and covariance, and one between them that of four, each for two neighbours: they agree with the large
model at high noise, where nothing else of the data is left, and err at low noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, processes, solvers, timesteps
from diffusion_jax.recipes.parts.stitching import (
    INDICES,
    Model,
    backwards,
    gap,
    relative_cost,
    stitch_table,
    stitched,
)
from diffusion_jax.recipes.report import Claim, claim
from diffusion_jax.typing import Process

RADIUS, STD, MODES = 1.5, 0.15, 8
TENTHS = [number / 10 for number in range(11)]


class Ring(NamedTuple):
    """Energy distances to the data, one a seed, by the share of steps of the small model.

    first, last: where those steps lie. gap: mean squared difference in epsilon at `gap_times()`.
    settings: shares of the small and of the middle model, with cost and distance on the seed of the choice.
    chosen: of two models and of three, the cheapest setting within the tolerance: its cost, its distances by seed.
    """

    first: dict[float, list[float]]
    last: dict[float, list[float]]
    gap: list[float]
    settings: list[tuple[tuple[float, float], float, float]]
    chosen: dict[int, tuple[float, list[float]]]


def ring_models(process: Process, costs: Sequence[float]) -> list[Model]:
    """Exact denoisers of the ring seen as 1, 4 and 8 Gaussians, at the given costs of an evaluation."""
    angles = 2 * np.pi * np.arange(MODES) / MODES
    ring = denoisers.gaussian_mixture(RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=-1), STD)
    mixtures = [denoisers.merged_components(ring, np.arange(MODES) * count // MODES) for count in (1, MODES // 2)]
    exact = denoisers.analytic(process)
    return [Model(exact, mixture, cost) for mixture, cost in zip((*mixtures, ring), costs, strict=True)]


def on_ring(config: ConfigDict, numbers: Sequence[int]) -> Ring:
    """Everything that is claimed about the ring: `config.size` points a run, on the seeds `numbers`.

    config: steps, size, costs; noise, the tolerance of the choice; choice_seed, which is none of `numbers`.
    """
    process, steps, size = processes.vp_linear(), config.steps, config.size
    models = ring_models(process, config.costs)
    sampler, grid = stitched(models, solvers.ddim(), (2,)), timesteps.linspace(steps)

    def distance(seed, which):
        data, _ = denoisers.sample_mixture(jax.random.key(1000 + seed), models[-1].params, size)
        return metrics.energy_distance(sampler(jax.random.key(seed), which, grid, size=size).x, np.asarray(data))

    def over_seeds(which):
        return [distance(seed, which) for seed in numbers]

    first = {share: over_seeds(stitch_table(steps, share, 0.0)) for share in TENTHS}
    last = {share: over_seeds(backwards(steps, share, large=2)) for share in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)}
    settings = []
    for shares in [(small, middle) for small in TENTHS for middle in TENTHS if small + middle < 1.01]:
        which = stitch_table(steps, *shares)
        settings.append((shares, relative_cost(which, models), distance(config.choice_seed, which)))
    chosen = {}
    for count, open_to in ((2, [one for one in settings if one[0][1] == 0]), (3, settings)):
        _, costs, distances = zip(*open_to, strict=True)
        shares, cost, _ = open_to[metrics.cheapest_within(costs, distances, config.noise)]
        chosen[count] = cost, over_seeds(stitch_table(steps, *shares))
    x0, _ = denoisers.sample_mixture(jax.random.key(0), models[-1].params, 4000)
    return Ring(first, last, gap(jax.random.key(1), models[0], models[-1], x0), settings, chosen)


def ring_claims(ring: Ring, noise: float) -> list[Claim]:
    tail = np.array([ring.first[share] for share in (0.7, 0.8, 0.9, 1.0)])
    late = [gap for index, gap in zip(INDICES, ring.gap, strict=True) if index >= 400]
    measured = "energy distance to the data, 1500 points"
    chosen = {
        f"Chosen on another seed, {count} models cost {cost:.2f}: within the tolerance": found
        for count, (cost, found) in ring.chosen.items()
    }
    return [
        claim(
            "Ring: the first 40 % by the small model change nothing",
            f"{measured}; the baseline is the large model",
            ring.first[0.0],
            ring.first[0.4],
            "equal",
            "0.0015 and 0.0015 (card); 40 % without loss (abstract)",
            margin=noise,
        ),
        claim(
            "Ring: the last 40 % by the small model are ten times worse",
            f"{measured}; the baseline has the first 40 % by it",
            ring.first[0.4],
            ring.last[0.4],
            "higher",
            "0.056 against 0.0015 (card)",
            factor=10.0,
        ),
        claim(
            "Ring: after r = 0.7 every further tenth is worse",
            "smallest rise of the energy distance from tenth to tenth",
            0.0,
            np.diff(tail, axis=0).min(axis=0).tolist(),
            "higher",
            "0.0016, 0.0022, 0.0085, 0.058 at 0.7 to 1 (card)",
        ),
        claim(
            "Ring: both models agree from t = 400 on",
            "largest mean squared difference in epsilon from index 400 to 999",
            1e-3,
            max(late),
            "lower",
            "below 1e-3 (card)",
        ),
        claim(
            "Ring: they disagree at t = 200",
            "mean squared difference in epsilon at index 200",
            0.12,
            ring.gap[INDICES.index(200)],
            "equal",
            "0.12 (card)",
            margin=0.01,
        ),
        claim(
            "Ring: a third model makes the same quality cheaper",
            "cost of the cheapest choice within the tolerance, in runs of the large model; the baseline has two models",
            ring.chosen[2][0],
            ring.chosen[3][0],
            "lower",
            "a Pareto front over (f_S, f_B)",
        ),
        *(
            claim(f"Ring: {name}", measured, ring.first[0.0], found, "lower", "the largest r within it", margin=noise)
            for name, found in chosen.items()
        ),
    ]
