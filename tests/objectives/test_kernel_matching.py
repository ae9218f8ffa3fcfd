"""The discrepancy of two sets, and a sampler that is trained by it: arithmetic, and gradients through whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import ndtri

from diffusion_jax import (
    adapters,
    denoisers,
    distributed,
    metrics,
    models,
    objectives,
    processes,
    solvers,
    timesteps,
    training,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives import FeatureSpace
from diffusion_jax.typing import Network
from tests.models.shared import compiled, drawn_params

KEY = jax.random.key(0)
KERNELS = {
    "linear": objectives.linear_kernel(),
    "cubic": objectives.polynomial_kernel(),
    "gaussian": objectives.gaussian_kernel((0.5, 2.0)),
}
VALUES = {
    "linear": lambda u, v: u @ v,
    "cubic": lambda u, v: (u @ v / len(u) + 1) ** 3,
    "gaussian": lambda u, v: np.mean([np.exp(-((u - v) @ (u - v)) / (2 * b * b)) for b in (0.5, 2.0)]),
}


def drawn(seed, count=7, size=3):
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


@pytest.fixture(scope="module")
def distances():
    """By kernel: without and with bias, of the first two sets."""

    def of(u, w):
        return {
            name: [objectives.squared_mmd(u, w, kernel, unbiased=unbiased) for unbiased in (True, False)]
            for name, kernel in KERNELS.items()
        }

    return compiled(of)(drawn(0), drawn(1))


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_the_sum_over_pairs(name, distances):
    u, w, k = drawn(0), drawn(1), VALUES[name]

    def own(x):
        return sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))

    across = np.mean([[k(a, b) for b in w] for a in u])
    found, biased = distances[name]
    np.testing.assert_allclose(found, own(u) + own(w) - 2 * across, rtol=1e-4, atol=1e-5)
    diagonal = sum(np.mean([k(a, a) for a in x]) - own(x) for x in (u, w)) / 7
    np.testing.assert_allclose(biased - found, diagonal, rtol=1e-3, atol=1e-5)


def test_a_linear_kernel_compares_means_and_a_cubic_one_is_that_of_the_metric(distances):
    u, w = drawn(0), drawn(1)
    np.testing.assert_allclose(distances["linear"][1], np.square(u.mean(0) - w.mean(0)).sum(), rtol=1e-4)
    np.testing.assert_allclose(distances["cubic"][0], metrics.mmd2(u, w, kernel="polynomial"), rtol=1e-3)


def test_without_bias_equal_distributions_are_at_no_distance():
    u, w = (np.stack([drawn(first + i, 20) for i in range(200)]) for first in (0, 1000))
    found = compiled(jax.vmap(lambda u, w: objectives.squared_mmd(u, w, KERNELS["gaussian"])))(u, w)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)
    assert min(found) < 0 < max(found)


def sampler(remat, steps=4):
    """Runs that stay where the kernels see them, which those of an untrained epsilon network do not."""
    network = models.mlp(width=16, depth=1)
    process = processes.vp_linear(prediction="v")
    return network, objectives.whole_runs(
        denoisers.denoiser(network, process), solvers.ddim(), timesteps.trailing(steps), remat
    )


@pytest.fixture(scope="module")
def case():
    x = 0.5 * drawn(1, 16, 2) + 1.0
    network, generate = sampler(True)
    params = drawn_params(network, x, np.zeros(16, np.float32))
    spaces = [
        FeatureSpace(objectives.raw_features, objectives.gaussian_kernel((0.5, 1.0))),
        FeatureSpace(lambda w, x: jnp.tanh(x @ w), objectives.polynomial_kernel(), np.eye(2, dtype=np.float32), 0.5),
    ]
    return params, generate, spaces, {"x0": x}


def key_of(step):
    """Of a step of training, with the seed 0."""
    return jax.random.fold_in(jax.random.key(0), step)


@pytest.fixture(scope="module")
def rematerialised(case):
    """Loss, gradient and the discrepancies of the samples, of the first step on one device."""
    params, generate, spaces, batch = case
    objective = objectives.kernel_matching(generate, spaces)

    def mean(params):
        return objective.loss(params, objective.init(KEY, params, batch), batch, key_of(0))[0].mean()

    def program(params):
        u = generate(params, {**batch, "index": jnp.arange(16)}, key_of(0))
        parts = [
            objectives.squared_mmd(s.features(s.params, u), s.features(s.params, batch["x0"]), s.kernel) for s in spaces
        ]
        return *jax.value_and_grad(mean)(params), parts

    return compiled(program)(params)


@pytest.fixture(scope="module")
def stepped(case):
    """`(rate, number of the step) -> (params, metrics)` after a step of descent on eight devices: one program."""
    mesh = distributed.make_mesh()
    params, generate, spaces, batch = case
    objective, optimizer = objectives.kernel_matching(generate, spaces), optax.inject_hyperparams(optax.sgd)(1.0)
    state = training.init_state(objective, optimizer, lambda key: params, batch, mesh=mesh)
    assert not jax.tree.leaves(state.objective_state), "features are no state"
    train_step = training.make_train_step(objective, optimizer, mesh)
    batch = distributed.shard_batch(batch, mesh)

    def after(rate, step=0):
        chosen = state.opt_state._replace(hyperparams={"learning_rate": np.float32(rate)})
        new, told = train_step(state._replace(opt_state=chosen, step=np.int32(step)), batch)
        return jax.device_get((new.params, told))

    return after


def test_every_step_and_no_feature_learns(case, rematerialised, stepped):
    params, (value, grads, parts), other = case[0], rematerialised, stepped(0.0, 1)[1]["loss"]
    sizes = {path: float(np.abs(leaf).max()) for path, leaf in models.by_path(grads).items()}
    assert min(sizes.values()) > 1e-4, sizes
    assert abs(float(value - other)) > 1e-4, "each step has noise of its own"
    np.testing.assert_allclose(value, parts[0] + 0.5 * parts[1], rtol=1e-4)
    # Without a rate the sampler stays what it was, bit for bit.
    after, told = stepped(0.0)
    assert set(told) > {"mmd2/0", "mmd2/1"} and float(told["grad_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_rematerialised_or_on_eight_devices_it_is_the_same_gradient(case, rematerialised, stepped):
    params, _, spaces, batch = case
    plain = objectives.kernel_matching(sampler(False)[1], spaces)

    def mean(params):
        return plain.loss(params, plain.init(KEY, params, batch), batch, key_of(0))[0].mean()

    results = [compiled(jax.grad(mean))(params), rematerialised[1]]
    results += [jax.tree.map(np.subtract, params, stepped(1.0)[0])]
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(results[0]))
    assert size > 1e-2
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, size)), results[0], other)


def linear(process, grid, scale):
    """Of Gaussian data of deviation `scale`: the a_i of Bayes, and eps = a_i x at each step of the grid."""
    alpha, sigma = compiled(lambda t: (process.alpha(t), process.sigma(t)))(np.asarray(grid[:-1]))
    bayes = sigma / (alpha**2 * scale**2 + sigma**2)

    def apply(params, x, t, cond=None, train=False, key=None):
        return jnp.interp(t, grid[:-1][::-1] * process.network_time(1.0), params["a"][::-1])[:, None] * x, {}

    return bayes, denoisers.denoiser(Network(lambda *_: {"a": bayes}, apply), process)


WIDE = objectives.raw_space(objectives.gaussian_kernel((1.0, 4.0)))


def test_a_linear_denoiser_learns_the_error_of_its_own_steps():
    """a_i x at each of three steps, for Gaussian data of deviation 2: samples then have its variance, unlike those of
    Bayes."""
    grid, scale = timesteps.trailing(3), 2.0
    bayes, denoiser = linear(processes.vp_linear(), grid, scale)
    generate = objectives.whole_runs(denoiser, solvers.ddim(), grid)
    objective = objectives.kernel_matching(generate, [WIDE])
    optimizer = training.optimizers.adamw(training.optimizers.cosine(peak=0.03, total_steps=300))
    # One example in each 256th of the distribution: half the noise of independent ones, at a third of the time.
    places = (np.arange(256) + np.random.default_rng(0).random((300, 256))) / 256
    data = (scale * ndtri(places)[..., None]).astype(np.float32)
    batch = {"x0": data[0]}
    state = training.init_state(objective, optimizer, lambda key: {"a": bayes}, batch)
    step = training.make_train_step(objective, optimizer)

    def program(params):
        many = {"x0": jnp.zeros((100_000, 1)), "index": jnp.arange(100_000)}
        return generate(params, many, jax.random.key(9)).var() / scale**2

    relative_variance = compiled(program)
    before = relative_variance(state.params)
    for x0 in data:
        state, _ = step(state, {"x0": x0})
    assert abs(relative_variance(state.params) - 1.0) < 0.02 and before < 0.5
    assert np.abs(np.asarray(state.params["a"]) - bayes).max() > 0.01


def test_the_exact_denoiser_with_many_steps_has_nothing_to_learn():
    """The gradient by a common factor of all a_i is 0 within its noise; at three steps it is 2.3."""
    grid = timesteps.trailing(200)
    bayes, denoiser = linear(processes.vp_linear(), grid, 2.0)
    objective = objectives.kernel_matching(objectives.whole_runs(denoiser, solvers.ddim(), grid, False), [WIDE])
    data = 2.0 * np.random.default_rng(0).standard_normal((64, 64, 1), np.float32)

    def gradient(x0, key):
        batch, state = {"x0": x0}, objective.init(key, {"a": bayes}, {"x0": x0})
        return jax.grad(lambda c: objective.loss({"a": c * bayes}, state, batch, key)[0].mean())(1.0)

    found = compiled(lambda data: jax.vmap(gradient)(data, jax.random.split(KEY, 64)))(data)
    error = found.std() / 8
    assert abs(found.mean()) < 3 * error < 0.2


def test_the_gradient_of_a_whole_run_is_that_of_finite_differences():
    with jax.enable_x64(True):
        process, grid = processes.vp_linear(), np.asarray(timesteps.trailing(4), np.float64)
        weights = {"in": np.linspace(-1, 1, 10).reshape(2, 5), "out": np.linspace(0.7, -0.4, 10).reshape(5, 2)}

        def apply(params, x, t, cond=None, train=False, key=None):
            return jnp.tanh(x @ params["in"] + t[:, None] / 500.0) @ params["out"], {}

        denoiser = denoisers.denoiser(Network(lambda *_: weights, apply), process)
        fourier = objectives.fourier_space(objectives.polynomial_kernel(), 2, 8)
        spaces = [objectives.raw_space(objectives.gaussian_kernel()), fourier]
        batch = {"x0": 0.5 * np.random.default_rng(0).standard_normal((6, 2)) + 1.0}

        def loss(remat):
            generate = objectives.whole_runs(denoiser, solvers.ddim(), grid, remat)
            objective = objectives.kernel_matching(generate, spaces)
            return lambda params: objective.loss(params, objective.init(KEY, params, batch), batch, KEY)[0].mean()

        value = jax.jit(jax.value_and_grad(loss(True)))
        direction = {name: np.cos(np.arange(10.0)).reshape(leaf.shape) for name, leaf in weights.items()}
        (ahead, _), (behind, _) = (
            value(jax.tree.map(lambda a, b, h=h: a + h * b, weights, direction)) for h in (1e-5, -1e-5)
        )
        grads = jax.device_get(value(weights)[1])
        assert jax.tree.leaves(grads)[0].dtype == np.float64
        along = sum(float((grads[name] * direction[name]).sum()) for name in weights)
        np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-3)
        plain = jax.jit(jax.grad(loss(False)))(weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), grads, plain)


SAMPLERS = {
    "history": (solvers.dpm_solver_pp(2), processes.vp_linear()),
    "flow": (solvers.flow_euler(), processes.rectified_flow()),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_through_any_sampler_every_step_learns(name):
    """Each step has weights of its own, a row of a table by time; all get a gradient."""
    solver, process = SAMPLERS[name]
    grid = np.asarray(timesteps.linspace(4)) * np.float32(0.999)

    def apply(params, x, t, cond=None, train=False, key=None):
        step = jnp.abs(t[:, None] - process.network_time(jnp.asarray(grid[:-1]))).argmin(axis=1)
        return jnp.einsum("bd,bde->be", x, params[step]), {}

    params = np.stack([0.1 * np.eye(2, dtype=np.float32) + np.float32(0.05 * i) for i in range(4)])
    denoiser = denoisers.denoiser(Network(lambda *_: params, apply), process)
    objective = objectives.kernel_matching(
        objectives.whole_runs(denoiser, solver, grid), [objectives.raw_space(objectives.linear_kernel())]
    )
    batch = {"x0": drawn(3, 8, 2)}
    grads = compiled(jax.grad(lambda p: objective.loss(p, objective.init(KEY, p, batch), batch, KEY)[0].mean()))(params)
    assert np.isfinite(grads).all() and np.abs(grads).max(axis=(1, 2)).min() > 1e-5


def test_factors_beside_a_frozen_network_learn_alone_and_are_averaged(case):
    params, _, _, batch = case
    network, process = models.mlp(width=16, depth=1), processes.vp_linear()

    def objective(adapted):
        runs = objectives.whole_runs(denoisers.denoiser(adapted, process), solvers.ddim(), timesteps.trailing(2))
        return objectives.kernel_matching(runs, [objectives.raw_space(objectives.linear_kernel())])

    tuned = objectives.adaptation(adapters.lora(network, rank=2, select=("up",)), params, objective, batch)
    optimizer, ema = training.optimizers.sgd(1.0), {"average": training.ema.fixed(0.5)}
    state = training.init_state(tuned.objective, optimizer, tuned.init, batch, ema=ema)
    assert not jax.tree.leaves(state.objective_state), "the network beside them is no state"
    begun = jax.device_get(state.params)
    after, _ = training.make_train_step(tuned.objective, optimizer, ema=ema)(state, batch)
    for path, start in jax.tree_util.tree_leaves_with_path(begun):
        now, average = (
            jax.tree_util.tree_map_with_path(lambda p, x, at=path: x if p == at else None, tree)
            for tree in (after.params, after.ema["average"])
        )
        now, average = (np.asarray(*jax.tree.leaves(tree)) for tree in (now, average))
        # B begins at 0, so that A learns from the second step on.
        assert (np.abs(now - start).max() > 1e-6) == (path[-1].key == "b")
        np.testing.assert_allclose(average, (now + start) / 2, atol=1e-7)


def test_ten_steps_take_little_more_memory_than_one():
    """Compiled: at most 2.5 times the scratch of a denoising step of the same network and batch."""
    network, optimizer = models.mlp(width=64, depth=4), training.optimizers.sgd(1e-3)
    batch = {"x0": np.zeros((64, 8), np.float32)}
    process = processes.vp_linear()
    generate = objectives.whole_runs(denoisers.denoiser(network, process), solvers.ddim(), timesteps.trailing(10))
    spaces = [FeatureSpace(objectives.raw_features, objectives.polynomial_kernel())]

    def scratch(objective):
        def init(key):
            return network.init(key, batch["x0"][:1], jnp.zeros(1), None)

        state = jax.eval_shape(training.make_init(objective, optimizer, init, batch))
        program = training.make_train_step(objective, optimizer).lower(state, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    plain = scratch(objectives.denoising(network, process))
    assert scratch(objectives.kernel_matching(generate, spaces)) < 2.5 * plain


def test_wrong_calls_are_told(case):
    params, generate, spaces, _ = case
    one = {"x0": jnp.ones((1, 2))}
    for call, told in (
        (lambda: objectives.kernel_matching(generate, []), "needs a feature space"),
        (lambda: objectives.gaussian_kernel((1.0, 0.0)), "bandwidths"),
        (lambda: objectives.gaussian_kernel((float("nan"),)), "bandwidths"),
        (lambda: objectives.polynomial_kernel(0), "degree is 0"),
        (
            lambda: objectives.kernel_matching(generate, spaces).init(KEY, params, one),
            "two examples",
        ),
    ):
        with pytest.raises(InvalidInput, match=told):
            call()
