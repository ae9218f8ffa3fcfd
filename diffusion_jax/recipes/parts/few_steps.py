"""A few-step student of a many-step base, and runs that begin with the one and end with the other.

The student is distilled by distribution matching (Yin et al. 2024): at each time of its short grid it answers with a
sample, not with a mean. Which of two models answers at a step is a table (`denoisers.switched`), so every run here is
one scan, and the noise of a step is the same whoever answers in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, objectives, solvers
from diffusion_jax.clock import clock, num_steps
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.objectives.batches import example_keys
from diffusion_jax.randomness import split
from diffusion_jax.recipes.frame import trained
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Grid, Params, Solver


def answers(denoiser: Denoiser, grid: Grid, first: float = 0.5) -> Callable[..., Any]:
    """`generate` of `objectives.distribution_matching`: what the student answers at one random step of its grid.

    It sees data that are noised to the time of that step, and pure noise in the first one, where runs begin. The step
    is shared by the batch. first: how often it is the first one, which has the most to learn; the others are equal.
    """
    grid = jnp.asarray(grid)
    steps = num_steps(grid)
    shares = jnp.asarray([first] + [(1.0 - first) / (steps - 1)] * (steps - 1))

    def generate(params, batch, key):
        step_key, noise_key = split(key, 2)
        index = jax.random.choice(step_key, steps, p=shares)
        x0, t = batch["x0"], grid[index]
        x, noise = denoiser.process.corrupt(example_keys(noise_key, batch["index"]), x0, t)
        x = jnp.where(index == 0, noise, x)
        step, cond = clock(grid).step(index), batch.get("cond")
        return denoiser.apply(params, denoiser.init(params, x, cond), x, step, cond)[0].x0

    return generate


def distilled(config: ConfigDict, base: Experiment, params: Params, name: str) -> Any:
    """The student's parameters: the base's, trained to answer with a sample at each time of `config.grid`.

    config: `base` and `student` (experiments), `grid`, `compared` (the draw of times at which scores are compared),
    `first` (see `answers`) and `seed`.
    """
    config.student.seed = config.seed
    own, denoiser = prepare(config.student), denoisers.denoiser(base.network, base.process)
    objective = objectives.distribution_matching(
        answers(denoiser, build(config.grid), config.first),
        denoiser,
        params,
        base.network,
        draw=build(config.compared),
        every=config.student.optimizer.every.student,
    )
    given = [config.base.to_dict(), config.grid.to_dict(), config.compared.to_dict(), config.first]
    start = {"student": params, "fake": params}
    experiment = own._replace(objective=objective)
    return trained(experiment, name, init_params=lambda key: start, given=given)["student"]


def flow_map(denoiser: Denoiser, steps: int = 32) -> Denoiser:
    """The ideal consistency model: answers at (x, t) with where DDIM of `denoiser` takes x in `steps` steps from t."""

    def apply(params, carry, x, step, cond):
        t = jnp.asarray(step.t)
        grid = jnp.linspace(1.0, 0.0, steps + 1).reshape(-1, *(1,) * t.ndim) * t
        run = sample(jax.random.key(0), denoiser, params, solvers.ddim(), grid, x_init=x, cond=cond)
        return denoiser.process.from_x0(run.x, x, t)._replace(cost=run.cost), carry

    return Denoiser(lambda params, x, cond: (), apply, denoiser.process)


class Drawn(NamedTuple):
    """x: samples `[B, ...]`. predictions: of x0 by step, `[S, B, ...]`. evaluations: of a network, per sample."""

    x: Any
    predictions: Any
    evaluations: float


def relay(
    pair: tuple[Denoiser, Denoiser], solver: Solver, shape: tuple[int, ...], jit: Callable[..., Any] = jax.jit
) -> Callable[..., Drawn]:
    """`(key, (first params, second params), which [S], grid [S + 1], size, cond) -> Drawn`.

    At each step the denoiser of `pair` that the table names answers, see `timesteps.spliced`. shape: of one sample.
    One program, compiled by `jit`, serves all tables and grids of a length, and all parameters.
    """

    def run(key, params, which, grid, size, cond):
        switched = denoisers.recorded(denoisers.switched(pair, which), grid.shape[0] - 1)
        result = sample(key, switched, params, solver, grid, shape=(size, *shape), cond=cond)
        return result.x, result.run.carry.values, result.cost.evaluations

    compiled = jit(run, static_argnums=4)

    def draw(key, params, which, grid, size, cond=None):
        x, predictions, evaluations = compiled(key, params, jnp.asarray(which), jnp.asarray(grid), size, cond)
        return Drawn(np.asarray(x), np.asarray(predictions), float(evaluations))

    return draw


def handed_over(
    pair: tuple[Denoiser, Denoiser], both: tuple[Solver, Solver], shape: tuple[int, ...]
) -> Callable[..., Drawn]:
    """`(key, (first params, second params), Spliced, size, cond) -> Drawn`: `relay` in two segments.

    Each denoiser runs on its part of the grid by a solver of its own, whose history begins anew.
    """

    def run(key, params, grid, stop, size, cond):
        first, second = (denoisers.recorded(one, grid.shape[0] - 1) for one in pair)
        begun = sample(key, first, params[0], both[0], grid, shape=(size, *shape), cond=cond, stop=stop).run
        handed = begun._replace(state=None, carry=None)
        ended = sample(key, second, params[1], both[1], grid, resume=handed, cond=cond, start=stop).run
        # Each segment leaves the places of the other at zero.
        return ended.x, begun.carry.values + ended.carry.values, ended.cost.evaluations

    compiled = jax.jit(run, static_argnums=(3, 4))

    def draw(key, params, spliced, size, cond=None):
        x, predictions, evaluations = compiled(key, params, spliced.grid, spliced.stop, size, cond)
        return Drawn(np.asarray(x), np.asarray(predictions), float(evaluations))

    return draw


def undecided(drawn: Drawn) -> list[float]:
    """`|x0_t - x| / |x|` by step, the mean over samples: how far predictions are from the sample that they become."""
    final = drawn.x.reshape(len(drawn.x), -1)
    said = drawn.predictions.reshape(*drawn.predictions.shape[:2], -1)
    distances = np.linalg.norm(said - final, axis=-1) / np.linalg.norm(final, axis=-1)
    return [float(value) for value in distances.mean(axis=1)]
