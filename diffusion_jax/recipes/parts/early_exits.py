"""Exits of a trained network: their training, thresholds for a number of blocks, and runs at known depths."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, metrics, objectives, sampling
from diffusion_jax.acceleration import at_depth, depth_table, exit_by_uncertainty, whole_depth
from diffusion_jax.config import build
from diffusion_jax.data.sources import BatchSource
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.models import EarlyExit
from diffusion_jax.recipes.frame import trained
from diffusion_jax.recipes.parts.digits import judged
from diffusion_jax.typing import Params, Process


def trained_exits(config: ConfigDict, exits: EarlyExit, base: Params, seed: int, name: str, frozen: bool) -> Any:
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


def errors_of(
    exits: EarlyExit, process: Process, source: BatchSource, count: int, times: Any
) -> Callable[[Any], objectives.ExitErrors]:
    """`params -> ExitErrors` of `count` examples that were not trained on."""
    batch = jax.tree.map(jnp.asarray, source.take(range(count)))
    measured = jax.jit(
        lambda params: objectives.exit_errors(exits.network, process, params, batch, times, jax.random.key(0))
    )
    return lambda params: jax.device_get(measured(params))


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


def runs(exits: EarlyExit, experiment: Experiment, config: ConfigDict, count: int) -> Runs:
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
        return ran(params, key, exit_by_uncertainty(exits, process, threshold, gather=gather), depth)

    @jax.jit
    def at(params, key, depths):
        return ran(params, key, at_depth(exits, process, depths), depth)

    @jax.jit
    def uncertainty(params, key):
        read = ran(
            params, key, whole_depth(exits, process), lambda prediction, x, step: prediction.extras["uncertainty"]
        )
        return read.run.carry.values

    return Runs(
        lambda params, key, threshold: outcome(early(params, key, jnp.float32(threshold), False)),
        lambda params, key, threshold: outcome(early(params, key, jnp.float32(threshold), True)),
        lambda params, key, depths: outcome(at(params, key, jnp.asarray(depths, jnp.int32))),
        lambda params, key: np.asarray(uncertainty(params, key)),
    )


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
    config: ConfigDict, experiment: Experiment, exits: EarlyExit, params: Params, threshold: float, depth: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Share of blocks counted, and seconds a run: all blocks, a table for the batch, and each sample by itself."""
    process, count, cond = experiment.process, config.samples, {"label": np.arange(config.samples) % 10}
    table = depth_table(jnp.asarray(depth))
    arms = {
        "whole": at_depth(exits, process, jnp.full(1, exits.depth)),
        "table": at_depth(exits, process, table),
        "adaptive": exit_by_uncertainty(exits, process, threshold),
    }
    seconds = {}
    for name, denoiser in arms.items():
        sampler = sampling.make_sampler(denoiser, build(config.solver), shape=experiment.shape)

        def once(sampler=sampler):
            return sampler(jax.random.key(0), params, build(config.grid), cond, np.arange(count))

        cost = metrics.sampling_cost(once, count, config.repeats)
        seconds[name] = cost.compute / cost.nfe, cost.seconds_per_sample * count
    return seconds
