"""Tasks by intervals of t: their gradients are combined as the published rules say, inside the step, on any mesh."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, distributed, models, objectives, processes, timesteps, training
from diffusion_jax.errors import InvalidInput

KEY = jax.random.key(0)
EDGES = (0.0, 0.3, 0.7, 1.0)
NETWORK = models.mlp(width=8, depth=1, scan=False)
FLOW = processes.rectified_flow()
X = jax.device_put(np.random.default_rng(1).standard_normal((24, 2)).astype(np.float32))
BATCH = {"x0": X, "index": jnp.arange(24)}


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: jax.tree.map(lambda leaf: leaf + 0.1, NETWORK.init(KEY, X, jnp.zeros(24), None)))()


def plain(edges=EDGES, weight=None):
    return objectives.denoising(NETWORK, FLOW, timesteps.by_cluster(edges), weight)


EQUAL = objectives.Combiner(lambda gram, key: jnp.ones(len(gram)))


def found(objective, params):
    return jax.jit(objective.gradient)(params, objective.init(KEY, params, BATCH), BATCH, KEY)


def expected(objective, params):
    return jax.jit(jax.value_and_grad(lambda p: objective.loss(p, (), BATCH, KEY)[0].mean()))(params)


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def drawn_gram(seed, count=4):
    g = np.random.default_rng(seed).standard_normal((count, 6))
    return (g @ g.T).astype(np.float32), g


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
    rule = jax.jit(objectives.projected().weights)
    weights = np.asarray(rule((g @ g.T).astype(np.float32), KEY))
    np.testing.assert_allclose(weights, [2.0, 1.5], rtol=1e-6)
    assert (g @ (weights @ g) >= -1e-6).all()
    # Those that agree, or are at right angles, bit for bit.
    for gram in ([[1.0, 0.2], [0.2, 3.0]], [[0.7, 0.0], [0.0, 0.3]]):
        np.testing.assert_array_equal(rule(np.array(gram, np.float32), KEY), 1.0)


def test_bargains_solve_their_equation():
    solve, rule = jax.jit(objectives.bargaining_weights), jax.jit(objectives.bargained().weights)
    for seed in range(4):
        gram, _ = drawn_gram(seed)
        gram = gram / np.linalg.norm(gram) + np.float32(0.1) * np.eye(4, dtype=np.float32)
        a = np.asarray(solve(gram))
        assert np.linalg.norm(gram @ a - 1 / a) < 1e-5 and a.min() > 0
        np.testing.assert_allclose(solve(7 * gram), a / np.sqrt(7), rtol=1e-5)
        # Inside a step gradients have no scale.
        np.testing.assert_allclose(rule(7 * gram, KEY), solve(gram / np.linalg.norm(gram)), rtol=1e-4)
    np.testing.assert_allclose(solve(np.diag(np.float32([4.0, 9.0, 1.0, 0.25]))), [1 / 2, 1 / 3, 1, 2], rtol=1e-5)
    # Exactly opposed gradients, for which there is no bargain, have finite weights.
    assert np.isfinite(np.asarray(rule(np.float32([[1.0, -1.0], [-1.0, 1.0]]), KEY))).all()
    # A task without a gradient is not in the bargain.
    a = rule(np.diag(np.float32([4.0, 0.0, 9.0, 1.0])), KEY)
    norm = np.sqrt(4.0**2 + 9**2 + 1)
    np.testing.assert_allclose(a, [np.sqrt(norm / 4), 1.0, np.sqrt(norm / 9), np.sqrt(norm)], rtol=1e-4)


@pytest.mark.parametrize("combiner", [objectives.projected(), objectives.bargained()], ids=["projected", "bargained"])
def test_one_task_is_the_plain_gradient(combiner, params):
    loss, grads, _ = found(objectives.multitask(plain((0.0, 1.0)), (0.0, 1.0), combiner), params)
    close((loss, grads), expected(plain((0.0, 1.0)), params), rtol=1e-4, atol=1e-6)


def test_equal_weights_are_the_mean_of_the_tasks_with_any_weight_of_times(params):
    weighted = plain(weight=timesteps.min_snr_weight())
    loss, grads, aux = found(objectives.multitask(weighted, EDGES, EQUAL), params)
    # Eight examples of each interval: the mean of the means is the mean.
    close((loss, grads), expected(weighted, params), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.mean([aux.metrics[f"task/{i}"] for i in range(3)]), loss, rtol=1e-6)


def test_between_solutions_weights_stay_and_the_gradient_is_theirs(params):
    objective = objectives.multitask(plain(), EDGES, objectives.bargained(every=2))
    run = jax.jit(objective.gradient)
    _, first, aux = run(params, objective.init(KEY, params, BATCH), BATCH, KEY)
    _, second, after = run(params, aux.state, BATCH, KEY)
    np.testing.assert_array_equal(after.state.weights, aux.state.weights)
    assert float(jnp.ptp(aux.state.weights)) > 0
    close(first, second, rtol=1e-4, atol=1e-5)


def test_what_a_combiner_draws_is_new_in_each_step_and_is_told(params):
    """The order in which gradients are projected is random."""
    objective = objectives.multitask(
        plain(), EDGES, objectives.Combiner(lambda gram, key: jax.random.uniform(key, (3,)))
    )
    state = objective.init(KEY, params, BATCH)
    run = jax.jit(lambda key: objective.gradient(params, state, BATCH, key)[2])
    first, second = (jax.device_get(run(key)) for key in jax.random.split(KEY))
    assert (first.state.weights != second.state.weights).all()
    np.testing.assert_array_equal([first.metrics[f"weight/{i}"] for i in range(3)], first.state.weights)


def test_uncertainty_is_the_sum_of_its_equation_and_moves_towards_equal_losses(params):
    objective = objectives.uncertainty_weighted(plain(), EDGES, learning_rate=0.1)
    spread = np.float32([0.5, -1.0, 0.2])
    begun = objective.init(KEY, params, BATCH)._replace(log_variances=spread)

    def mean(params, spread):
        losses, aux = objective.loss(params, begun._replace(log_variances=spread), BATCH, KEY)
        return losses.mean(), aux

    whole = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))
    (loss, aux), (grads, slope) = jax.device_get(whole(params, spread))
    tasks = np.array([aux.metrics[f"task/{i}"] for i in range(3)])
    np.testing.assert_allclose(loss, 0.5 * (np.exp(-spread) * tasks / 3 + spread).sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, 0.5 * (1 - np.exp(-spread) * tasks / 3), rtol=1e-5)
    # The first step of Adam is its rate, down the slope.
    np.testing.assert_allclose(aux.state.log_variances, spread - 0.1 * np.sign(slope), rtol=1e-4)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 0
    # With s = 0 it is half of the plain loss, where intervals have as many examples.
    (_, aux), (grads, _) = jax.device_get(whole(params, np.zeros(3, np.float32)))
    close(jax.tree.map(lambda leaf: 2 * leaf, grads), expected(plain(), params)[1], rtol=1e-4, atol=1e-6)


def test_uncertainty_of_a_network_that_stays_comes_to_rest_at_the_logarithms_of_its_losses(params):
    """What is seen is one batch at fixed times, so losses are the same in each step."""
    t = timesteps.by_cluster(EDGES).draw((), KEY, (24,))[0]
    seen = {**BATCH, "t": t, "t_weight": jnp.ones(24)}

    def rested(**settings):
        objective = objectives.uncertainty_weighted(plain(), EDGES, learning_rate=0.05, **settings)

        def body(state, _):
            aux = objective.loss(params, state, seen, KEY)[1]
            return aux.state, jnp.stack([aux.metrics[f"task/{i}"] for i in range(3)])

        return jax.jit(lambda: jax.lax.scan(body, objective.init(KEY, params, seen), length=600))()

    state, tasks = rested()
    np.testing.assert_allclose(state.log_variances, np.log(tasks[-1] / 3), atol=2e-3)
    bounded, _ = rested(bound=0.1)
    np.testing.assert_allclose(np.abs(bounded.log_variances), 0.1, rtol=1e-5)
    with pytest.raises(InvalidInput, match="bound"):
        rested(bound=-1.0)


OBJECTIVES = {
    "projected": lambda: objectives.multitask(plain(), EDGES, objectives.projected()),
    "bargained": lambda: objectives.multitask(plain(), EDGES, objectives.bargained()),
    "uncertainty": lambda: objectives.uncertainty_weighted(plain(), EDGES),
}


@pytest.mark.parametrize(("name", "accumulate"), [("projected", 3), ("bargained", 1), ("uncertainty", 1)])
def test_a_step_is_the_same_on_eight_devices(name, accumulate, params):
    objective, optimizer = OBJECTIVES[name](), training.optimizers.sgd(0.1)
    results = []
    for mesh in (None, distributed.make_mesh()):
        state = training.init_state(objective, optimizer, lambda key: params, BATCH, mesh=mesh)
        step = training.make_train_step(objective, optimizer, mesh, accumulate=accumulate)
        state, metrics = step(state, distributed.shard_batch(BATCH, mesh))
        results.append(jax.device_get((state.params, state.objective_state, metrics)))
    close(*results, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_with_the_weights_that_it_had(params, tmp_path):
    """Log-variances and their moments are in the checkpoint."""
    mesh, source = distributed.make_mesh(devices=1), data.ArraySource(np.asarray(X))

    def run(workdir, steps):
        told = {"init_params": lambda key: params, "workdir": workdir, "mesh": mesh, "log_to": ("jsonl",)}
        batches = data.pipeline(source, 12, seed=0)
        return training.train(
            OBJECTIVES["uncertainty"](), training.optimizers.sgd(0.1), batches, steps=steps, progress=False, **told
        )

    run(tmp_path / "a", 2)
    resumed, whole = run(tmp_path / "a", 4), run(tmp_path / "b", 4)
    jax.tree.map(np.testing.assert_array_equal, *((s.params, s.objective_state) for s in (resumed, whole)))
    assert float(jnp.abs(whole.objective_state.log_variances).min()) > 0


def test_with_equal_weights_a_step_in_parts_is_the_step_of_the_whole(params):
    """Each part of the batch has as many examples of each interval."""
    objective, optimizer = objectives.multitask(plain(), EDGES, EQUAL), training.optimizers.sgd(0.1)
    results = []
    for accumulate in (1, 4):
        state = training.init_state(objective, optimizer, lambda key: params, BATCH)
        state, metrics = training.make_train_step(objective, optimizer, accumulate=accumulate)(state, BATCH)
        results.append((state.params, [metrics[f"task/{i}"] for i in range(3)]))
    close(*results, rtol=1e-4, atol=1e-5)


def test_affinity_is_the_cosine_of_gradients(params):
    times = np.float32([0.1, 0.12, 0.9])
    affinity = jax.jit(lambda params: objectives.task_affinity(plain(), params, BATCH, times, KEY))(params)
    affinity = jax.device_get(affinity)
    np.testing.assert_allclose(np.diagonal(affinity), 1.0, rtol=1e-5)
    np.testing.assert_allclose(affinity, affinity.T, atol=1e-6)
    assert affinity[0, 1] > affinity[0, 2]

    @jax.jit
    def vector(t):
        pinned = {**BATCH, "t": jnp.full(24, t), "t_weight": jnp.ones(24)}
        grads = jax.grad(lambda p: plain().loss(p, (), pinned, KEY)[0].mean())(params)
        return jax.flatten_util.ravel_pytree(grads)[0]

    one, other = np.asarray(vector(0.1)), np.asarray(vector(0.9))
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    np.testing.assert_allclose(affinity[0, 2], cosine, atol=1e-4)
    assert objectives.conflicting_share(jnp.array([[1.0, -0.5], [-0.5, 1.0]])) == 1.0
    assert objectives.conflicting_share(affinity, below=-1.1) == 0.0
    by_lag = objectives.affinity_by_lag(jnp.arange(9.0).reshape(3, 3))
    np.testing.assert_array_equal(by_lag, [(1 + 5) / 2, 2])
    with pytest.raises(InvalidInput, match="two times"):
        objectives.affinity_by_lag(jnp.ones((1, 1)))


@pytest.mark.parametrize("edges", [3, None, (0.5,), (0.5, 0.2, 1.0), (0.0, float("nan"), 1.0)])
def test_what_are_no_intervals_is_told(edges):
    with pytest.raises(InvalidInput, match="edges is"):
        objectives.multitask(plain(), edges, objectives.projected())
    with pytest.raises(InvalidInput, match="edges is"):
        objectives.uncertainty_weighted(plain(), edges)


def test_times_that_are_none_are_told(params):
    for times in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(InvalidInput, match=r"times is .*in \[0, 1\]"):
            objectives.task_affinity(plain(), params, BATCH, np.array(times, np.float32), KEY)


def test_what_would_lose_the_combination_is_told(params):
    combined = objectives.multitask(plain(), EDGES, objectives.projected())
    for wrap in (
        lambda: objectives.with_frozen(combined, {"params": params}, "lora"),
        lambda: objectives.trained_part(combined, params, lambda path: True),
        lambda: objectives.budgeted(combined, 0.5),
        lambda: objectives.multitask(combined, EDGES, objectives.projected()),
        lambda: objectives.uncertainty_weighted(combined, EDGES),
    ):
        with pytest.raises(InvalidInput, match="combine outside of it"):
            wrap()
    framewise = objectives.multitask(objectives.denoising(NETWORK, FLOW, t_shape=2), EDGES, objectives.projected())
    with pytest.raises(InvalidInput, match="one time an example"):
        jax.eval_shape(framewise.gradient, params, framewise.init(KEY, params, BATCH), BATCH, KEY)
