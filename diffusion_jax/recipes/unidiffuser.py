"""UniDiffuser (Bao et al. 2023): one network trained with a time for each modality samples five distributions.

Images of digits and their spelled-out names are noised at times of their own. Its networks are compared with the same
one trained at one time for both, asked at (r, 0) or conditioned by replacement, and with one for each task. The same
once more in latents: an autoencoder's and a matched vector of the image, a caption decoder's of the text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, solvers, timesteps
from diffusion_jax.config import build
from diffusion_jax.data import captioned_digits
from diffusion_jax.experiment import Experiment
from diffusion_jax.recipes.parts.paired_latents import latent_rows
from diffusion_jax.recipes.parts.paired_tasks import (
    CONDITIONALS,
    TASKS,
    Asked,
    asker,
    pixels_and_names,
    save_pairs,
)
from diffusion_jax.recipes.study import Results, Study, by_seed
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Params


class Setup(NamedTuple):
    """params: of each network. ways: to draw a task of one. loss: (params, key, task) -> float. logits: of digits."""

    experiment: Experiment
    params: Mapping[str, Params]
    ways: Mapping[str, Asked]
    loss: Callable[..., float]
    logits: Callable[[Any], Any]


def study(s: Study) -> Results:
    config = s.config
    stages = {name: s.stage(name, entry) for name, entry in config.networks.items()}
    experiment, params = stages["unidiffuser"].trained, {name: stage.value for name, stage in stages.items()}
    plain = denoisers.denoiser(experiment.network, experiment.process)
    ask = asker(plain, experiment, config.steps)
    ways = {"plain": ask}
    if config.compared:
        ways["guided"] = asker(denoisers.jointly_guided(plain, config.scale), experiment, config.steps)
        ways["replaced"] = replacing(plain, config.steps)
    setup = Setup(experiment, params, ways, conditional_loss(experiment), build(config.judge).logits)
    found = by_seed(s.seeds, partial(measured, setup, config))
    drawn = {s.picture("tasks"): "Each task of one network, and an image drawn from the text of an image."}
    known, _ = questions(experiment.held_out, config.count)
    save_pairs(s.picture("tasks"), partial(ask, params["unidiffuser"]), known, pixels_and_names)
    rows = rows_of(found)
    if config.latent:
        rows += latent_rows(s, found, setup.logits)
        drawn[s.picture("latents")] = "The same in latents: the network sees no pixel and no character."
    return Results(rows, drawn, "what is asked and the noise of sampling; networks are trained once")


def replacing(denoiser: Denoiser, steps: int) -> Asked:
    """Conditionals by replacement: all is generated, but what is given is put back, noised, at each step."""

    @jax.jit
    def inpainted(params, key, known, mask):
        solver = solvers.inpainted(solvers.dpm_solver_pp(order=2), known, mask)
        plan = timesteps.roles(timesteps.linspace(steps), TASKS["image, text"])
        return sample(key, denoiser, params, solver, plan, shape={n: x.shape for n, x in known.items()}).x

    def ask(params, key, task, known):
        mask = {name: np.full(len(value), name == CONDITIONALS[task][1]) for name, value in known.items()}
        return jax.device_get(inpainted(params, key, known, mask))

    return ask


def questions(source: Any, count: int) -> tuple[dict, dict]:
    """What is given to networks: `count` images of `source`, and names in turn; and the digit that each of them is."""
    pairs, number = source.take(np.arange(count) % len(source))["x0"], np.arange(count) % 10
    texts = [captioned_digits.encode(captioned_digits.NAMES[i], pairs["text"].shape[1]) for i in number]
    known = {"image": pairs["image"], "text": captioned_digits.embed(texts, pairs["text"].shape[2])}
    return known, {"image": captioned_digits.values(captioned_digits.decode(pairs["text"])), "text": number}


def diversity(images: Any, label: Any, logits: Callable[[Any], Any]) -> float:
    """The variance of images of the same digit, summed over pixels; those that show another one are left out."""
    right = np.asarray(logits(images)).argmax(axis=1) == label
    groups = [images[right & (label == number)] for number in range(10)]
    return float(np.mean([group.var(axis=0).sum() for group in groups if len(group) > 1] or [0.0]))


def conditional_loss(experiment: Experiment) -> Callable[..., float]:
    """The loss of what a conditional generates, on the training pairs at uniform times."""
    x0, objective = experiment.source.x0, experiment.validation

    @jax.jit
    def loss(params, key, t, weight):
        batch = {"x0": x0, "t": t, "t_weight": weight}
        return objective.loss(params, objective.init(key, params, batch), batch, key)[0].mean()

    def at(params, key, task):
        times = jax.random.uniform(key, (len(x0["text"]),))
        moves = {name: np.float32(name == CONDITIONALS[task][0]) for name in x0}
        weight = {name: np.full(len(times), on) for name, on in moves.items()}
        return float(loss(params, key, {name: on * times for name, on in moves.items()}, weight))

    return at


def measured(setup: Setup, config: ConfigDict, seed: int) -> dict[str, float]:
    """Everything that is measured with one sampling seed."""
    params, ways, logits = setup.params, setup.ways, setup.logits
    ours, key, found = params["unidiffuser"], jax.random.key(seed), {}
    known, label = questions(setup.experiment.held_out, config.count)
    for task, (wanted, given) in CONDITIONALS.items():
        own = params[f"{wanted}_given_{given}"]
        arms = {"ours": ("plain", ours), "own": ("plain", own), "(r, 0)": ("plain", params["together"])}
        arms |= {"replaced": ("replaced", params["together"]), "guided": ("guided", ours)}
        for arm, (way, network) in arms.items():
            if way in ways:
                pairs = ways[way](network, key, task, known)
                verified = captioned_digits.verify(pairs["image"], pairs["text"], logits, label[given])
                found |= {f"{task}: {arm}": verified[wanted]}
                found |= {f"diversity, {task}: {arm}": diversity(pairs["image"], label[given], logits)}
        if config.compared:
            found |= {
                f"loss, {task}: {name}": setup.loss(network, key, task)
                for name, network in (("ours", ours), ("own", own))
            }
    alone = {task: ways["plain"](ours, key, task, known) for task in ("image, text", "image", "text")}
    for name, (image, text) in {"together": ("image, text",) * 2, "apart": ("image", "text")}.items():
        pairs = alone[image]["image"], alone[text]["text"]
        found[f"agreement: {name}"] = captioned_digits.verify(*pairs, logits)["agreement"]
    if config.compared:
        denoiser = denoisers.denoiser(setup.experiment.network, setup.experiment.process)
        times = np.linspace(0.0, 1.0, config.count, dtype=np.float32)
        found["leak"] = metrics.leakage(key, denoiser, ours, known, times, ["text"])["image"]
    return found


def rows_of(found: Mapping[str, list[float]]) -> list[Row]:
    """The claims of which both sides were measured."""
    rows, one = [], {name: f"{name}s that show what was given" for name in ("image", "text")}
    for task, (wanted, _) in CONDITIONALS.items():
        for told, arm, margin, published in (
            ("within 3 points of its own network", "own", -0.03, "COCO FID 9.71 against 8.59"),
            ("10 points above s = t at (r, 0)", "(r, 0)", 0.1, "expected"),
            ("above s = t by replacement", "replaced", 0.0, "clearly above, expected"),
        ):
            if f"{task}: {arm}" in found:
                sides = found[f"{task}: ours"], found[f"{task}: {arm}"]
                rows.append(Row(f"p({task}): {told}", one[wanted], *sides, "higher", published, margin=margin))
    told, sides = "agreement of pairs; against: drawn apart", (found["agreement: together"], found["agreement: apart"])
    rows.append(Row("p(image, text): pairs belong together", told, *sides, "higher", "chance is 0.1", margin=0.3))
    if "leak" in found:
        plain, pushed = (f"image | text: {arm}" for arm in ("ours", "guided"))
        loss = {
            name: np.sum([found[f"loss, {task}: {name}"] for task in CONDITIONALS], axis=0).tolist()
            for name in ("ours", "own")
        }
        rows += [
            Row("Guidance by t = 1: agreement rises", one["image"], found[pushed], found[plain], "higher", "expected"),
            Row(
                "Guidance by t = 1: diversity falls",
                "variance of images of a digit",
                found[f"diversity, {pushed}"],
                found[f"diversity, {plain}"],
                "lower",
                "expected",
            ),
            Row(
                "Both conditionals in as many updates",
                "sum of their losses",
                loss["ours"],
                loss["own"],
                "lower",
                "at most 20 % slower",
                factor=1.2,
            ),
            Row(
                "An ignored text does not leak",
                "variance over redraws, share",
                found["leak"],
                0.02,
                "lower",
                "below 2 %",
            ),
        ]
    return rows
