"""Virtual try-on with a network that attends to references: its forms, how they paint, and what the pictures are worth.

The network is a transformer on patches of 4 x 4 pixels, which predicts the clean picture on a straight flow, so that
cloth can be copied patch by patch. A picture has 64 tokens, and so has each reference.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, models, sampling
from diffusion_jax.clock import network_inputs
from diffusion_jax.config import build
from diffusion_jax.data import wardrobe
from diffusion_jax.errors import unknown
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.typing import Network

WAYS = ("cached", "encoding", "coupled", "coupled_cached")
"""References encoded once, in every step, along with the picture in every step, and so but in the first step only."""


class Editor(NamedTuple):
    """experiment: what is trained. forms: `models.Referenced` of its network."""

    experiment: Experiment
    forms: models.Referenced


def editor(config: ConfigDict) -> Editor:
    """The experiment of `config`, and all forms of its network."""
    network = build(config.model.network)
    return Editor(prepare(config), models.referenced(network, config.model["items"], config.model.concat))


def painter(editor: Editor, way: str, config: ConfigDict) -> Callable[[Any, Any, Any], Any]:
    """`(params, noise, cond) -> images`, compiled: what is outside the mask is put back at the end.

    way: one of `WAYS`. config: solver, grid and guidance (1 asks the network once a step).
    """
    if way not in WAYS:
        raise unknown("way", way, WAYS)
    forms, process = editor.forms, editor.experiment.process
    cached = way in ("cached", "coupled_cached")
    network = forms.cached if cached else _in_every_step(getattr(forms, way))
    null = models.null_cache if cached else {"references": 0.0}
    denoiser = denoisers.guided(denoisers.denoiser(network, process), config.guidance, null=null)
    solver, grid = build(config.solver), jnp.asarray(build(config.grid))

    def kept(params, noise, cond):
        t = jnp.full((len(noise),), grid[0])
        return {**cond, "cache": forms.coupled.apply(params, *network_inputs(process, noise, t), cond)[1]["cache"]}

    @jax.jit
    def paint(params, noise, cond):
        told = cond
        if way == "cached":
            told = models.cache_references(forms, params, cond, null=config.guidance != 1)
        if way == "coupled_cached":
            told = kept(params, noise, cond)
            if config.guidance != 1:
                told["null_cache"] = kept(params, noise, without(cond))["cache"]
        x = sampling.sample(jax.random.key(0), denoiser, params, solver, grid, x_init=noise, cond=told).x
        return jnp.where(cond["concat"][..., :1] > 0.5, x, cond["concat"][..., 1:])

    return paint


def _in_every_step(network: Network) -> Network:
    """The network whose references are bound to x.

    What does not depend on the step XLA takes out of the loop, so that references encoded in every step are encoded
    once after all: measured, 0.26 s instead of 0.24 s with an explicit cache.
    """

    def apply(params, x, t, cond, train=False, key=None):
        x, references = jax.lax.optimization_barrier((x, cond["references"]))
        return network.apply(params, x, t, {**cond, "references": references}, train=train, key=key)

    return network._replace(apply=apply)


class TryOnTask(NamedTuple):
    """Persons, the outfits to put on them, and the pictures that this should give, with their parsing.

    example: `{"x0", "cond"}`, as `wardrobe.example` makes it. before: the persons in their own clothes.
    """

    persons: wardrobe.Persons
    outfits: wardrobe.Outfits
    example: dict
    parsing: np.ndarray
    before: np.ndarray


def try_on_tasks(source: wardrobe.TryOn, seed: int, count: int) -> dict[str, TryOnTask]:
    """`count` held-out persons, "paired" with what they wear and "unpaired" with what the next person wears."""
    persons, outfits = source.draw(range(seed * count, (seed + 1) * count))
    before, _ = wardrobe.render(persons, outfits)

    def task(outfits):
        return TryOnTask(
            persons, outfits, wardrobe.dressed_example(persons, outfits), wardrobe.render(persons, outfits)[1], before
        )

    return {"paired": task(outfits), "unpaired": task(wardrobe.exchanged(outfits))}


def without(cond: Mapping[str, Any]) -> dict[str, Any]:
    """The condition with all references zeroed."""
    return denoisers.null_condition(cond, {"references": 0.0})


def try_on_measures(images: Array | np.ndarray, task: TryOnTask) -> dict[str, Any]:
    """What pictures of a task show.

    item: share of worn items whose colour and texture are read right, by category and of "all". psnr: in dB, over the
    mask alone. ssim: of whole pictures.
    """
    truth = task.example["x0"]
    right = wardrobe.correct(wardrobe.read(images, task.parsing), task.outfits)["item"]
    share = dict(zip(wardrobe.CATEGORIES, np.nanmean(right, axis=0).tolist(), strict=True))
    hidden = task.example["cond"]["concat"][..., :1]
    error = (np.square(np.asarray(images) - truth) * hidden).sum((1, 2, 3)) / (3 * hidden.sum((1, 2, 3)))
    return {
        "item": {**share, "all": float(np.nanmean(right))},
        "psnr": float(np.mean(10 * np.log10(4 / error))),
        "ssim": float(jnp.mean(metrics.ssim(jnp.asarray(images), jnp.asarray(truth)))),
    }


def interleaved(runs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each of `runs` after a first call, taken in turns, so that all meet the same disturbances."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}
