"""FastFit: pictures of garments are encoded once, and a person is painted who wears them.

Try-on models encode their references anew in every denoising step, because what they make of them depends on the time
and on the noisy picture. Here references know an embedding of their category in the place of the time, and nobody but
themselves (semi-attention), so their keys and values are a cache without loss (Chong et al. 2025). Measured against a
twin of the same size and training whose references know the time and attend to everything, encoded in every step; and
against that twin with the references of its first step kept.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import metrics, pictures
from diffusion_jax.data import wardrobe
from diffusion_jax.data.sources import BatchSource
from diffusion_jax.recipes.frame import seeds, trained
from diffusion_jax.recipes.parts import trying_on
from diffusion_jax.recipes.parts.latents import principal_space
from diffusion_jax.recipes.report import Claim, Results, claim
from diffusion_jax.typing import Params

ARMS = {
    "cached": ("fastfit", "paired"),
    "unpaired": ("fastfit", "unpaired"),
    "nothing": ("fastfit", "paired"),
    "coupled": ("coupled", "paired"),
    "coupled_cached": ("coupled", "paired"),
}
"""Whose weights paint what: FastFit (also without references), the twin, and the twin with its first references."""

NOTES = (
    "one training of each network; seeds are of persons and noise. The input hides all clothes, so the paired task is "
    "as hard as the unpaired one. Cloth does not bend in this world, and no guidance is used. Encoding in every step "
    "is forced: left to itself, XLA takes out of the loop what does not depend on the step, which is the same cache."
)


def run(config: ConfigDict, workdir: Path) -> Results:
    editors = {name: trying_on.editor(config[name]) for name in ("fastfit", "coupled") if name in config}
    for one in editors.values():
        one.experiment.config.seed = config.seed
    params = {name: trained(one.experiment, f"fastfit-{name}") for name, one in editors.items()}
    source = editors["fastfit"].experiment.held_out
    paint = {}
    for way in trying_on.WAYS:
        name = "coupled" if "coupled" in way else "fastfit"
        if name in editors:
            paint[way] = trying_on.painter(editors[name], way, config)
    scenes = source.take(range(len(source) - max(64, config.people), len(source)))["x0"]
    space = principal_space(scenes[:, :: config.stride, :: config.stride], min(32, len(scenes) - 1))

    arms = {name: arm for name, arm in ARMS.items() if arm[0] in editors}
    found: dict[str, list[dict]] = {name: [] for name in arms}
    lossless, kept, shown = [], [], {}
    for seed in seeds(config):
        todo = trying_on.try_on_tasks(source, seed, config.people)
        noise = jax.random.normal(jax.random.key(seed), todo["paired"].before.shape)
        for name, (weights, task) in arms.items():
            cond = todo[task].example["cond"]
            cond = trying_on.without(cond) if name == "nothing" else cond
            images = np.asarray(paint[name if "coupled" in name else "cached"](params[weights], noise, cond))
            shown[name] = images
            values = trying_on.try_on_measures(images, todo[task])
            compared = (x[:, :: config.stride, :: config.stride] for x in (images, todo[task].example["x0"]))
            distance = metrics.frechet_distance(*(_features(space, x) for x in compared))
            found[name].append({**values, "distance": float(distance)})
        cond = todo["paired"].example["cond"]
        anew = np.asarray(paint["encoding"](params["fastfit"], noise, cond))
        lossless.append(float(np.abs(anew - shown["cached"]).max()))
        outside = cond["concat"][..., :1] < 0.5
        kept.append(float(np.abs((shown["unpaired"] - todo["paired"].before) * outside).max()))
    times = timed(config, params, paint, source)
    (workdir / "measured.json").write_text(json.dumps([found, lossless, kept, {str(k): v for k, v in times.items()}]))
    paths = save_pictures(config, workdir, todo, shown, times)
    return Results(claims(config, found, lossless, kept, times), paths, NOTES)


def _features(space: Any, images: Any) -> np.ndarray:
    return np.asarray(space.encode(images)).reshape(len(images), -1)


def timed(config: ConfigDict, params: Params, paint: Any, source: BatchSource) -> dict[tuple[str, int], float]:
    """Seconds of a whole run, encoding included, by way and number of references."""
    people = source.take(range(config.timing.people))
    noise = jax.random.normal(jax.random.key(config.seed), people["x0"].shape)
    runs = {}
    for way, weights in (("cached", "fastfit"), ("encoding", "fastfit"), ("coupled", "coupled")):
        if weights not in params:
            continue
        for count in config.timing.references:
            cond = wardrobe.repeated_references(people["cond"], count)
            runs[way, count] = lambda way=way, weights=weights, cond=cond: paint[way](params[weights], noise, cond)
    return trying_on.interleaved(runs, config.timing.repeats)


SHORT = "in so short a training the twin, whose references meet the picture early, learns to copy sooner"
SMALL = "so narrow a network spends much of a step on what does not grow with the number of tokens"
COMPARED = (
    ("References say what to paint", "psnr", "nothing", "cached", "higher", 0.0, "not reported", ""),
    ("References say what to paint", "ssim", "nothing", "cached", "higher", 0.0, "0.907 on DressCode", ""),
    ("References say what to paint", "distance", "nothing", "cached", "lower", 0.0, "FID 2.836 on DressCode", ""),
    ("As right as the twin, within 2 points", "item", "coupled", "cached", "higher", -0.02, "better metrics", SHORT),
    ("As exact as the twin, within 0.5 dB", "psnr", "coupled", "cached", "higher", -0.5, "better metrics", SHORT),
    (
        "The twin with the references of its first step: at least 10 points worse",
        "item",
        "coupled",
        "coupled_cached",
        "lower",
        -0.1,
        "features depend on the time and on the noisy picture",
        "what the twin's references say changes little from step to step: they are clean pictures at any time",
    ),
)
"""Title, figure, baseline, ours, direction, margin, published, why it may not hold."""
FIGURES = {
    "item": "share of items read with the right colour and texture",
    "psnr": "PSNR in dB inside the mask",
    "ssim": "SSIM of whole pictures",
    "distance": "Fréchet distance of principal components",
}


def claims(config: ConfigDict, found: dict, lossless: list[float], kept: list[float], times: dict) -> list[Claim]:
    """What the paper says, as measured here, with `config.seeds` seeds of persons and noise on one training."""

    def of(name, figure, part="all"):
        return [one[figure][part] if figure == "item" else one[figure] for one in found[name]]

    few, usual, many = config.timing.references
    steps, least = config.grid.steps, 0.85
    rounding = "rounding: two programs, in which sums are fused differently"
    exact = f"largest difference of a pixel from references encoded in each of {steps} steps"
    rows = [
        claim("No loss", exact, 0.0, lossless, "equal", "lossless", margin=1e-6, reason=rounding),
        claim("What is not hidden stays", "largest change outside the mask", 0.0, kept, "equal", "exact"),
    ]
    for part in ("all", *wardrobe.CATEGORIES, "unpaired"):
        arm, which = ("unpaired", "all") if part == "unpaired" else ("cached", part)
        title = {"all": "The right cloth in the right place", "unpaired": "Clothes of another person"}.get(part, part)
        metric = f"{FIGURES['item']}, above {least:.0%}; the baseline has its references zeroed"
        values = of("nothing", "item", which), of(arm, "item", which)
        reason = "items of few pixels take longest to learn, and training is a matter of minutes"
        rows.append(claim(title, metric, *values, "higher", "qualitative", factor=0.0, margin=least, reason=reason))
    for title, figure, baseline, ours, direction, margin, published, reason in COMPARED:
        if not {baseline, ours} <= found.keys():
            continue
        values = of(baseline, figure), of(ours, figure)
        metric = f"{FIGURES[figure]}, {baseline} against {ours}"
        given: dict[str, Any] = {"reason": reason} if reason else {}
        rows.append(claim(title, metric, *values, direction, published, margin=margin, **given))
    for title, way in (("the twin", "coupled"), ("the same network, encoding in every step", "encoding")):
        if (way, usual) not in times:
            continue
        metric = f"seconds of a run of {steps} steps with {usual} references, medians taken in turns"
        values = times[way, usual], times["cached", usual]
        named = f"At most half the time of {title}"
        rows.append(claim(named, metric, *values, "lower", "3.5 times as fast", factor=0.5, reason=SMALL))
    for title, way, bound, direction, reason in (
        ("More references do not slow it down", "cached", 1.5, "lower", "attention to keys is much of a small step"),
        ("They do slow down the twin", "coupled", 2.0, "higher", SMALL),
    ):
        if (way, usual) not in times:
            continue
        metric = f"seconds with {many} references over those with {few}; the baseline is the bound"
        rows.append(claim(title, metric, bound, times[way, many] / times[way, few], direction, "", reason=reason))
    return rows


def save_pictures(config: ConfigDict, workdir: Path, todo: dict, shown: dict, times: dict) -> list[Path]:
    """Persons, what they are given and what comes out, for both tasks of the last seed, and time against references."""
    paths = []
    results = {
        "paired": {"FastFit": "cached", "re-encoded twin": "coupled", "twin, cached": "coupled_cached"},
        "unpaired": {"FastFit": "unpaired"},
    }
    for name, arms in results.items():
        task, first = todo[name], slice(config.columns)
        cond = task.example["cond"]
        strips = {
            "person": task.before[first],
            "hidden, with pose": cond["concat"][first, ..., 1:],
            "items": np.moveaxis(
                np.where(cond["present"][..., None, None, None], cond["references"], 1.0)[first], 1, 0
            ),
            **{title: shown[arm][first] for title, arm in arms.items() if arm in shown},
            "as it should be": task.example["x0"][first],
        }
        paths.append(workdir / f"{name}.png")
        pictures.save_strips(paths[-1], strips, zoom=2)
    paths.append(workdir / "time.png")
    counts = list(config.timing.references)
    titles = {"cached": "FastFit", "encoding": "FastFit, encoded in every step", "coupled": "twin"}
    ways = {title: way for way, title in titles.items() if (way, counts[0]) in times}
    curves = {title: (counts, [times[way, count] for count in counts]) for title, way in ways.items()}
    pictures.save_curves(paths[-1], curves, x_label="references", y_label="seconds of a run", log=False)
    return paths
