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
from diffusion_jax.config import build
from diffusion_jax.experiment import Experiment, prepare
from diffusion_jax.recipes.frame import trained
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Denoiser, Params, Solver


def distilled(config: ConfigDict, base: Experiment, params: Params, name: str) -> Any:
    """The student's parameters: the base's, trained to answer with a sample at each time of `config.grid`.

    config: `base` and `student` (experiments), `grid`, `compared` (the draw of times at which scores are compared),
    `first` (see `answers`) and `seed`.
    """
    config.student.seed = config.seed
    own, denoiser = prepare(config.student), denoisers.denoiser(base.network, base.process)
    objective = objectives.distribution_matching(
        objectives.few_step_answers(denoiser, build(config.grid), config.first),
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


class Drawn(NamedTuple):
    """x: samples `[B, ...]`. predictions: of x0 by step, `[S, B, ...]`. evaluations: of a network, per sample."""

    x: Any
    predictions: Any
    evaluations: float


def relay(
    pair: tuple[Denoiser, Denoiser], solver: Solver | tuple[Solver, Solver], shape: tuple[int, ...]
) -> Callable[..., Drawn]:
    """`(key, (first params, second params), which [S], grid [S + 1], size, cond) -> Drawn`.

    At each step the denoiser of `pair` that the table names answers, see `timesteps.spliced`, and with two solvers each
    makes its own steps. shape: of one sample.
    """

    def run(key, params, which, grid, size, cond):
        switched = denoisers.recorded(denoisers.switched(pair, which), grid.shape[0] - 1)
        made = solvers.switched(solver, which) if not isinstance(solver, Solver) else solver
        result = sample(key, switched, params, made, grid, shape=(size, *shape), cond=cond)
        return result.x, result.run.carry.values, result.cost.evaluations

    compiled = jax.jit(run, static_argnums=4)

    def draw(key, params, which, grid, size, cond=None):
        x, predictions, evaluations = compiled(key, params, jnp.asarray(which), jnp.asarray(grid), size, cond)
        return Drawn(np.asarray(x), np.asarray(predictions), float(evaluations))

    return draw
