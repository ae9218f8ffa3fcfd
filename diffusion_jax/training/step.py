"""One training step: loss, gradient, update, averages; jitted, the state's buffers donated except on CPUs.

The step is a function of (state, batch) alone. Its randomness is `fold_in(key(seed), step)`, into which objectives
fold the index of each example, so a run can be cut, resumed, spread and accumulated without a change.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from diffusion_jax.distributed import BATCH_AXES, Rules, automatic, check_batch, constrain
from diffusion_jax.errors import invalid
from diffusion_jax.training import ema as averages
from diffusion_jax.training.by_time import means_by_time, sums_by_time
from diffusion_jax.training.frozen import complete_state, frozen_trees, without_frozen
from diffusion_jax.training.optimizers import Optimizer
from diffusion_jax.training.state import TrainState
from diffusion_jax.typing import Objective


class TrainStep:
    """The jitted `(state, batch) -> (state, metrics)` of `make_train_step`.

    frozen: the trees that the objective holds `Frozen`, by their path in its state; found and laid out when first
        called, and an argument of the program like the state.
    """

    def __init__(
        self, program: Callable[..., Any], objective: Objective, mesh: Mesh | None, rules: Rules | None, seed: Any
    ):
        self._program, self._objective, self._mesh, self._rules = program, objective, mesh, rules
        # An argument of the program, so runs that differ in their seed alone share what is compiled. `jax.random.key`
        # reads a Python number as this int64 too.
        self._seed = np.int64(seed) if isinstance(seed, int) else seed
        self._frozen: dict[str, Any] | None = None

    def frozen(self, state: TrainState, batch: Any) -> dict[str, Any]:
        if self._frozen is None:
            self._frozen = frozen_trees(self._objective, state.params, batch, self._mesh, self._rules)
        return self._frozen

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        return self._program(*self.arguments(state, batch))

    def arguments(self, state: Any, batch: Any) -> tuple[Any, ...]:
        """What the program is called with: state, batch, frozen trees and seed."""
        return state, batch, self.frozen(state, batch), self._seed

    def programs(self) -> int:
        """How many programs were compiled: one for each shape of the batch."""
        return self._program._cache_size()

    def lower(self, state: Any, batch: Any) -> Any:
        """The program for arrays or shapes, lowered but not compiled."""
        return self._program.lower(*self.arguments(state, batch))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation | Optimizer,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    *,
    ema: Mapping[str, averages.Ema] | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    seed: int | Int[Array, ""] = 0,
) -> TrainStep:
    """The jitted `(state, batch) -> (state, metrics)`; the given state's buffers are consumed, except on CPUs.

    The loss is the mean over the batch. A step after which the loss or the norm of the gradient, of the update or of
    the parameters is not finite leaves parameters, averages, optimiser and objective untouched and is counted. (The
    training loop looks at moments and averages, see `finite`.)

    accumulate: into how many parts the batch is cut; their gradients are averaged, so the step equals the whole
        batch's to rounding for every objective whose loss is a sum over examples.
    clip_norm: largest global norm of the gradient; None does not clip.

    Metrics: `loss`, `grad_norm` (before clipping), `update_norm`, `param_norm`, `skipped`, `skipped_in_a_row`,
    `learning_rate` where the optimiser knows it, the objective's own, and the loss by bins of t (`by_time`).

    Raises InvalidInput, when first called, if the batch does not divide by accumulate x data x fsdp.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise invalid("accumulate", accumulate, "it must be a whole number of at least 1")
    if clip_norm is not None and not clip_norm > 0:
        raise invalid("clip_norm", clip_norm, "it must be positive, or None for no clipping")
    tracks = dict(ema or {})

    def mean_loss(params, state, frozen, batch, key):
        loss, aux = objective.loss(params, complete_state(state, frozen), batch, key)
        return jnp.mean(loss.astype(jnp.float32)), aux._replace(state=without_frozen(aux.state))

    def gradient(params, state, frozen, batch, key):
        if objective.gradient is not None:
            loss, grads, aux = objective.gradient(params, complete_state(state, frozen), batch, key)
            return loss, grads, without_frozen(aux.state), (dict(aux.metrics), sums_by_time(aux.per_example))
        (loss, aux), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, state, frozen, batch, key)
        return loss, grads, aux.state, (dict(aux.metrics), sums_by_time(aux.per_example))

    def accumulated(params, state, frozen, batch, key):
        if accumulate == 1:
            return gradient(params, state, frozen, batch, key)
        parts = jax.tree.map(lambda leaf: _cut(leaf, accumulate, mesh), batch)

        def body(carry, part):
            grads, state = carry
            loss, new, state, metrics = gradient(params, state, frozen, part, key)
            return (jax.tree.map(jnp.add, grads, new), state), (loss, metrics)

        zeros = jax.tree.map(jnp.zeros_like, params)
        (grads, state), (losses, metrics) = jax.lax.scan(body, (zeros, state), parts)
        grads = jax.tree.map(lambda leaf: leaf / accumulate, grads)
        return jnp.mean(losses), grads, state, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), metrics)

    def step(state: TrainState, batch: Any, frozen: dict[str, Any], seed: Any) -> tuple[TrainState, dict[str, Any]]:
        size = jax.tree.leaves(batch)[0].shape[0]
        check_batch(size, mesh, accumulate)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if objective.prepare is not None:
            batch = objective.prepare(complete_state(state.objective_state, frozen), batch, key)
        loss, grads, objective_state, (metrics, sums) = accumulated(
            state.params, state.objective_state, frozen, batch, key
        )
        grads = constrain(grads, mesh, rules)
        norm = optax.tree.norm(grads)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            grads = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        applied = state.step - state.skipped
        moved = (
            params,
            averages.update(tracks, state.ema, params, applied + 1),
            opt_state,
            objective_state,
        )
        kept = (state.params, state.ema, state.opt_state, state.objective_state)
        # The norms are metrics anyway, so this costs no further pass.
        norms = {"grad_norm": norm, "update_norm": optax.tree.norm(updates), "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([loss, *(value.astype(jnp.float32) for value in norms.values())])).all()
        params, ema_state, opt_state, objective_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), moved, kept
        )
        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema=ema_state,
            opt_state=opt_state,
            objective_state=objective_state,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        metrics = {
            **metrics,
            **means_by_time(sums),
            **norms,
            "loss": loss,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        if isinstance(optimizer, Optimizer):
            metrics["learning_rate"] = jnp.asarray(optimizer.learning_rate(applied), jnp.float32)
        return constrain(new_state, mesh, rules), metrics

    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    # On CPUs an update in place saves no time (19.3 against 19.5 ms on a transformer of 4 blocks), and a given state
    # that stays usable is worth its memory there.
    program = jax.jit(step, donate_argnums=() if platform == "cpu" else 0)
    return TrainStep(program, objective, mesh, rules, seed)


def _cut(leaf: Any, parts: int, mesh: Mesh | None) -> Any:
    """`[B, ...] -> [parts, B / parts, ...]`; part a holds the examples a, a + parts, ..., so no device sends any."""
    leaf = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
    if mesh is None:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(automatic(mesh), PartitionSpec(None, BATCH_AXES)))
