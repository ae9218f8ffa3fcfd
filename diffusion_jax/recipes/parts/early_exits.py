"""Exits of a trained network: their training, thresholds for a number of blocks, and runs at known depths."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import denoisers, metrics, objectives, sampling
from diffusion_jax.acceleration.early_exit import at_depth, depth_table, early_exit
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.models import EarlyExit
from diffusion_jax.recipes.frame import trained
from diffusion_jax.recipes.parts.digits import judged


def trained_exits(config: Any, exits: EarlyExit, base: Any, seed: int, name: str, frozen: bool) -> Any:
    """`{"params", "exits"}` as trained with `seed` from the network's parameters `base`.

    config: an experiment on the network whose objective is `objectives.layerwise`. frozen: the network does not learn.
    """
    config = config.copy_and_resolve_references()
    config.seed = seed
    experiment = prepare(config)
    objective = build(config.objective, network=exits.network, process=experiment.process)
    batch = experiment.example()

    def init(key):
        x = jnp.asarray(batch["x0"])
        own = exits.init(key, base, x, jnp.zeros(len(x)), batch["cond"])
        return own if frozen else {"params": base, "exits": own}

    if frozen:
        objective = objectives.with_frozen(objective, {"params": base}, "exits")
    experiment = experiment._replace(network=exits.network, objective=objective)
    found = trained(experiment, f"deediff-{name}", init_params=init, given=frozen)
    return {"params": base, "exits": found} if frozen else found


class Errors(NamedTuple):
    """Means over examples, by exit and time, `[L, T]`: estimated and actual uncertainty, and the squared error."""

    estimated: np.ndarray
    actual: np.ndarray
    square: np.ndarray


def errors_of(exits: EarlyExit, process: Any, source: Any, count: int, times: Any) -> Callable[[Any], Errors]:
    """`params -> Errors` of `count` examples that were not trained on, with the same noise at each of `times`."""
    part = source.take(range(count))
    x0, cond = jnp.asarray(part["x0"]), jax.tree.map(jnp.asarray, part["cond"])

    @jax.jit
    def measured(params):
        def at(t):
            t = jnp.full(count, t)
            x_t, noise = process.corrupt(jax.random.key(0), x0, t)
            answers, _ = exits.network.apply(params, x_t, process.network_time(t), cond)
            target = process.target(x0, noise, t)
            actual = objectives.uncertainty_target(process, answers.output, target, x_t, t)
            each = answers.uncertainty, actual, jnp.square(answers.output - target)
            return [values.reshape(len(values), -1).mean(axis=1) for values in each]

        return [values.T for values in jax.lax.map(at, jnp.asarray(times))]

    return lambda params: Errors(*map(np.asarray, measured(params)))


class Ran(NamedTuple):
    """x: samples. depth `[S, B]`: blocks of each sample at each step. computed: mean share of blocks computed."""

    x: np.ndarray
    depth: np.ndarray
    computed: float


class Runs(NamedTuple):
    """Runs of one program each, from the noise of `key` and with labels in turn.

    early: (params, key, threshold) -> Ran            gathered: the same by running all blocks
    at: (params, key, depths [S, B]) -> Ran
    uncertainty: (params, key) -> [S, L, B]      mean estimates along runs of the whole network
    """

    early: Callable[..., Ran]
    gathered: Callable[..., Ran]
    at: Callable[..., Ran]
    uncertainty: Callable[..., np.ndarray]


def runs(exits: EarlyExit, experiment: Experiment, config: Any, count: int) -> Runs:
    """The runs of `count` samples; `config` has the solver and the grid."""
    process, solver, grid = experiment.process, build(config.solver), jnp.asarray(build(config.grid))
    labels = {"label": jnp.arange(count) % 10}

    def ran(params, key, denoiser, read):
        # Where little but noise is left, x0 is a small error times a large factor.
        seen = denoisers.recorded(denoisers.clipped(denoiser), len(grid) - 1, read)
        return sampling.sample(key, seen, params, solver, grid, shape=(count, *experiment.shape), cond=labels)

    def depth(prediction, x, step):
        return prediction.extras["exit_depth"]

    def outcome(samples):
        return Ran(
            np.asarray(samples.x), np.asarray(samples.run.carry.values), float(samples.cost.compute) / (len(grid) - 1)
        )

    @partial(jax.jit, static_argnames="gather")
    def early(params, key, threshold, gather):
        return ran(params, key, early_exit(exits, process, threshold, gather=gather), depth)

    @jax.jit
    def at(params, key, depths):
        return ran(params, key, at_depth(exits, process, depths), depth)

    @jax.jit
    def uncertainty(params, key):
        whole = at_depth(exits, process, jnp.full(1, exits.depth))
        xs = ran(params, key, whole, lambda prediction, x, step: x).run.carry.values

        def estimates(entry):
            x, t = entry
            answers, _ = exits.network.apply(params, x, process.network_time(jnp.full(count, t)), labels)
            return answers.uncertainty.reshape(exits.depth, count, -1).mean(axis=2)

        return jax.lax.map(estimates, (xs, grid[:-1]))

    return Runs(
        lambda params, key, threshold: outcome(early(params, key, jnp.float32(threshold), False)),
        lambda params, key, threshold: outcome(early(params, key, jnp.float32(threshold), True)),
        lambda params, key, depths: outcome(at(params, key, jnp.asarray(depths, jnp.int32))),
        lambda params, key: np.asarray(uncertainty(params, key)),
    )


def threshold_at_depth(uncertainty: np.ndarray, depth: float) -> float:
    """The threshold at which estimates `[S, L, B]` of whole runs mean `depth` blocks on average, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if exit_depths(uncertainty, middle).mean() > depth else (low, middle)
    return high


