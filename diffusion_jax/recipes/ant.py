"""ANT (Go et al. 2023): noise levels are tasks of one network that disagree; intervals of them are combined as tasks.

On a ring of Gaussians the cosines of gradients are measured by how far their noise levels are apart. On digits a small
transformer is trained on five intervals of times in each of the published ways, with the draw of equally many examples
of each interval alone ("equal"), and with uniform times; all with equally many updates.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import data, denoisers, objectives, pictures, timesteps
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.metrics import interleaved, sliced_wasserstein
from diffusion_jax.recipes.study import Arm, Results, Study, by_seed, table
from diffusion_jax.recipes.verdicts import Row
from diffusion_jax.solvers import ddim
from diffusion_jax.stages import Stage
from diffusion_jax.training import init_state, make_train_step
from diffusion_jax.typing import Params


def study(s: Study) -> Results:
    lags = [lag_curve(s, seed) for seed in s.seeds]
    trained = {seed: networks(s, seed) for seed in s.seeds}
    equal = trained[s.seeds[0]]["equal"].trained
    edges = build(s.config.edges, process=equal.process)
    found, held_out = quality(s, trained, edges), held_out_losses(equal, edges, s.config.repeats)
    losses = by_seed(s.seeds, lambda seed: {name: held_out(trained[seed][name].value)[-1] for name in ("equal", "UW")})
    seconds = update_seconds(s.config, trained[s.seeds[0]])
    path = s.picture("affinity")
    curves = {f"seed {seed}": (range(1, len(curve) + 1), curve) for seed, curve in zip(s.seeds, lags)}
    pictures.save_curves(
        path, curves, x_label="tenths of t between two noise levels", y_label="mean cosine of their gradients",
        title="Ring of Gaussians: neighbours agree", log=False,
    )  # fmt: skip
    rows = [*affinity_rows(lags), *quality_rows(found, losses, edges), *cost_rows(seconds, s.config.clusters)]
    caption = "Gradients of one network at ten noise levels: the further apart, the less they agree."
    return Results(rows, {path: caption}, "training and noise")


def affinity(config: ConfigDict, trained: Stage) -> dict[str, Any]:
    """Mean cosines of gradients at the times (i + 1) / parts, over `batches` batches of the data."""
    experiment, times = trained.trained, jnp.arange(1, config.parts + 1) / config.parts
    loss = objectives.denoising(experiment.network, experiment.process)

    @jax.jit
    def measured(batch, key):
        return objectives.task_affinity(loss, trained.value, batch, times, key)

    found = []
    for number in range(config.batches):
        rows = np.random.default_rng(number).integers(len(experiment.source), size=config.batch)
        found.append(measured(data.stacked_examples(experiment.source, rows), jax.random.key(number)))
    return {"cosines": np.mean(found, axis=0)}


def by_affinity(config: ConfigDict, measured: Stage) -> Experiment:
    """The experiment with intervals of times whose gradients agree."""
    distance, plain = timesteps.affinity_distance(measured.value["cosines"]), config.to_dict()
    edges = tuple(timesteps.interval_clusters(distance, config.objective.edges.clusters).tolist())
    plain["objective"]["edges"] = plain["objective"]["objective"]["draw"]["edges"] = edges
    return prepare(ConfigDict(plain))


def lag_curve(s: Study, seed: int) -> np.ndarray:
    """The mean cosine by how many tenths of t lie between, `[parts - 1]`, over the course of a training on the ring."""
    config, curves = s.config, []
    for steps in config.ring_steps:
        one = ConfigDict(config.ring.to_dict())
        one.train.steps = steps
        network = s.stage(f"ring, {steps} updates", one, seed=seed)
        asked = ConfigDict({"parts": config.ring_parts, "batches": 1, "batch": config.ring_batch})
        cosines = s.stage("ring, affinity", asked, network, make=affinity).value["cosines"]
        curves.append(objectives.affinity_by_lag(cosines))
    return np.mean(curves, axis=0)


def networks(s: Study, seed: int) -> dict[str, Stage]:
    """All that is trained on digits, by arm; specialists see the times of one interval alone."""
    config, later = s.config, "Nash, affinity"
    found = {name: s.stage(name, arm, seed=seed) for name, arm in config.arms.items() if name != later}
    if later in config.arms:
        asked = ConfigDict({"parts": config.parts, "batches": config.batches, "batch": config.affinity_batch})
        measured = s.stage("digits, affinity", asked, found["uniform"], make=affinity)
        found[later] = s.stage(later, config.arms[later], measured, seed=seed, prepare=by_affinity)
    edges = build(config.edges, process=found["equal"].trained.process)
    for number in config.specialists:
        one = ConfigDict(config.specialist.to_dict())
        one.objective.draw.update({"low": float(edges[number]), "high": float(edges[number + 1])})
        found[f"specialist {number}"] = s.stage(f"specialist {number}", one, seed=seed)
    return found


def quality(s: Study, trained: Mapping[int, Mapping[str, Stage]], edges: Any) -> Any:
    """Distances of samples to held-out digits; a specialist takes the steps in its interval, "equal" the others."""
    one = trained[s.seeds[0]]["equal"].trained
    held_out = data.stacked_examples(one.held_out, range(len(one.held_out)))["x0"].reshape(len(one.held_out), -1)
    plain, solver, grid = denoisers.denoiser(one.network, one.process), ddim(), build(s.config.grid)

    def joined(low, high):
        return denoisers.switched((plain, plain), denoisers.by_interval(low, high))

    def arms(seed):
        stages = trained[seed]
        made = {name: Arm(plain, stages[name].value, solver, grid) for name in s.config.arms}
        for number in s.config.specialists:
            both = stages["equal"].value, stages[f"specialist {number}"].value
            interval = (edges[number], edges[number + 1])
            made[f"specialist {number}"] = Arm(joined, both, solver, grid, settings=interval)
        return made

    def distance(drawn):
        return sliced_wasserstein(np.asarray(drawn.x).reshape(len(drawn.x), -1), held_out)

    return table(arms, s.seeds, {"distance": distance}, shape=one.shape, count=s.config.count)


def held_out_losses(one: Experiment, edges: Any, repeats: int) -> Callable[[Params], np.ndarray]:
    """`params -> ` the loss on held-out digits in each interval, of the same times and noise for all networks."""
    loss = objectives.denoising(one.network, one.process, timesteps.by_cluster(edges), train=False)
    images = data.stacked_examples(one.held_out, range(len(one.held_out)))["x0"]

    @jax.jit
    def at(params, images):
        aux = loss.loss(params, (), {"x0": jnp.tile(images, (repeats, 1, 1, 1))}, jax.random.key(0))[1]
        members = jax.nn.one_hot(timesteps.cluster_of(edges, aux.per_example["t"]), len(edges) - 1, axis=0)
        return members @ aux.per_example["loss"] / members.sum(axis=1)

    return lambda params: np.asarray(at(params, images))


def update_seconds(config: ConfigDict, trained: Mapping[str, Stage]) -> dict[str, list[float]]:
    """Seconds of `updates` updates of the objectives that combine gradients and of the plain one, in turns."""
    if not config.rounds:
        return {}
    runs = {}
    for name in ("equal", "PCGrad", "Nash"):
        one = trained[name].trained
        batch = one.example(one.config.train.batch_size)
        step = make_train_step(one.objective, one.optimizer)
        state = init_state(one.objective, one.optimizer, one.init_params, batch)

        def updates(state=state, step=step, batch=batch):
            for _ in range(config.updates):
                state, _ = step(state, batch)
            return state.params

        runs[name] = updates
    return interleaved(runs, config.rounds)


def affinity_rows(lags: list[np.ndarray]) -> list[Row]:
    title, figure = "The further apart, the less they agree", "mean cosine, 1 and 9 tenths of t apart"
    return [Row(title, figure, [curve[0] for curve in lags], [curve[-1] for curve in lags], "higher", "O1", margin=0.2)]


CLAIMS = (
    ("PCGrad beats its draw alone", "PCGrad", "equal", "better FID than without"),
    ("PCGrad beats uniform times", "PCGrad", "uniform", "better FID than uniform times"),
    ("PCGrad beats its draw with as many operations", "PCGrad", "equal, longer", "not reported"),
    ("Nash beats uniform times", "Nash", "uniform", "better FID than uniform times"),
    ("So it does with intervals of equal length", "Nash, time", "uniform", "better FID than uniform times"),
    ("So it does with intervals by affinity", "Nash, affinity", "uniform", "better FID than uniform times"),
    ("UW is better early", "UW, early", "equal, early", "faster convergence"),
)
"""Of the distance of samples: title, the lower one, the other, published."""


def quality_rows(found: Any, losses: Mapping[str, list[float]], edges: Any) -> list[Row]:
    figure, high = "sliced Wasserstein-2 to held-out digits", "held-out loss at the most noise"
    rows = [
        found.row(title, "distance", ours, other, "lower", published, figure=figure)
        for title, ours, other, published in CLAIMS
        if {ours, other} <= set(found.figures)
    ]
    rows.append(Row("UW learns high noise better", high, losses["UW"], losses["equal"], "lower", "not reported"))
    for number in range(len(edges) - 1):
        if f"specialist {number}" in found.figures:
            title = f"Negative transfer for t in ({edges[number]:.2f}, {edges[number + 1]:.2f}]"
            told = f"{figure}; with a specialist there"
            rows.append(found.row(title, "distance", f"specialist {number}", "equal", "lower", "O2", figure=told))
    return rows


def cost_rows(seconds: Mapping[str, list[float]], clusters: int) -> list[Row]:
    claims = (("PCGrad", "k", clusters), ("Nash", "1.25", 1.25))
    return [
        Row(f"{name} costs at most {told} updates", "seconds of 25 updates, by round", seconds[name],
            seconds["equal"], "lower", "k backward passes, once in 25 steps for Nash", factor)
        for name, told, factor in claims
        if seconds
    ]  # fmt: skip
