"""DeeDiff: how many blocks a step runs, decided by each sample's own estimate of its error, at equal numbers of blocks.

The transformer on digits learns with its exits (`tuned`, one tail for all), or is frozen beside them (`frozen`, a tail
an exit). Thresholds are found on runs of other noise. Predictions of x0 are clipped to the range of the data in all
arms.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, models, objectives, pictures
from diffusion_jax.acceleration import at_depth, depth_table, exit_by_uncertainty, threshold_for_depth, whole_depth
from diffusion_jax.baselines import CLASSES
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.models import EarlyExit
from diffusion_jax.recipes.study import Arm, Results, Study, Tabulated, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.sampling import sample
from diffusion_jax.stages import Stage

WAYS = ("adaptive", "table", "fixed", "random", "reversed")


def exit_training(config: ConfigDict, base: Stage) -> Experiment:
    """The base model with exits behind its blocks; `config.frozen` trains these alone."""
    exits = models.early_exit(base.trained.network, config.heads)
    own, params = prepare(config, network=exits.network), base.value
    batch = own.example()

    def begin(key):
        made = exits.init(key, params, jnp.asarray(batch["x0"]), jnp.zeros(1), batch["cond"])
        return made if config.frozen else {"params": params, "exits": made}

    objective = objectives.with_frozen(own.objective, {"params": params}, "exits") if config.frozen else own.objective
    return prepare(config, network=exits.network, objective=objective, begin=begin)


def equal_depths(depth: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Depths `[S, B]` that sum up to as many blocks: fixed for each sample, at random, by a table, and it reversed."""
    steps, count = depth.shape
    fixed = np.floor(depth.mean()) + (np.arange(count) < round(count * (depth.mean() % 1)))
    by_step = np.asarray(depth_table(jnp.asarray(depth)))[:, None]
    shuffled = np.random.default_rng(seed).permutation(depth.ravel()).reshape(depth.shape)
    rows = {"fixed": fixed[None], "random": shuffled, "table": by_step, "reversed": by_step[::-1]}
    return {way: np.broadcast_to(one, (steps, count)).astype(np.int32) for way, one in rows.items()}


def study(s: Study) -> Results:
    config, base = s.config, s.stage("digits", s.config.base)
    kinds = [name for name in ("tuned", "frozen", "without") if name in config]
    exits = {name: models.early_exit(base.trained.network, config[name].heads) for name in kinds}

    def trained(name, seed):
        found = s.stage(name, config[name], base, seed=seed, prepare=exit_training).value
        return {"params": base.value, "exits": found} if config[name].frozen else found

    depths: dict[tuple[str, float], list[np.ndarray]] = {}
    runs = {name: at_equal_blocks(s, base, exits[name], name, partial(trained, name), depths) for name in kinds[:2]}
    rows = exit_rows(runs, depths, config) + (of_training(s, base, exits, trained) if config.held_out else [])
    grid = np.asarray(build(config.grid))[:-1]
    curves = {
        f"{name}, {share:.0%} fewer": (grid, np.mean(each, axis=(0, 2))) for (name, share), each in depths.items()
    }
    title = "Blocks that a sample runs at each time (of 8)"
    pictures.save_curves(s.picture("depth"), curves, x_label="t", y_label="blocks of a sample", title=title, log=False)

    def points(way):
        found = runs["tuned"]
        blocks = [float(np.mean(depths["tuned", share])) for share in config.reductions]
        return blocks, [float(np.mean(found[f"{way} {share:g}"]["endpoint"])) for share in config.reductions]

    labels: dict[str, Any] = {"x_label": "blocks on average", "y_label": "distance to the samples of all blocks"}
    title = "What leaving early costs, by how depths are spread"
    pictures.save_curves(s.picture("quality"), {way: points(way) for way in WAYS}, **labels, title=title)
    drawn = {
        s.picture("depth"): "Blocks that samples run along the runs: few at high noise, most near clean images.",
        s.picture("quality"): "What leaving costs at equal numbers of blocks, by how depths are spread.",
    }
    return Results(rows, drawn, "the training of the exits and the noise; the base model is trained once")