def exit_depths(uncertainty: np.ndarray, threshold: float) -> np.ndarray:
    """Behind which block samples leave, `[S, B]`."""
    sure = uncertainty <= threshold
    return np.where(sure.any(axis=1), sure.argmax(axis=1) + 1, uncertainty.shape[1])


def run_quality(ran: Any, whole: Any) -> dict[str, float]:
    """Depth and cost of a run, what the judge says, and how far its samples are from those of all blocks."""
    judge = judged(ran.x, np.arange(len(ran.x)) % 10)
    endpoint = float(np.sqrt(np.mean((ran.x - whole.x) ** 2)))
    return {**judge._asdict(), "endpoint": endpoint, "depth": float(ran.depth.mean()), "computed": ran.computed}


def equal_depths(depth: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Depths `[S, B]` that sum up to as many blocks: fixed for each sample, at random, by a table, and it reversed."""
    steps, count = depth.shape
    mean = depth.mean()
    fixed = np.floor(mean) + (np.arange(count) < round(count * (mean % 1)))
    table = np.asarray(depth_table(jnp.asarray(depth)))[:, None]
    shuffled = np.random.default_rng(seed).permutation(depth.ravel()).reshape(depth.shape)
    rows = {"fixed": fixed[None], "random": shuffled, "table": table, "reversed": table[::-1]}
    return {way: np.broadcast_to(one, (steps, count)) for way, one in rows.items()}


def run_times(
    config: Any, experiment: Experiment, exits: EarlyExit, params: Any, threshold: float, depth: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Share of blocks counted, and seconds a run: all blocks, a table for the batch, and each sample by itself."""
    process, count, cond = experiment.process, config.samples, {"label": np.arange(config.samples) % 10}
    table = depth_table(jnp.asarray(depth))
    arms = {
        "whole": at_depth(exits, process, jnp.full(1, exits.depth)),
        "table": at_depth(exits, process, table),
        "adaptive": early_exit(exits, process, threshold),
    }
    seconds = {}
    for name, denoiser in arms.items():
        sampler = sampling.make_sampler(denoiser, build(config.solver), shape=experiment.shape)

        def once(sampler=sampler):
            return sampler(jax.random.key(0), params, build(config.grid), cond, np.arange(count))

        cost = metrics.sampling_cost(once, count, config.repeats)
        seconds[name] = cost.compute / cost.nfe, cost.seconds_per_sample * count
    return seconds
