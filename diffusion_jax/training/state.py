"""Everything a training run is, as one pytree, and its creation straight onto the mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from diffusion_jax.distributed import Rules, init_sharded, shardings
from diffusion_jax.training import ema as averages
from diffusion_jax.training.frozen import without_frozen
from diffusion_jax.training.optimizers import Optimizer
from diffusion_jax.typing import Batch, Objective


class TrainState(NamedTuple):
    """What a checkpoint holds, besides the position in the data.

    step: batches consumed, skipped ones included; the run's randomness is a function of (seed, step, example).
    params, opt_state, objective_state: pytrees; what the objective holds `Frozen` is not in it (`frozen_trees`).
    ema: a pytree like `params` for each track.
    skipped: steps whose loss, gradient or update was not finite; they changed nothing but these counters.
    skipped_in_a_row: how many of them ended the run so far.
    """

    step: Int[Array, ""] | Any
    params: Any
    ema: Any
    opt_state: Any
    objective_state: Any
    skipped: Int[Array, ""] | Any
    skipped_in_a_row: Int[Array, ""] | Any


def make_init(
    objective: Objective,
    optimizer: optax.GradientTransformation | Optimizer,
    init_params: Callable[..., Any],
    batch: Batch,
    *,
    ema: Mapping[str, averages.Ema] | None = None,
    seed: int | Int[Array, ""] = 0,
) -> Callable[[], TrainState]:
    """A pure function without arguments that makes the initial state; `jax.eval_shape` of it is the abstract state.

    init_params: `key -> params`, or `(key, batch) -> params` closed over by the caller.
    batch: an example (arrays or their shapes), of which the objective sees zeros.
    seed: may be traced, as that of `make_train_step`: `vmap` over seeds trains several runs as one.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), batch)

    def initial() -> TrainState:
        params_key, objective_key = jax.random.split(jax.random.key(seed))
        params = init_params(params_key)
        example = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            ema=averages.init(ema or {}, params),
            opt_state=optimizer.init(params),
            objective_state=without_frozen(objective.init(objective_key, params, example)),
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
        )

    return initial


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation | Optimizer,
    init_params: Callable[..., Any],
    batch: Batch,
    *,
    ema: Mapping[str, averages.Ema] | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    seed: int = 0,
) -> TrainState:
    """The initial state, every tensor created under jit where the rules place it.

    Raises InvalidInput if a rule of `rules` does not divide a parameter.
    """
    initial = make_init(objective, optimizer, init_params, batch, ema=ema, seed=seed)
    if mesh is not None:
        shardings(jax.eval_shape(initial).params, mesh, rules, strict=True)
    return init_sharded(initial, mesh=mesh, rules=rules)
