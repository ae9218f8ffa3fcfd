"""Intervals of times as tasks of one network, whose losses or gradients are combined (Go et al. 2023, ANT).

With the clusters of `timesteps.interval_clusters` and the mean loss l_i of the examples of cluster i, each of k:

    uncertainty_weighted   sum_i 1/2 (exp(-s_i) l_i / k + s_i),  s learned too (Kendall et al. 2018)               (1)
    projected              gradients that conflict are projected on each other's normal planes (Yu et al. 2020)    (2)
    bargained              sum_i a_i g_i with M a = 1 / a, M the gradients' Gram matrix (Navon et al. 2022)        (3)

(2) and (3) need the inner products of the gradients g_i of l_i / k alone, and come to one weight a task: the update is
sum_j w_j g_j.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from diffusion_jax.errors import InvalidInput, invalid, need
from diffusion_jax.objectives.batches import batch_size, refuse_gradient
from diffusion_jax.randomness import fold
from diffusion_jax.timesteps import cluster_of
from diffusion_jax.timesteps.clusters import checked_edges
from diffusion_jax.typing import Aux, Number, Objective, Params

TINY = 1e-20
RIDGE = 1e-6


class Combiner(NamedTuple):
    """How the gradients of k tasks become one.

    weights: (Gram matrix [k, k], key) -> [k], how much each counts.
    every: after how many steps they are computed anew; between those, one backward pass is enough.
    """

    weights: Callable[[Any, Any], Any]
    every: int = 1


def projected() -> Combiner:
    """Equation (2): from g_i, for each other task j in a random order, what conflicts with g_j is taken away,

        <g, g_j> < 0:   g <- g - <g, g_j> / |g_j|^2 g_j,

    with g_j as it was. Gradients of which no two conflict are summed as they are.
    """

    def weights(gram, key):
        count = len(gram)

        def project(i, key):
            def against(made, j):
                inner = made @ gram[:, j]
                conflict = (inner < 0) & (j != i)
                change = jnp.where(conflict, -inner / jnp.maximum(gram[j, j], TINY), 0.0)
                return made.at[j].add(change), None

            order = jax.random.permutation(key, count)
            return jax.lax.scan(against, jax.nn.one_hot(i, count), order)[0]

        return jax.vmap(project)(jnp.arange(count), jax.random.split(key, count)).sum(axis=0)

    return Combiner(weights)


def bargained(every: int = 25, iterations: int = 30) -> Combiner:
    """Equation (3), Nash's bargain: `bargaining_weights` of M divided by its Frobenius norm, so that they do not depend
    on the scale of gradients. Its diagonal is raised by `RIDGE`, since gradients that are exactly opposed have no
    bargain. A task without a gradient has weight 1.

    Raises InvalidInput for numbers below 1. every: in losses, of which each part of an accumulated batch is one.
    """
    for name, value in (("every", every), ("iterations", iterations)):
        if not value >= 1:
            raise invalid(name, value, "it must be at least 1")

    def weights(gram, key):
        there = jnp.diagonal(gram) > TINY
        # What is not there is a task of its own with a solution of 1.
        gram = jnp.where(there[:, None] & there, gram / jnp.maximum(jnp.linalg.norm(gram), TINY), 0.0)
        return bargaining_weights(gram + jnp.diag(jnp.where(there, RIDGE, 1.0)), iterations)

    return Combiner(weights, every)


def bargaining_weights(gram: Float[Array, "k k"], iterations: int = 30) -> Float[Array, " k"]:
    """a > 0 with `M a = 1 / a`: the minimum of 1/2 a' M a - sum log a, by damped Newton steps, for a positive definite
    M. Of c M it is a / sqrt(c), and of a diagonal M it is M_ii^(-1/2)."""

    def step(a, _):
        slope = gram @ a - 1.0 / a
        move = jnp.linalg.solve(gram + jnp.diag(1.0 / jnp.square(a)), slope)
        # The function is self-concordant: such a step never leaves a > 0.
        return a - move / (1.0 + jnp.sqrt(jnp.maximum(slope @ move, 0.0))), None

    return jax.lax.scan(step, 1.0 / jnp.sqrt(jnp.diagonal(gram)), None, length=iterations)[0]


class MultiTask(NamedTuple):
    """inner: the state of the objective. weights: of the tasks, `[k]`. count: steps so far."""

    inner: Any
    weights: Float[Array, " k"]
    count: Any


def multitask(objective: Objective, edges: Any, combiner: Combiner) -> Objective:
    """`objective`, whose gradient is that of the intervals `edges [k + 1]` of times, combined.

    objective: of one time an example, as drawn by `timesteps.by_cluster(edges)`. One forward pass; k backward passes in
    the steps in which weights are computed, and k copies of the gradient then. The loss that is reported is the mean of
    l_i. k is the number of tasks of which the batch has examples: others, such as those that a curriculum leaves out,
    do not count. With gradient accumulation each part of the batch is combined by itself.

    Metrics: those of the objective, `task/i` (l_i), `weight/i`. Raises InvalidInput for an objective that has such a
    gradient already, and for times that are not one an example.
    """
    refuse_gradient(objective, "multitask")
    edges = checked_edges(edges)
    count = len(edges) - 1
    need("combiner", combiner, Combiner, "one such as projected() or bargained() is needed")

    def init(key, params, batch):
        return MultiTask(objective.init(key, params, batch), jnp.ones(count), jnp.int32(0))

    def loss(params, state, batch, key):
        losses, aux = objective.loss(params, state.inner, batch, key)
        return losses, aux._replace(state=MultiTask(aux.state, state.weights, state.count))

    def gradient(params, state, batch, key):
        def own(params):
            losses, aux = objective.loss(params, state.inner, batch, key)
            return losses.astype(jnp.float32), aux

        losses, pull, aux = jax.vjp(own, params, has_aux=True)
        shares = _shares(edges, _times(aux), count)
        # Tasks without examples do not count, such as those that a curriculum leaves out.
        present = jnp.maximum(shares.any(axis=1).sum(), 1)

        def anew():
            each = jax.lax.map(lambda share: pull(share / present)[0], shares)
            found = combiner.weights(_gram(each), fold(key, 3))
            return jax.tree.map(lambda leaf: jnp.tensordot(found.astype(leaf.dtype), leaf, axes=1), each), found

        def again():
            return pull(state.weights @ shares / present)[0], state.weights

        if combiner.every == 1:
            grads, weights = anew()
        else:
            grads, weights = jax.lax.cond(state.count % combiner.every == 0, anew, again)
        state = MultiTask(aux.state, weights, state.count + 1)
        tasks = shares @ losses
        return tasks.sum() / present, grads, aux._replace(state=state, metrics={**aux.metrics, **_told(tasks, weights)})

    prepare = objective.prepare
    return Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)), gradient)


def _times(aux: Aux) -> Any:
    t = aux.per_example.get("t")
    if t is None or jnp.ndim(t) != 1:
        told = "none" if t is None else jnp.shape(t)
        raise invalid("the recorded times of the objective", told, "one time an example, [B], is needed")
    return t


def _shares(edges, t, count):
    """`[k, B]`: 1 / (examples of cluster i) where an example is one of them; the rows of empty clusters are 0."""
    members = jax.nn.one_hot(cluster_of(edges, t), count, axis=0)
    return members / jnp.maximum(members.sum(axis=1, keepdims=True), 1.0)


def _told(tasks, weights):
    return {
        f"{name}/{i}": values[i] for name, values in (("task", tasks), ("weight", weights)) for i in range(len(tasks))
    }


def _gram(each: Any) -> Float[Array, "k k"]:
    """Inner products of k gradients, whose leaves are `[k, ...]`."""
    total: Any = jnp.float32(0)
    for leaf in jax.tree.leaves(each):
        axes = tuple(range(1, leaf.ndim))
        leaf = leaf.astype(jnp.float32)
        # In full precision, or gradients that nearly agree make a matrix that is not positive definite.
        total = total + jnp.tensordot(leaf, leaf, axes=(axes, axes), precision="highest")
    return total


class Uncertainty(NamedTuple):
    """inner: the state of the objective. log_variances: s of equation (1), `[k]`. moments: those of its Adam."""

    inner: Any
    log_variances: Float[Array, " k"]
    moments: Any


def uncertainty_weighted(
    objective: Objective, edges: Any, learning_rate: float = 0.025, bound: float | None = None
) -> Objective:
    """Equation (1). s begins with 0, is kept in the state of the objective, and learns there by an Adam of its own, so
    the parameters remain those of the network.

    objective: of one time an example, as drawn by `timesteps.by_cluster(edges)`. learning_rate: of s; the published one
        is 250 times that of the network. With gradient accumulation s learns from each part of the batch.
    bound: the largest |s|. Where a loss comes near 0, as at high noise in few dimensions, its weight grows without one.

    At rest exp(-s_i) l_i / k = 1: all tasks weigh the same. Metrics: those of the objective, `task/i` (l_i), `weight/i`
    (exp(-s_i) / 2). Raises InvalidInput for a rate or a bound that is not positive.
    """
    refuse_gradient(objective, "uncertainty_weighted")
    for name, value in (("learning_rate", learning_rate), ("bound", 1.0 if bound is None else bound)):
        if not value > 0:
            raise invalid(name, value, "it must be positive")
    edges = checked_edges(edges)
    count, optimizer = len(edges) - 1, optax.adam(learning_rate)

    def init(key, params, batch):
        spread = jnp.zeros(count)
        return Uncertainty(objective.init(key, params, batch), spread, optimizer.init(spread))

    def loss(params, state, batch, key):
        losses, aux = objective.loss(params, state.inner, batch, key)
        shares, spread = _shares(edges, _times(aux), count), state.log_variances
        weights = 0.5 * jnp.exp(-spread)
        # The mean over the batch is the sum of equation (1).
        total = batch_size(batch) / count * (weights @ shares) * losses + 0.5 * spread.sum()
        tasks = shares @ jax.lax.stop_gradient(losses)
        # A task without examples has nothing to learn from.
        slope = jnp.where(shares.any(axis=1), 0.5 - weights * tasks / count, 0.0)
        move, moments = optimizer.update(slope, state.moments)
        spread = spread + jnp.asarray(move)
        spread = spread if bound is None else jnp.clip(spread, -bound, bound)
        state = Uncertainty(aux.state, spread, moments)
        return total, aux._replace(state=state, metrics={**aux.metrics, **_told(tasks, weights)})

    prepare = objective.prepare
    return Objective(init, loss, prepare and (lambda state, batch, key: prepare(state.inner, batch, key)))


def task_affinity(
    objective: Objective, params: Params, batch: Any, times: Float[np.ndarray | Array, " n"], key: Any
) -> Float[Array, "n n"]:
    """Cosines of the gradients at fixed times, `[n, n]`: which noise levels agree (Go et al. 2023, figure 2).

    batch: examples of the data; all are asked at each time with the same noise. It holds n gradients at once: average
    over several batches, and choose few times for a large network. `timesteps.affinity_distance` cuts by it.
    """
    asked = np.asarray(times, np.float64)
    if asked.ndim != 1 or not asked.size or not ((asked >= 0) & (asked <= 1)).all():
        raise invalid("times", asked.tolist(), "times in [0, 1], [n], are needed")
    state = objective.init(key, params, batch)
    size = batch_size(batch)

    def at(t):
        pinned = {**batch, "t": jnp.full(size, t), "t_weight": jnp.ones(size)}
        return jax.grad(lambda params: objective.loss(params, state, pinned, key)[0].mean())(params)

    gram = _gram(jax.lax.map(at, jnp.asarray(times, jnp.float32)))
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), TINY))
    return gram / norms[:, None] / norms


def conflicting_share(affinity: Float[np.ndarray | Array, "n n"], below: Number = 0.0) -> Float[Array, ""]:
    """The share of pairs of different tasks whose gradients have a cosine under `below`."""
    count = len(affinity)
    if count < 2:
        raise InvalidInput("One task has nobody to disagree with: two times at least are needed.")
    others = 1.0 - jnp.eye(count)
    return ((affinity < below) * others).sum() / others.sum()


def affinity_by_lag(affinity: Float[np.ndarray | Array, "n n"]) -> Float[Array, " n-1"]:
    """The mean cosine of tasks that are 1, 2, ..., n - 1 apart: it falls where neighbouring noise levels agree most."""
    count = len(affinity)
    if count < 2:
        raise InvalidInput("One task has nobody to disagree with: two times at least are needed.")
    affinity = jnp.asarray(affinity)
    return jnp.stack([jnp.diagonal(affinity, lag).mean() for lag in range(1, count)])
