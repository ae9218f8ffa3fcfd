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
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, models, sampling
from diffusion_jax.config import build, call
from diffusion_jax.data import wardrobe
from diffusion_jax.errors import unknown
from diffusion_jax.experiment import Experiment, defaults, prepare
from diffusion_jax.typing import Network

WAYS = ("cached", "encoding", "coupled", "coupled_cached")
"""References encoded once, in every step, along with the picture in every step, and so but in the first step only."""


def try_on_experiment(form: str, steps: int, *, batch_size: int = 16, rate: float = 3e-3, **model: Any) -> ConfigDict:
    """The config of a try-on network. form: of `models.referenced`, the one that is trained; model: fields of `dit`."""
    config = defaults(steps=steps, batch_size=batch_size)
    config.form = form
    config.data = call("data.try_on")
    config.held_out = call("data.try_on", split="test", length=5000)
    fields = {"patch": 4, "width": 96, "depth": 3, "heads": 2, "mlp_ratio": 2.0, "qk_norm": True}
    config.model = call("models.dit", **{**fields, "remat": "dots_no_batch", **model})
    config.process = call("processes.rectified_flow", prediction="x0")
    config.objective = call(
        "objectives.denoising",
        draw=call("timesteps.logit_normal", mean=0.8, std=1.2),
        cond_dropout=0.1,
        null={"references": 0.0},
    )
    schedule = call("training.optimizers.cosine", peak=rate, total_steps=steps, warmup_steps=min(50, steps // 2))
    config.optimizer = call("training.optimizers.adamw", learning_rate=schedule, weight_decay=0.01)
    config.ema = {"average": call("training.ema.power", sigma_rel=0.1)}
    return config


class Editor(NamedTuple):
    """experiment: what is trained. forms: `models.Referenced` behind the channels of mask and masked person."""

    experiment: Experiment
    forms: models.Referenced


def editor(config: ConfigDict) -> Editor:
    """The experiment of `config` whose network has references, in the form `config.form`."""
    made = prepare(config)
    forms = models.referenced(made.network, len(wardrobe.CATEGORIES))
    networks = {name: models.concatenating(getattr(forms, name)) for name in forms._fields if name != "encode"}
    forms = forms._replace(**networks)
    network = networks[config.form]
    objective = build(config.objective, network=network, process=made.process)
    return Editor(made._replace(network=network, objective=objective), forms)


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
        if way == "cached":
            return forms.encode(params, cond["references"], cond["items"], cond["present"])
        t = jnp.full((len(noise),), grid[0])
        x, time = process.network_input(noise, t), process.network_time(t)
        return forms.coupled.apply(params, x, time, cond)[1]["cache"]

    @jax.jit
    def paint(params, noise, cond):
        told = cond
        if cached:
            told = {"concat": cond["concat"], "cache": kept(params, noise, cond)}
            if config.guidance != 1:
                empty = {**cond, "references": jnp.zeros_like(cond["references"])}
                told["null_cache"] = kept(params, noise, empty)
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
    others = wardrobe.Outfits(*(np.roll(field, 1, axis=0) for field in outfits))

    def task(outfits):
        return TryOnTask(
            persons, outfits, wardrobe.dressed_example(persons, outfits), wardrobe.render(persons, outfits)[1], before
        )

    return {"paired": task(outfits), "unpaired": task(others)}


def without(cond: Mapping[str, Any]) -> dict[str, Any]:
    """The condition with all references zeroed."""
    return {**cond, "references": np.zeros_like(cond["references"])}


def try_on_measures(images: Any, task: TryOnTask) -> dict[str, Any]:
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


def with_references(cond: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The condition with `count` present references a person: the given ones again and again, and kinds in turn."""
    images = np.asarray(cond["references"])
    place = np.arange(count)
    return {
        **cond,
        "references": images[:, place % images.shape[1]],
        "items": np.broadcast_to(place % len(wardrobe.CATEGORIES), (len(images), count)).astype(np.int32),
        "present": np.ones((len(images), count), bool),
    }
