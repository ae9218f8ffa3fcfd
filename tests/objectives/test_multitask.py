"""Tasks by intervals of t: their gradients are combined as the published rules say, inside the step, on any mesh."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import distributed, models, objectives, processes, timesteps, training
from diffusion_jax.errors import InvalidInput

KEY = jax.random.key(0)
EDGES = (0.0, 0.3, 0.7, 1.0)
NETWORK = models.mlp(width=8, depth=1)
FLOW = processes.rectified_flow()
X = jax.random.normal(jax.random.key(1), (24, 2))
BATCH = {"x0": X, "index": jnp.arange(24)}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: leaf + 0.1, NETWORK.init(KEY, X, jnp.zeros(24), None))


def plain(edges=EDGES):
    return objectives.denoising(NETWORK, FLOW, timesteps.by_cluster(edges))


def found(objective, params):
    return jax.jit(objective.gradient)(params, objective.init(KEY, params, BATCH), BATCH, KEY)


def expected(objective, params):
    return jax.jit(jax.value_and_grad(lambda p: objective.loss(p, (), BATCH, KEY)[0].mean()))(params)


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def drawn_gram(seed, count=4):
    g = np.random.default_rng(seed).standard_normal((count, 6))
    return jnp.asarray(g @ g.T, jnp.float32), g


def test_projection_is_that_of_the_vectors():
    """Against the rule on the vectors themselves, in the order that was drawn."""
    rule = jax.jit(objectives.projected().weights)
    for seed in range(4):
        gram, g = drawn_gram(seed)
        total = np.zeros(6)
        for i, key in enumerate(jax.random.split(KEY, 4)):
            made = g[i].copy()
            for j in np.asarray(jax.random.permutation(key, 4)):
                if j != i and (inner := made @ g[j]) < 0:
                    made -= inner / (g[j] @ g[j]) * g[j]
            total += made
        np.testing.assert_allclose(np.asarray(rule(gram, KEY)) @ g, total, rtol=1e-4, atol=1e-5)


def test_two_tasks_no_longer_conflict_and_those_that_agree_are_left_alone():
    g = np.array([[1.0, 0.0], [-1.0, 1.0]])
    weights = np.asarray(objectives.projected().weights(jnp.asarray(g @ g.T, jnp.float32), KEY))
    np.testing.assert_allclose(weights, [2.0, 1.5], rtol=1e-6)
    assert (g @ (weights @ g) >= -1e-6).all()
    np.testing.assert_array_equal(objectives.projected().weights(jnp.array([[1.0, 0.2], [0.2, 3.0]]), KEY), 1.0)


def test_bargains_solve_their_equation():
    solve = jax.jit(objectives.bargained().weights)
    for seed in range(4):
        gram, _ = drawn_gram(seed)
        gram = gram / jnp.linalg.norm(gram)
        a = solve(gram, KEY)
        np.testing.assert_allclose(gram @ a, 1 / a, rtol=1e-3)
        np.testing.assert_allclose(solve(7 * gram, KEY), a, rtol=1e-4)
    # Exactly opposed gradients, for which there is no bargain, have finite weights.
    assert np.isfinite(np.asarray(solve(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), KEY))).all()
    # Alone, a_i is M_ii^(-1/2); a task without a gradient is not in the bargain.
    a = solve(jnp.diag(jnp.array([4.0, 0.0, 9.0, 1.0])), KEY)
    norm = np.sqrt(4.0**2 + 9**2 + 1)
    np.testing.assert_allclose(a, [np.sqrt(norm / 4), 1.0, np.sqrt(norm / 9), np.sqrt(norm)], rtol=1e-4)


def test_one_task_is_the_plain_gradient_and_equal_weights_the_mean_of_the_tasks(params):
    loss, grads, _ = found(objectives.multitask(plain((0.0, 1.0)), (0.0, 1.0), objectives.projected()), params)
    close((loss, grads), expected(plain((0.0, 1.0)), params), rtol=1e-4, atol=1e-6)
    equal = objectives.Combiner(lambda gram, key: jnp.ones(len(gram)))
    loss, grads, aux = found(objectives.multitask(plain(), EDGES, equal), params)
    # Eight examples of each interval: the mean of the means is the mean.
    close((loss, grads), expected(plain(), params), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.mean([aux.metrics[f"task/{i}"] for i in range(3)]), loss, rtol=1e-6)


def test_between_solutions_weights_stay_and_the_gradient_is_theirs(params):
    objective = objectives.multitask(plain(), EDGES, objectives.bargained(every=2))
    run = jax.jit(objective.gradient)
    _, first, aux = run(params, objective.init(KEY, params, BATCH), BATCH, KEY)
    _, second, after = run(params, aux.state, BATCH, KEY)
    np.testing.assert_array_equal(after.state.weights, aux.state.weights)
    assert float(jnp.ptp(aux.state.weights)) > 0
    close(first, second, rtol=1e-4, atol=1e-5)


def test_uncertainty_is_the_sum_of_its_equation_with_every_gradient_alive(params):
    objective = objectives.uncertainty_weighted(plain(), EDGES)
    spread = jnp.array([0.5, -1.0, 0.2])
    whole = {"params": params, "log_variances": spread}
    state = objective.init(KEY, whole, BATCH)

    def mean(whole):
        losses, aux = objective.loss(whole, state, BATCH, KEY)
        return losses.mean(), aux

    (loss, aux), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(whole)
    tasks = np.array([aux.metrics[f"task/{i}"] for i in range(3)])
    np.testing.assert_allclose(loss, 0.5 * (np.exp(-spread) * tasks / 3 + spread).sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["log_variances"], 0.5 * (1 - np.exp(-spread) * tasks / 3), rtol=1e-5)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 0
    with pytest.raises(InvalidInput, match="log_variances"):
        objective.init(KEY, {"params": params, "log_variances": jnp.zeros(2)}, BATCH)


@pytest.mark.parametrize("combiner", [objectives.projected(), objectives.bargained()], ids=["projected", "bargained"])
def test_a_step_is_the_same_on_eight_devices(combiner, params):
    objective, optimizer = objectives.multitask(plain(), EDGES, combiner), training.optimizers.sgd(0.1)
    results = []
    for mesh in (None, distributed.make_mesh()):
        state = training.init_state(objective, optimizer, lambda key: params, BATCH, mesh=mesh)
        step = training.make_train_step(objective, optimizer, mesh)
        state, metrics = step(state, distributed.shard_batch(BATCH, mesh))
        results.append(jax.device_get((state.params, metrics)))
    close(*results, rtol=1e-4, atol=1e-5)


def test_with_equal_weights_a_step_in_parts_is_the_step_of_the_whole(params):
    """Each part of the batch has as many examples of each interval."""
    equal = objectives.Combiner(lambda gram, key: jnp.ones(len(gram)))
    objective, optimizer = objectives.multitask(plain(), EDGES, equal), training.optimizers.sgd(0.1)
    results = []
    for accumulate in (1, 4):
        state = training.init_state(objective, optimizer, lambda key: params, BATCH)
        state, metrics = training.make_train_step(objective, optimizer, accumulate=accumulate)(state, BATCH)
        results.append((state.params, [metrics[f"task/{i}"] for i in range(3)]))
    close(*results, rtol=1e-4, atol=1e-5)


def test_affinity_is_the_cosine_of_gradients(params):
    times = jnp.array([0.1, 0.12, 0.9])
    affinity = jax.jit(lambda params: objectives.task_affinity(plain(), params, BATCH, times, KEY))(params)
    np.testing.assert_allclose(np.diagonal(affinity), 1.0, rtol=1e-5)
    np.testing.assert_allclose(affinity, affinity.T, atol=1e-6)
    assert affinity[0, 1] > affinity[0, 2]

    @jax.jit
    def vector(t):
        pinned = {**BATCH, "t": jnp.full(24, t), "t_weight": jnp.ones(24)}
        grads = jax.grad(lambda p: plain().loss(p, (), pinned, KEY)[0].mean())(params)
        return jax.flatten_util.ravel_pytree(grads)[0]

    one, other = vector(0.1), vector(0.9)
    cosine = one @ other / jnp.linalg.norm(one) / jnp.linalg.norm(other)
    np.testing.assert_allclose(affinity[0, 2], cosine, atol=1e-4)
    assert objectives.conflicting_share(jnp.array([[1.0, -0.5], [-0.5, 1.0]])) == 1.0
    assert objectives.conflicting_share(affinity, below=-1.1) == 0.0


def test_what_would_lose_the_combination_is_told(params):
    combined = objectives.multitask(plain(), EDGES, objectives.projected())
    for wrap in (
        lambda: objectives.with_frozen(combined, {"params": params}, "lora"),
        lambda: objectives.trained_part(combined, params, lambda path: True),
        lambda: objectives.budgeted(combined, 0.5),
        lambda: objectives.multitask(combined, EDGES, objectives.projected()),
    ):
        with pytest.raises(InvalidInput, match="combine outside of it"):
            wrap()
    framewise = objectives.multitask(objectives.denoising(NETWORK, FLOW, t_shape=2), EDGES, objectives.projected())
    with pytest.raises(InvalidInput, match="one time an example"):
        framewise.gradient(params, framewise.init(KEY, params, BATCH), BATCH, KEY)
