"""The discrepancy of two sets, and a sampler that is trained by it: arithmetic, and gradients through whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, distributed, metrics, models, objectives, processes, solvers, timesteps, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives import FeatureSpace
from diffusion_jax.typing import Network

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


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_the_sum_over_pairs(name):
    u, w, k = drawn(0), drawn(1), VALUES[name]

    def own(x):
        return sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))

    across = np.mean([[k(a, b) for b in w] for a in u])
    found = objectives.squared_mmd(u, w, KERNELS[name])
    np.testing.assert_allclose(found, own(u) + own(w) - 2 * across, rtol=1e-4, atol=1e-5)
    diagonal = sum(np.mean([k(a, a) for a in x]) - own(x) for x in (u, w)) / 7
    biased = objectives.squared_mmd(u, w, KERNELS[name], unbiased=False)
    np.testing.assert_allclose(biased - found, diagonal, rtol=1e-3, atol=1e-5)


def test_a_linear_kernel_compares_means_and_a_cubic_one_is_that_of_the_metric():
    u, w = drawn(0), drawn(1)
    linear = objectives.squared_mmd(u, w, KERNELS["linear"], unbiased=False)
    np.testing.assert_allclose(linear, np.square(u.mean(0) - w.mean(0)).sum(), rtol=1e-4)
    np.testing.assert_allclose(
        objectives.squared_mmd(u, w, KERNELS["cubic"]), metrics.mmd2(u, w, kernel="polynomial"), rtol=1e-3
    )


def test_without_bias_equal_distributions_are_at_no_distance():
    found = [float(objectives.squared_mmd(drawn(i, 20), drawn(1000 + i, 20), KERNELS["gaussian"])) for i in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)
    assert min(found) < 0 < max(found)


def sampler(remat, steps=4):
    network = models.mlp(width=16, depth=1)
    return network, objectives.whole_runs(
        denoisers.denoiser(network, processes.vp_linear()), solvers.ddim(), timesteps.trailing(steps), remat
    )


@pytest.fixture(scope="module")
def case():
    x = 0.5 * jax.random.normal(jax.random.key(1), (16, 2)) + 1.0
    network, generate = sampler(True)
    params = jax.tree.map(lambda leaf: leaf + 0.05, network.init(KEY, x, jnp.zeros(16), None))
    spaces = [
        FeatureSpace(objectives.raw_features, objectives.gaussian_kernel((0.5, 1.0))),
        FeatureSpace(lambda w, x: jnp.tanh(x @ w), objectives.polynomial_kernel(), jnp.eye(2), 0.5),
    ]
    return params, generate, spaces, {"x0": x}


def test_every_step_and_no_feature_learns(case):
    params, generate, spaces, batch = case
    objective = objectives.kernel_matching(generate, spaces)

    def mean(params):
        return objective.loss(params, objective.init(KEY, params, batch), batch, KEY)[0].mean()

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 0
    u = generate(params, {**batch, "index": jnp.arange(16)}, KEY)
    parts = [
        objectives.squared_mmd(s.features(s.params, u), s.features(s.params, batch["x0"]), s.kernel) for s in spaces
    ]
    np.testing.assert_allclose(value, parts[0] + 0.5 * parts[1], rtol=1e-4)
    state = training.init_state(objective, training.optimizers.sgd(1e-3), lambda key: params, batch)
    assert not jax.tree.leaves(state.objective_state), "features are no state"
    _, metrics_ = training.make_train_step(objective, training.optimizers.sgd(1e-3))(state, batch)
    assert set(metrics_) > {"mmd2/0", "mmd2/1"}


def test_rematerialised_or_on_eight_devices_it_is_the_same_gradient(case):
    params, _, spaces, batch = case
    results = []
    for remat, mesh in ((False, None), (True, None), (True, distributed.make_mesh())):
        objective, optimizer = objectives.kernel_matching(sampler(remat)[1], spaces), training.optimizers.sgd(1.0)
        state = training.init_state(objective, optimizer, lambda key: params, batch, mesh=mesh)
        step = training.make_train_step(objective, optimizer, mesh)
        results.append(jax.device_get(step(state, distributed.shard_batch(batch, mesh))[0].params))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0], other)


def test_a_linear_denoiser_learns_the_error_of_its_own_steps():
    """a_i x at each of three steps, for Gaussian data of deviation 2: samples then have it, unlike those of Bayes."""
    process, grid, scale = processes.vp_linear(), timesteps.trailing(3), 2.0
    alpha, sigma = (np.asarray(f(jnp.asarray(grid[:-1]))) for f in (process.alpha, process.sigma))
    bayes = jnp.asarray(sigma / (alpha**2 * scale**2 + sigma**2))

    def apply(params, x, t, cond=None, train=False, key=None):
        return jnp.interp(t, grid[:-1][::-1] * process.network_time(1.0), params["a"][::-1])[:, None] * x, {}

    denoiser = denoisers.denoiser(Network(lambda *_: {"a": bayes}, apply), process)
    generate = objectives.whole_runs(denoiser, solvers.ddim(), grid)
    objective = objectives.kernel_matching(
        generate, [FeatureSpace(objectives.raw_features, objectives.gaussian_kernel((1.0, 4.0)))]
    )
    optimizer = training.optimizers.adamw(2e-2)
    batch = {"x0": scale * jax.random.normal(KEY, (256, 1))}
    state = training.init_state(objective, optimizer, lambda key: {"a": bayes}, batch)
    step = training.make_train_step(objective, optimizer)

    def deviation(params):
        many = {"x0": jnp.zeros((20_000, 1)), "index": jnp.arange(20_000)}
        return float(generate(params, many, jax.random.key(9)).std())

    before = deviation(state.params)
    for i in range(200):
        state, _ = step(state, {"x0": scale * jax.random.normal(jax.random.key(i), (256, 1))})
    assert abs(deviation(state.params) - scale) < 0.1 < abs(before - scale)
    assert float(jnp.abs(state.params["a"] - bayes).max()) > 0.01


def test_ten_steps_take_little_more_memory_than_one():
    """Compiled: at most 2.5 times the scratch of a denoising step of the same network and batch."""
    network, optimizer = models.dit("S/2", width=32, depth=4, heads=2), training.optimizers.sgd(1e-3)
    batch = {"x0": jnp.zeros((32, 8, 8, 1))}
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
        (lambda: objectives.polynomial_kernel(0), "degree is 0"),
        (
            lambda: objectives.kernel_matching(generate, spaces).init(KEY, params, one),
            "two examples",
        ),
    ):
        with pytest.raises(InvalidInput, match=told):
            call()
