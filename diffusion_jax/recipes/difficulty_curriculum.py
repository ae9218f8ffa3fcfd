"""Difficulty curriculum (Kim et al. 2024): training begins with the noisiest times and takes in harder ones by and by.

Networks that are trained in one interval of t alone show which times are hard; the relative entropy of neighbouring
marginals is another measure of it. The arms are the same training with times drawn in other ways: uniformly, noisy
times first within a tenth of the steps, within two fifths of them or as the loss settles, and in the reversed order.
All seeds are trained at once, as one program of the ordinary step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, metrics, objectives, pictures, timesteps, training
from diffusion_jax.config import build, call
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.places import parts_in
from diffusion_jax.recipes.study import Arm, Results, Study, by_seed, table
from diffusion_jax.recipes.verdicts import Row

NOISY = (0.5, 1.0)
"""The times whose loss is compared along the training."""


def study(s: Study) -> Results:
    config, one = s.config, prepare(s.config.experiment)
    edges = np.linspace(0.0, 1.0, config.intervals + 1)
    losses = np.asarray(specialists(s, edges)["losses"]).reshape(config.intervals, config.alone.seeds, -1)
    steps = metrics.steps_to_drop(losses, config.alone.share) * config.alone.every
    arms = {name: trained(s, name, draw) for name, draw in config.draws.items()}
    rows = quality_rows(s, one, arms) + convergence_rows(arms) + difficulty_rows(s, one, steps)
    return Results(rows, {**drawn_drops(s, edges, losses), **drawn_arms(s, arms)}, "training and noise")


def trained(s: Study, name: str, draw: ConfigDict) -> Mapping[str, Any]:
    """An arm at all seeds, whose loss is looked at where noise is strong."""
    rows = {"seeds": s.seeds, "low": len(s.seeds) * NOISY[:1], "high": len(s.seeds) * NOISY[1:]}
    return together(s, name, draw, s.config.experiment.train.steps, s.config.watch.every, rows)


def specialists(s: Study, edges: np.ndarray) -> Mapping[str, Any]:
    """Networks of one interval each, at the first seeds; those of least noise first."""
    alone = s.config.alone
    low, high = (np.repeat(side, alone.seeds).tolist() for side in (edges[:-1], edges[1:]))
    rows = {"seeds": s.config.intervals * s.seeds[: alone.seeds], "low": low, "high": high}
    return together(s, "intervals", call("timesteps.uniform"), alone.steps, alone.every, rows, alone=True)


def together(s: Study, name: str, draw: Any, steps: int, every: int, rows: Any, alone: bool = False) -> Any:
    experiment = ConfigDict(s.config.experiment.to_dict())
    experiment.objective.draw, experiment.train.steps = draw, steps
    watch = {"every": every, "repeats": s.config.watch.repeats}
    config = ConfigDict({"experiment": experiment, "watch": watch, "rows": rows, "alone": alone})
    return s.stage(name, config, make=at_all_seeds).value


def at_all_seeds(config: ConfigDict) -> Mapping[str, Any]:
    """Trains R networks at once by the ordinary step, each at its seed; `alone`: within its interval of times alone.

    params: `[R, ...]`, the averages. losses: `[R, K + 1]`, of the averages on held-out data at times of the row's
    interval, before training and after every so many steps. stages: of the curriculum then, `[R, K]`.
    """
    one, watch, rows = prepare(config.experiment), config.watch, config.rows
    settings, tracks = one.config.train, parts_in("ema", one.config)
    seeds, low, high = jnp.asarray(rows.seeds), jnp.asarray(rows.low), jnp.asarray(rows.high)
    x0 = jnp.asarray(examples(one.source))
    batch = {"x0": x0[: settings.batch_size], "index": jnp.arange(settings.batch_size)}

    def objective(low, high):
        base = build(config.experiment.objective.draw)
        draw = timesteps.restricted(base, low, high) if config.alone else base
        return build(config.experiment.objective, network=one.network, process=one.process, draw=draw)

    def begin(seed, low, high):
        made = objective(low, high), one.optimizer, one.init_params, batch
        return training.make_init(*made, ema=tracks, seed=seed)()

    def step(state, seed, low, high):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        chosen = jax.random.randint(jax.random.fold_in(key, 0), (settings.batch_size,), 0, len(x0))
        how = {"ema": tracks, "clip_norm": settings.clip_norm, "seed": seed}
        made = training.make_train_step(objective(low, high), one.optimizer, **how)
        return made(state, {**batch, "x0": x0[chosen]})[0]

    @jax.jit
    def some_steps(states):
        return jax.lax.fori_loop(0, watch.every, lambda _, states: jax.vmap(step)(states, seeds, low, high), states)

    look = jax.jit(jax.vmap(held_out_loss(one, watch.repeats)))
    states = jax.jit(jax.vmap(begin))(seeds, low, high)
    losses, stages = [look(states.ema["average"], low, high)], []
    for _ in range(settings.steps // watch.every):
        states = some_steps(states)
        losses.append(look(states.ema["average"], low, high))
        stages.append(getattr(states.objective_state, "stage", jnp.zeros_like(seeds)))
    return {"params": states.ema["average"], "losses": np.stack(losses, axis=1), "stages": np.stack(stages, axis=1)}


def examples(source: data.Source) -> np.ndarray:
    """All of x0, `[N, ...]`."""
    return data.stacked_examples(source, range(len(source)))["x0"]


def held_out_loss(one: Experiment, repeats: int) -> Callable[..., Any]:
    """`(params, low, high) -> loss`: the mean on held-out data at uniform times within [low, high], with noise that is
    always the same."""
    x0 = jnp.asarray(np.repeat(examples(one.held_out), repeats, axis=0))
    batch = {"x0": x0, "index": jnp.arange(len(x0))}

    def loss(params, low, high):
        draw = timesteps.restricted(timesteps.stratified(), low, high)
        made = objectives.denoising(one.network, one.process, draw, train=False)
        return made.loss(params, (), batch, jax.random.key(0))[0].mean()

    return loss


def quality_rows(s: Study, one: Experiment, arms: Mapping[str, Any]) -> list[Row]:
    config = s.config
    # At t = 1 x0 is the small difference of large numbers: without bounds a few samples are all of the distance.
    denoiser = denoisers.clipped(denoisers.denoiser(one.network, one.process))
    solver, grid = build(config.solver), build(config.grid)
    real = examples(one.held_out).reshape(len(one.held_out), -1)

    def sampled(seed):
        number = s.seeds.index(seed)
        return {
            name: Arm(denoiser, jax.tree.map(lambda leaf: leaf[number], arm["params"]), solver, grid)
            for name, arm in arms.items()
        }

    def distance(drawn):
        return metrics.sliced_wasserstein(np.asarray(drawn.x).reshape(len(drawn.x), -1), real)

    found = table(sampled, s.seeds, {"distance": distance}, shape=one.shape, count=config.count)
    error = float(np.std(found["uniform"]["distance"], ddof=len(s.seeds) > 1) / np.sqrt(len(s.seeds)))
    figure, plus = "sliced W2 to held-out digits", "sliced W2, plus a standard error"
    claims = (
        ("stages by the loss: as good as uniform t", "by the loss", "uniform", "lower", "better", plus, error),
        ("a tenth of the steps: as good as uniform t", "easy first", "uniform", "lower", "0.179, 0.184", plus, error),
        ("noisy times belong first, not last", "easy first", "hard first", "lower", "0.179, 0.198", figure, 0.0),
        ("a ramp of two fifths costs", "easy first, long", "easy first", "higher", "0.199, 0.179", figure, 0.0),
    )
    return [
        found.row(title, "distance", ours, other, direction, published, figure=what, margin=margin)
        for title, ours, other, direction, published, what, margin in claims
        if {ours, other} <= set(arms)
    ]


def share_until(losses: np.ndarray, bound: np.ndarray) -> list[float]:
    """The share of the training after which losses `[S, K + 1]` are first at most `bound [S]`; 1 where never."""
    there = losses <= bound[:, None]
    there[:, -1] = True
    return (there.argmax(axis=1) / (losses.shape[1] - 1)).tolist()


def convergence_rows(arms: Mapping[str, Any]) -> list[Row]:
    """When the loss at noisy times is where uniform training ends."""
    uniform, ours = (np.asarray(arms[name]["losses"]) for name in ("uniform", "easy first"))
    figure = "share of the steps to uniform's last loss, t > 1/2"
    share, own = share_until(ours, uniform[:, -1]), share_until(uniform, uniform[:, -1])
    return [
        Row("noisy times are learned in half of the steps", figure, share, 0.5, "lower", "expected"),
        Row("sooner than by uniform t", figure, share, own, "lower", "faster convergence"),
    ]


def difficulty_rows(s: Study, one: Experiment, steps: np.ndarray) -> list[Row]:
    """steps: `[N, S]`, of the networks of one interval each."""
    config, x0 = s.config, examples(one.source)
    digits = denoisers.gaussian_mixture(x0.reshape(len(x0), -1), config.entropy.std)
    times = np.linspace(0.0, 1.0, config.intervals * config.entropy.times + 1)

    def entropies(seed):
        found = metrics.relative_entropies(jax.random.key(seed), one.process, digits, times, config.entropy.samples)
        first, *others = found.reshape(config.intervals, -1).sum(axis=1)
        return {"first": first, "others": max(others)}

    found, parts = by_seed(s.seeds, entropies), f"of {config.intervals} intervals"
    least = f"steps to {config.alone.share:.0%} of the drop, {parts}"
    return [
        Row("least noise is hardest: twice the steps", least, steps[0].tolist(), np.median(steps[1:], axis=0).tolist(),
            "higher", "510; 90 to 105", factor=2.0),
        Row("least noise is hardest: relative entropy", f"nats, the first and the largest {parts}", found["first"],
            found["others"], "higher", "falls with t"),
    ]  # fmt: skip


def drawn_drops(s: Study, edges: np.ndarray, losses: np.ndarray) -> dict[Any, str]:
    drops = metrics.normalised_drop(losses).mean(axis=1)
    at = np.arange(drops.shape[1]) * s.config.alone.every
    curves = {f"t from {edges[i]:.1f} to {edges[i + 1]:.1f}": (at, drop) for i, drop in enumerate(drops)}
    label, path = "drop that is left, of 1", s.picture("drops")
    title = "Networks of one interval of t each"
    pictures.save_curves(path, curves, x_label="steps", y_label=label, title=title, log=False)
    return {path: "How much of the fall of the loss is still to come; mean over seeds. The slowest is the hardest."}


def drawn_arms(s: Study, arms: Mapping[str, Any]) -> dict[Any, str]:
    every, path = s.config.watch.every, s.picture("noisy")
    curves = {
        name: (np.arange(1, arm["losses"].shape[1]) * every, np.mean(arm["losses"], axis=0)[1:])
        for name, arm in arms.items()
    }
    label, title = "held-out loss at t > 1/2", "What is learned of noisy times"
    pictures.save_curves(path, curves, x_label="steps", y_label=label, title=title)
    return {path: "Mean over seeds, by the draw of times in training. Lower is better."}