def at_equal_blocks(
    s: Study, base: Stage, exits: EarlyExit, name: str, trained: Any, depths: dict[Any, Any]
) -> Tabulated:
    """Runs of all ways at equal numbers of blocks; adds the depths of adaptive ones, `[S, B]` a seed, to `depths`."""
    config, process, solver = s.config, base.trained.process, build(s.config.solver)
    grid, shape, count = jnp.asarray(build(config.grid)), base.trained.shape, config.samples
    steps, cond = len(grid) - 1, {"label": jnp.arange(count) % CLASSES}

    @partial(jax.jit, static_argnames=("entry", "axis"))
    def read(key, params, threshold, entry, axis):
        inner = denoisers.clipped(whole_depth(exits, process)) if entry == "uncertainty" else leave(threshold)
        seen = denoisers.recorded(inner, steps, lambda said, x, step: said.extras[entry], axes=axis)
        return sample(key, seen, params, solver, grid, shape=(count, *shape), cond=cond).run.carry.values

    def leave(threshold):
        return denoisers.clipped(exit_by_uncertainty(exits, process, threshold))

    def stop(depths):
        return denoisers.clipped(at_depth(exits, process, depths))

    def arms(seed):
        params = trained(seed)
        uncertainty = read(jax.random.key(1000 + seed), params, 0.0, "uncertainty", 1)
        full = np.full((steps, count), exits.depth, np.int32)
        found = {"whole": Arm(stop, params, solver, grid, cond, (full,))}
        for share in config.reductions:
            threshold = jnp.float32(threshold_for_depth(uncertainty, exits.depth * (1 - share)))
            found[f"adaptive {share:g}"] = Arm(leave, params, solver, grid, cond, (threshold,))
            depth = np.asarray(read(jax.random.key(seed), params, threshold, "exit_depth", 0))
            depths.setdefault((name, share), []).append(depth)
            for way, one in equal_depths(depth, seed).items() if name == "tuned" else ():
                found[f"{way} {share:g}"] = Arm(stop, params, solver, grid, cond, (one,))
        fewer = jnp.linspace(grid[0], grid[-1], round(steps * (1 - config.reductions[-1])) + 1)
        if name == "tuned":
            found["fewer steps"] = Arm(stop, params, solver, fewer, cond, (full[: len(fewer) - 1],))
        return found

    measures = {"endpoint": lambda drawn: metrics.endpoint_error(drawn.x, drawn.reference)}
    if config.judged:
        judge = metrics.feature_network("digits")
        measures["distance"] = lambda drawn: metrics.judged(judge, drawn.x).distance
    return table(arms, s.seeds, measures, shape=shape, count=count, reference="whole")


def exit_rows(runs: Mapping[str, Tabulated], depths: Mapping[Any, list[np.ndarray]], config: ConfigDict) -> list[Row]:
    (few, many), found = config.reductions, runs["tuned"]
    fewer, end, distance = f"{many:.0%} fewer blocks:", "distance to the samples of all blocks", "Fréchet distance"
    adaptive, by_table, best = f"adaptive {many:g}", f"table {many:g}", ("lower", "adaptive is best")

    def ended(title, ours, other, *rest):
        return found.row(f"{fewer} {title}", "endpoint", ours, other, *rest, figure=end)

    rows = [
        ended("adaptive beats fixed", adaptive, f"fixed {many:g}", *best),
        ended("adaptive beats random", adaptive, f"random {many:g}", *best),
        ended("a table beats itself reversed", by_table, f"reversed {many:g}", "lower", "clearly worse", 0.67),
        ended("better than fewer steps", by_table, "fewer steps", "lower", "not compared"),
    ]
    if config.judged:
        title = f"{fewer} nearer to digits than fixed"
        rows.append(found.row(title, "distance", adaptive, f"fixed {many:g}", *best, figure=distance))
    for name, kind in runs.items():
        quarter = max(len(depths[name, many][0]) // 4, 1)
        noisy, clean = (
            [float(d[part].mean()) for d in depths[name, many]] for part in (np.s_[:quarter], np.s_[-quarter:])
        )
        figure, published = "blocks in the noisiest quarter; the cleanest", "very early at high noise"
        rows.append(Row(f"{name}: noise needs fewer blocks", figure, noisy, clean, "lower", published, margin=-2.0))
        if config.judged:
            bounds = "whole", "lower", "FID 79.71, 79.34 (16.5 % fewer)", 1.05
            title = f"{name}: up to 5 % worse with {few:.0%} fewer"
            rows.append(kind.row(title, "distance", f"adaptive {few:g}", *bounds, figure=distance))
    if config.judged and "frozen" in runs:
        title, before = "tuned: all blocks, up to 5 % worse than before", runs["frozen"]["whole"]["distance"]
        rows.append(Row(title, distance, found["whole"]["distance"], before, "lower", "it can degrade", 1.05))
    counted, clock = (
        np.divide(found["whole"][cost], found[by_table][cost]).tolist() for cost in ("compute", "seconds")
    )
    title, published = "A table saves 85 % of what it counts", "a batch waits for its deepest"
    return [*rows, Row(title, "times faster; counted in blocks", clock, counted, "higher", published, 0.85)]


def of_training(s: Study, base: Stage, exits: Mapping[str, EarlyExit], trained: Any) -> list[Row]:
    """How good estimates are on held-out digits, and what the layer-wise loss is good for."""
    held_out = base.trained.held_out.take(range(s.config.held_out))
    batch, times = {"x0": jnp.asarray(held_out["x0"]), "cond": held_out["cond"]}, (np.arange(10) + 0.5) / 10
    middle, found = base.trained.network.anatomy.depth // 2 - 1, {}
    for name, one in exits.items():
        measure = jax.jit(partial(objectives.exit_errors, one.network, base.trained.process))

        def figures(seed, name=name, measure=measure):
            errors = measure(trained(name, seed), batch, times, jax.random.key(seed))
            together = np.corrcoef(np.ravel(errors.estimated), np.ravel(errors.actual))[0, 1]
            return {"together": together, "middle": np.mean(errors.square[middle])}

        found[name] = by_seed(s.seeds, figures)
    figure = "correlation of estimated and actual error"
    rows = [
        Row(f"{name}: estimates are calibrated", figure, found[name]["together"], 0.9, "higher")
        for name in sorted(found.keys() - {"without"})
    ]
    if "without" in found:
        figure, values = f"squared error behind block {middle + 1} without it", (found["without"], found["tuned"])
        title, published = "The layer-wise loss makes early exits good", "ablation: by a clear margin"
        rows.append(Row(title, figure, values[0]["middle"], values[1]["middle"], "higher", published, 1.2))
    return rows
