"""What the study of SDP shares: planners trained for each seed, episodes of each, and what a decision costs."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers
from diffusion_jax.config import build
from diffusion_jax.control import Environment, Policy, Rollout, rollout
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.frame import trained
from diffusion_jax.typing import Denoiser, Params


class Planner(NamedTuple):
    """A trained model of plans of actions `[E, entries, 2]` given what was observed, and the parameters of each seed.

    grid: `[N + 1]`, on which plans are denoised.
    """

    denoiser: Denoiser
    grid: Any
    shape: tuple[int, int]
    params: tuple[Params, ...]


class Decision(NamedTuple):
    """What one decision costs; evaluations: of the network, per environment."""

    seconds: float
    evaluations: float


def planner(config: ConfigDict, name: str, seeds: Sequence[int]) -> Planner:
    """Trains the experiment `config`, which has a `grid` beside its other entries, for each seed; see `trained`."""
    params = []
    for seed in seeds:
        config = config.copy_and_resolve_references()
        config.seed = seed
        experiment = prepare(config)
        params.append(trained(experiment, name))
    denoiser = denoisers.clipped(denoisers.denoiser(experiment.network, experiment.process))
    return Planner(denoiser, build(config.grid), experiment.shape, tuple(params))


def rollouts(
    policy: Policy, params: Sequence[Params], world: Environment, seeds: Sequence[int], episodes: int, steps: int
) -> Rollout:
    """`control.rollout` with the parameters of each seed, `[seeds, E, ...]`; all policies meet the same episodes.

    Parameters that were trained once act for all seeds.
    """
    run = jax.jit(lambda params, key: rollout(world, policy, params, key, episodes=episodes, steps=steps))
    params = tuple(params) * (len(seeds) // len(params))
    outcomes = [run(own, jax.random.key(seed)) for own, seed in zip(params, seeds, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outcomes)


def decisions(
    policies: Mapping[str, tuple[Policy, Params]], repeats: int, environments: int = 1
) -> dict[str, Decision]:
    """The median time of a decision in so many environments at once, while the policies take turns, and its cost."""
    key = jax.random.key(0)
    observation = {"observation": jnp.zeros((environments, 1, 8))}
    acts, carries, taken = {}, {}, {name: [] for name in policies}
    for name, (policy, params) in policies.items():
        acts[name] = jax.jit(policy.act)
        _, carries[name] = acts[name](params, jax.jit(policy.init)(params, observation, key), observation, key)
    before = {name: policy.cost(carries[name]).evaluations for name, (policy, _) in policies.items()}
    for _ in range(repeats):
        for name, (_, params) in policies.items():
            begun = time.perf_counter()
            _, carries[name] = jax.block_until_ready(acts[name](params, carries[name], observation, key))
            taken[name].append(time.perf_counter() - begun)
    spent = {name: policy.cost(carries[name]).evaluations - before[name] for name, (policy, _) in policies.items()}
    return {name: Decision(statistics.median(taken[name]), float(spent[name]) / repeats) for name in policies}
