"""DeeDiff: a transformer that is left as soon as it is sure of what it says, early in a run and late in another.

Behind each block a linear layer estimates how wrong the noise prediction is that could be read there. A sample leaves
at the first block whose estimate is at most a threshold, so how many blocks run is learned as a function of t (Tang et
al. 2023). The network learns with its exits (`tuned`, one tail for all), or stays as it is (`frozen`, a tail an exit).
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import models, pictures
from diffusion_jax.acceleration import threshold_for_depth
from diffusion_jax.config import build
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.frame import seeds, trained
from diffusion_jax.recipes.parts.early_exits import (
    equal_depths,
    errors_of,
    run_quality,
    run_times,
    runs,
    trained_exits,
)
from diffusion_jax.recipes.report import Claim, Results, claim

COMPARED = (("adaptive", "fixed", 1.0), ("adaptive", "random", 1.0), ("table", "reversed", 0.67))
"""What is compared at as many blocks, and by which factor it should at least be better."""

_EARLY = "exits are nearly all in the first steps, whose small errors few steps of DDIM carry on to the end"
_NOISE = "of so few samples the distance is too noisy to tell"
REASONS = {"endpoint": _EARLY, "distance": f"{_EARLY}; or {_NOISE}", "change": f"{_EARLY}; or {_NOISE}"}
REASONS["tuning"] = "all of the network moves, in few updates of a small batch, and the last block is one exit of eight"
REASONS["time"] = "of so small a network a block costs little beside what each step costs anyway"
"""The best explanations, in case that these do not hold; none of them was tested."""

NOTES = (
    "runs are of 256 samples and 25 steps of DDIM, not 2000 and 50. Predictions of x0 are clipped to the range of the "
    "data in all of them: in a trial without it, on training seed 100 and at a higher learning rate, adaptive exits "
    "lost to fixed depths (Fréchet distance 19.7 against 11.3), for where t is large small errors of epsilon are large "
    "ones of x0. The table of mean depths is as good as adaptive exits: what they gain lies in t, hardly in the sample."
)

FIGURES = {"endpoint": "distance to the samples of all blocks", "distance": "Fréchet distance to held-out digits"}
WAYS = ("adaptive", "table", "fixed", "random", "reversed")


def run(config: ConfigDict, workdir: Path) -> Results:
    experiment = prepare(config.base)
    base, process = trained(experiment, "digits-transformer"), experiment.process
    shared, own = (models.early_exit(experiment.network, heads) for heads in ("shared", "own"))
    exits = {"tuned": shared, "frozen": own, "without": shared}
    exits = {name: exits[name] for name in config.kinds}
    times = (np.arange(10) + 0.5) / 10
    errors = {
        name: errors_of(exits[name], process, experiment.held_out, config.held_out, times)
        for name in (exits if config.estimates else ())
    }
    made = {name: runs(exits[name], experiment, config, config.samples) for name in exits if name != "without"}
    small = {
        name: one if config.calibration == config.samples else runs(exits[name], experiment, config, config.calibration)
        for name, one in made.items()
    }
    measured: dict[str, list] = {name: [] for name in errors}
    found: dict[Any, list] = {}
    thresholds: dict[Any, list] = {}
    depths: dict[Any, list] = {}
    for seed in seeds(config):
        key, elsewhere = jax.random.key(seed), jax.random.key(config.calibration_seed + seed)
        for name in exits:
            params = trained_exits(config[name], exits[name], base, seed, name, name == "frozen")
            if name in errors:
                measured[name].append(errors[name](params))
            if name not in made:
                continue
            every = small[name].uncertainty(params, elsewhere)
            depth = np.full((every.shape[0], config.samples), exits[name].depth)
            whole = made[name].at(params, key, depth)
            found.setdefault((name, "whole", 0.0), []).append(run_quality(whole, whole))
            for share in config.reductions:
                threshold = threshold_for_depth(every, exits[name].depth * (1 - share))
                arms = {"adaptive": made[name].early(params, key, threshold)}
                depths.setdefault((name, share), []).append(arms["adaptive"].depth)
                thresholds.setdefault((name, share), []).append(threshold)
                if name == "tuned":
                    others = equal_depths(arms["adaptive"].depth, seed)
                    arms |= {way: made[name].at(params, key, one) for way, one in others.items()}
                for way, one in arms.items():
                    found.setdefault((name, way, share), []).append(run_quality(one, whole))
            if name == "tuned":
                last = params, threshold, arms["adaptive"].depth, key
    params, threshold, recorded, key = last
    off, seconds = None, None
    if config.exact:
        gathered = made["tuned"].gathered(params, key, threshold)
        off = float(np.abs(gathered.x - made["tuned"].early(params, key, threshold).x).max())
    if config.clock:
        seconds = run_times(config, experiment, shared, params, threshold, recorded)

    files = [workdir / "depth.png", workdir / "quality.png"]
    grid = np.asarray(build(config.grid))[:-1]
    curves = {
        f"{name}, threshold {np.mean(thresholds[name, share]):.2f}": (grid, np.mean(each, axis=(0, 2)))
        for (name, share), each in depths.items()
    }
    pictures.save_curves(files[0], curves, x_label="t", y_label="blocks of a sample", log=False)

    def mean(way, share, figure):
        return np.mean([one[figure] for one in found["tuned", way, share]])

    frontier = {
        way: (
            [mean(way, share, "depth") for share in config.reductions],
            [mean(way, share, "endpoint") for share in config.reductions],
        )
        for way in WAYS
    }
    label = "distance to the samples of all blocks"
    pictures.save_curves(files[1], frontier, x_label="blocks on average", y_label=label)
    (workdir / "measured.json").write_text(
        json.dumps([[*map(str, key), rows] for key, rows in found.items()], indent=1)
    )
    return Results(claims(config, measured, found, depths, off, seconds), files, NOTES)


def claims(
    config: ConfigDict, measured: dict, found: dict, depths: dict, off: float | None, seconds: dict | None
) -> list[Claim]:
    """Of the kinds of `config`; off: by how much leaving differs from choosing. off, seconds: None, not measured."""

    def of(figure, way, share, name="tuned"):
        return [one[figure] for one in found[name, way, share]]

    few, many = config.reductions
    rows, kinds = [], [name for name in config.kinds if name != "without"]
    if off is not None:
        text = "largest difference of samples"
        rows.append(claim("Leaving equals running all and choosing", text, 0.0, off, "equal", "exact", margin=1e-5))
    for name in (name for name in kinds if name in measured):
        together = [float(np.corrcoef(one.estimated.ravel(), one.actual.ravel())[0, 1]) for one in measured[name]]
        text = "correlation of estimated and actual uncertainty, over exits and tenths of t"
        rows.append(claim(f"{name}: estimates are calibrated", text, 0.9, together, "higher", "not reported"))
    for name in kinds:
        quarter = max(len(depths[name, many][0]) // 4, 1)
        noisy, clean = (
            [float(one[part].mean()) for one in depths[name, many]] for part in (slice(quarter), slice(-quarter, None))
        )
        text = f"blocks in the noisiest quarter of steps, 2 below those in the cleanest; {many:.0%} left out"
        published = "very early at high noise, almost all blocks in the last steps"
        title = f"{name}: noise needs fewer blocks"
        rows.append(claim(title, text, clean, noisy, "lower", published, margin=-2.0))
    for name in kinds:
        title = f"{name}: no measurable change with {few:.0%} fewer blocks"
        values = of("distance", "whole", 0.0, name), of("distance", "adaptive", few, name)
        text, published = "Fréchet distance, at most 5 % above that of all blocks", "FID 79.34 to 79.71 at 16.5 % fewer"
        rows.append(claim(title, text, *values, "lower", published, factor=1.05, reason=REASONS["change"]))
    if "frozen" in kinds:
        values = of("distance", "whole", 0.0, "frozen"), of("distance", "whole", 0.0)
        text = "Fréchet distance of all blocks, at most 5 % above that of the frozen network"
        title, published = "tuned: all blocks are as good as before", "FID 79 to 116 with 42 % fewer blocks"
        rows.append(claim(title, text, *values, "lower", published, factor=1.05, reason=REASONS["tuning"]))
    for share in config.reductions:
        for ours, way, factor in COMPARED:
            for figure, text in FIGURES.items():
                title = f"{share:.0%} fewer blocks, {ours} against {way}: {figure}"
                values = of(figure, way, share), of(figure, ours, share)
                published = (
                    "deep early and shallow late is the wrong way round" if ours == "table" else "adaptive is best"
                )
                row = claim(title, text, *values, "lower", published, factor=factor, reason=REASONS[figure])
                rows.append(row)
    if "without" in measured:
        middle = len(measured["tuned"][0].square) // 2 - 1
        mean = {name: [float(one.square[middle].mean()) for one in measured[name]] for name in ("tuned", "without")}
        text = f"squared error behind block {middle + 1} without it, at least 20 % above that with it"
        title = "The layer-wise loss makes early exits good"
        rows.append(claim(title, text, mean["tuned"], mean["without"], "higher", "ablation", factor=1.2))
    if seconds is None:
        return rows
    counted, clock = (seconds["whole"][i] / seconds["table"][i] for i in (0, 1))
    blocks, time = (seconds["adaptive"][i] / seconds["whole"][i] for i in (0, 1))
    text = f"speed-up, at least 85 % of the counted one (adaptive: {blocks:.0%} of blocks, {time:.0%} of the time)"
    title, published = "A table of depths saves the time that it counts", "a batch waits for its deepest sample"
    return [*rows, claim(title, text, counted, clock, "higher", published, factor=0.85, reason=REASONS["time"])]
