"""Acting with a diffusion model of actions: ways to decide, episodes of each seed, and what a decision costs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, solvers
from diffusion_jax.config import build
from diffusion_jax.data import tabletop
from diffusion_jax.errors import invalid
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes.frame import trained
from diffusion_jax.sampling import sample
from diffusion_jax.streaming import rolling
from diffusion_jax.typing import Cost, Denoiser, Params


class Planner(NamedTuple):
    """A trained model of plans of actions `[E, entries, 2]` given what was observed, and the parameters of each seed.

    grid: `[N + 1]`, on which plans are denoised.
    """

    denoiser: Denoiser
    grid: Any
    entries: int
    params: tuple[Params, ...]

    @property
    def steps(self) -> int:
        """N."""
        return len(self.grid) - 1


class ActingArm(NamedTuple):
    """A way to act. policy: params -> `tabletop.Policy`. cost: the policy's carry -> what it has spent so far."""

    planner: Planner
    policy: Callable[[Any], tabletop.Policy]
    cost: Callable[[Any], Cost]


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
    return Planner(denoiser, build(config.grid), experiment.shape[0], tuple(params))


def replanned(planner: Planner, chunk: int, steps: int | None = None) -> ActingArm:
    """Diffusion Policy (Chi et al. 2023): each decision denoises a new plan by DDIM and executes its first chunk.

    steps: of the grid's N, all when None; they must divide N.
    """
    steps = planner.steps if steps is None else steps
    if not 1 <= steps <= planner.steps or planner.steps % steps:
        raise invalid("steps", steps, f"a divisor of the grid's {planner.steps} steps is needed")
    grid = planner.grid[:: planner.steps // steps]

    def policy(params):
        def init(observation, keys):
            return Cost(jnp.float32(0), jnp.float32(0))

        def act(cost, observation, keys):
            plan = whole_plan(planner, params, observation, keys, grid)
            return plan.x[:, :chunk], cost + plan.cost

        return tabletop.Policy(init, act)

    return ActingArm(planner, policy, lambda cost: cost)


def whole_plan(planner: Planner, params: Any, observation: Any, keys: Any, grid: Any) -> Any:
    """The `Samples` of a plan for each environment. Row i is a function of the first key and i, as policies need it."""
    shape = (len(keys), planner.entries, 2)
    return sample(keys[0], planner.denoiser, params, solvers.ddim(), grid, shape=shape, cond=observation)


def streamed(planner: Planner, chunk: int, primer: str = "zero") -> ActingArm:
    """SDP (Høeg et al. 2024): each decision advances a buffer until its first chunk is clean, and executes that.

    primer: what the buffer is begun with, noised to its levels: "zero", or "denoise", a whole plan.
    """
    if primer not in ("zero", "denoise"):
        raise invalid("primer", primer, "'zero' or 'denoise' was expected")
    buffer = rolling(planner.denoiser, solvers.ddim(), planner.grid, entries=planner.entries, chunk=chunk)

    def policy(params):
        def init(observation, keys):
            if primer == "denoise":
                return buffer.prime(keys[0], whole_plan(planner, params, observation, keys, planner.grid).x)
            return buffer.prime(keys[0], jnp.zeros((len(keys), planner.entries, 2)))

        def act(stream, observation, keys):
            stream, actions = buffer.advance(params, stream, observation)
            return actions, stream

        return tabletop.Policy(init, act)

    return ActingArm(planner, policy, lambda stream: stream.run.cost)


def rollouts(
    arm: ActingArm, world: tabletop.Tabletop, seeds: Sequence[int], episodes: int, **options
) -> tabletop.Outcome:
    """`tabletop.rollout` with the parameters of each seed, `[seeds, E, ...]`; all arms meet the same episodes.

    A planner that was trained once acts for all seeds.
    """
    run = jax.jit(lambda params, key: tabletop.rollout(world, arm.policy(params), key, episodes, **options))
    params = arm.planner.params * (len(seeds) // len(arm.planner.params))
    outcomes = [run(own, jax.random.key(seed)) for own, seed in zip(params, seeds, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outcomes)


def decisions(arms: Mapping[str, ActingArm], repeats: int, environments: int = 1) -> dict[str, Decision]:
    """The median time of a decision in so many environments at once, while the arms take turns, and its cost."""
    keys = jax.random.split(jax.random.key(0), environments)
    observation = {"observation": jnp.zeros((environments, 1, 8))}
    acts, carries, taken = {}, {}, {name: [] for name in arms}
    for name, arm in arms.items():
        policy = arm.policy(arm.planner.params[0])
        acts[name] = jax.jit(policy.act)
        _, carries[name] = acts[name](jax.jit(policy.init)(observation, keys), observation, keys)
    before = {name: arm.cost(carries[name]).evaluations for name, arm in arms.items()}
    for _ in range(repeats):
        for name in arms:
            begun = time.perf_counter()
            _, carries[name] = jax.block_until_ready(acts[name](carries[name], observation, keys))
            taken[name].append(time.perf_counter() - begun)
    after = {name: arm.cost(carries[name]).evaluations for name, arm in arms.items()}
    return {
        name: Decision(statistics.median(taken[name]), float(after[name] - before[name]) / repeats) for name in arms
    }
