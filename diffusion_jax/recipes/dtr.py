"""DTR (Park et al. 2024): every timestep sees its own window of the channels of each block.

A small transformer on digits is trained with all channels, with sliding windows and with channels drawn at random, each
with the plain loss, and with windows under two weightings of the loss; all with equally many updates and parameters.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from diffusion_jax import data, denoisers, metrics, objectives, pictures
from diffusion_jax.baselines import CLASSES, NULL
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment
from diffusion_jax.recipes.study import Arm, Results, Study, Tabulated, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.solvers import ddim
from diffusion_jax.stages import Stage
from diffusion_jax.typing import Params

Trained = Mapping[str, Mapping[int, Stage]]
"""By arm and seed."""


def study(s: Study) -> Results:
    trained = {name: {seed: s.stage(name, one, seed=seed) for seed in s.seeds} for name, one in s.config.arms.items()}
    alike = first_of_each_network(s, trained)
    losses, found = held_out(s, trained, alike), quality(s, trained, alike)
    rows = [*loss_rows(losses), *quality_rows(found), *affinity_rows(affinities(s, trained, alike))]
    strips = {name: found.samples[name][:CLASSES] for name in ("all channels", "DTR", "random")}
    pictures.save_strips(s.picture("digits"), strips, title="From the same noise, by the channels that a time sees")
    return Results(rows, {s.picture("digits"): "Digits 0 to 9 of three networks."}, "training and noise")


def first_of_each_network(s: Study, trained: Trained) -> dict[str, str]:
    """For each arm the first one with the same network, whose compiled programs it shares."""
    models = {name: str(one.model) for name, one in s.config.arms.items()}
    return {name: next(other for other in models if models[other] == models[name]) for name in trained}


def held_out(s: Study, trained: Trained, alike: Mapping[str, str]) -> dict[str, list[float]]:
    """The loss on held-out digits at equidistant times, with the same noise for all."""
    measure = {name: held_out_loss(s, one) for name, one in experiments(s, trained, alike).items()}
    return by_seed(s.seeds, lambda seed: {name: measure[alike[name]](trained[name][seed].value) for name in trained})


def held_out_loss(s: Study, one: Experiment) -> Callable[[Params], float]:
    plain = objectives.denoising(one.network, one.process, train=False)
    examples = data.stacked_examples(one.held_out, range(len(one.held_out)))
    batch = jax.tree.map(lambda leaf: np.repeat(leaf, s.config.repeats, axis=0), examples)
    batch = {**batch, "index": np.arange(len(batch["x0"]))}
    measured = jax.jit(objectives.validation_loss(plain, s.config.bins))
    return lambda params: float(measured(params, (), batch, jax.random.key(0))["loss"])


def experiments(s: Study, trained: Trained, alike: Mapping[str, str]) -> dict[str, Experiment]:
    """One for each network."""
    return {name: trained[name][s.seeds[0]].trained for name in dict.fromkeys(alike.values())}


def quality(s: Study, trained: Trained, alike: Mapping[str, str]) -> Tabulated:
    """Digits of all classes, guided, and what a judge says of them."""
    config, judge, solver = s.config, metrics.feature_network("digits"), ddim()
    cond, grid = {"label": np.arange(config.count) % CLASSES}, build(config.grid)
    every = experiments(s, trained, alike)
    guided = {
        name: denoisers.guided(denoisers.denoiser(one.network, one.process), config.guidance, NULL)
        for name, one in every.items()
    }

    def arms(seed):
        return {name: Arm(guided[alike[name]], trained[name][seed].value, solver, grid, cond) for name in trained}

    def measures(drawn):
        return metrics.judged(judge, drawn.x, cond["label"])._asdict()

    return table(arms, s.seeds, measures, shape=next(iter(every.values())).shape, count=config.count)


def affinities(s: Study, trained: Trained, alike: Mapping[str, str]) -> dict[str, list[float]]:
    """The cosine of the gradients at the first and the last of some times of much noise."""
    asked, every = s.config.affinity, experiments(s, trained, alike)

    def measured(name: str) -> Callable[[Params], float]:
        one = every[name]
        loss = objectives.denoising(one.network, one.process)
        batch = data.stacked_examples(one.source, range(asked.examples))
        batch = {**batch, "index": np.arange(asked.examples)}

        @jax.jit
        def cosines(params, batch, key):
            return objectives.task_affinity(loss, params, batch, np.asarray(asked.times), key)

        return lambda params: float(cosines(params, batch, jax.random.key(0))[0, -1])

    found = {name: measured(alike[name]) for name in ("all channels", "DTR")}
    return by_seed(s.seeds, lambda seed: {name: run(trained[name][seed].value) for name, run in found.items()})


def loss_rows(losses: Mapping[str, list[float]]) -> list[Row]:
    figure = "held-out loss, mean over t"
    claims = (
        ("windows beat all channels", "DTR", "all channels", "expected, by a few %"),
        ("windows beat random channels", "DTR", "random", "expected, by several %"),
        ("alpha 4 is not worse than even windows", "DTR", "DTR, even", "alpha 4 is used"),
        ("beta 0.8 beats 0.4 in a narrow network", "DTR", "DTR, narrow", "beta 0.8 is used"),
    )
    return [Row(title, figure, losses[a], losses[b], "lower", published) for title, a, b, published in claims]


def quality_rows(found: Tabulated) -> list[Row]:
    claims = (
        ("samples of windows are nearer to data", "DTR", "all channels", "FID 8.90, 12.59"),
        ("nearer than of random channels", "DTR", "random", "less gain"),
        ("windows help under Min-SNR", "DTR, Min-SNR", "Min-SNR", "FID 8.24, 9.58"),
        ("Min-SNR helps windows", "DTR, Min-SNR", "DTR", "FID 8.24, 8.90"),
        ("windows help under UW", "DTR, UW", "UW", "FID 4.61, 5.85"),
        ("UW helps windows", "DTR, UW", "DTR", "FID 4.61, 8.90"),
    )
    rows = [
        found.row(title, "distance", a, b, "lower", published, figure="Fréchet distance")
        for title, a, b, published in claims
    ]
    title = "windows ask the network no more often"
    return [*rows, found.row(title, "evaluations", "DTR", "all channels", "equal", "by construction")]


def affinity_rows(cosines: Mapping[str, list[float]]) -> list[Row]:
    title, figure = "distant noisy tasks share less", "cosine of gradients at t = 0.55 and 1"
    return [Row(title, figure, cosines["DTR"], cosines["all channels"], "lower", "expected")]
