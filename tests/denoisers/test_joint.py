"""Joint denoising: the exact denoiser of dependent modalities in all roles, and guidance without a null token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, solvers, timesteps
from diffusion_jax.denoisers import (
    analytic,
    combined,
    denoiser,
    gaussian_clip,
    gaussian_mixture,
    guided,
    jointly_guided,
    marginal_guided,
    posterior,
    sample_mixture,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from diffusion_jax.timesteps import linspace, noised_start, roles
from tests.denoisers.tiny import ask, network, remembering, step_at

KEY = jax.random.key(4)
FLOW = processes.rectified_flow()
PAIR = processes.JointProcess({"x": FLOW, "y": processes.gvp()})
COVARIANCE = 0.75 * np.array([[1.0, 0.3, 0.6, 0.2], [0.3, 0.8, 0.1, 0.4], [0.6, 0.1, 1.2, 0.5], [0.2, 0.4, 0.5, 0.9]])
MEAN = np.array([0.5, -0.4, 0.2, 0.3])
WORLD = gaussian_mixture({"x": MEAN[None, :2], "y": MEAN[None, 2:]}, covariances=COVARIANCE[None])
ORACLE = analytic(PAIR)
GRID = linspace(8)
DDIM = solvers.ddim()
SHAPES = {"x": (5, 2), "y": (5, 2)}
Y = np.array([[1.0, -0.5]], np.float32)
JOINT = {"x": "generate", "y": "generate"}
GIVEN = {"x": "generate", "y": "given"}
MARGINAL = {"x": "generate", "y": "ignored"}


@jax.jit
def joint_posterior(world, x, t):
    return posterior(world, PAIR, x, t)


@jax.jit
def flow_posterior(world, x, t):
    return posterior(world, FLOW, x, t)


def normal(shape, seed=4):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def schur(given, index, other):
    """Mean and covariance of the entries `index` given the values of the entries `other`."""
    gain = COVARIANCE[np.ix_(index, other)] @ np.linalg.inv(COVARIANCE[np.ix_(other, other)])
    covariance = COVARIANCE[np.ix_(index, index)] - gain @ COVARIANCE[np.ix_(other, index)]
    return MEAN[index] + gain @ (given - MEAN[other]), covariance


def run(made, plan, x, solver=DDIM, world=WORLD):
    return sample(KEY, made, world, solver, plan, x_init=x)


def starts(size=5, y=None):
    x = {"x": normal((size, 2), 8), "y": normal((size, 2), 9)}
    return x if y is None else {**x, "y": np.broadcast_to(y, (size, 2))}


@functools.cache
def pair_params():
    """Of the tiny network over both modalities."""
    return jax.jit(network().init)(KEY, starts(), np.zeros(5, np.float32), None)


@pytest.mark.parametrize("r", [0.2, 0.7, 1.0])
def test_a_time_of_one_marginalises_and_a_time_of_zero_conditions(r):
    x = {"x": normal((6, 2)), "y": normal((6, 2), 9)}
    alone = gaussian_mixture(MEAN[None, :2], covariances=COVARIANCE[None, :2, :2])
    marginal = flow_posterior(alone, x["x"], r)
    ignoring = joint_posterior(WORLD, x, {"x": jnp.array(r), "y": jnp.array(1.0)})
    np.testing.assert_allclose(ignoring.eps["x"], marginal.eps, atol=1e-6)
    knowing = joint_posterior(WORLD, x, {"x": jnp.array(r), "y": jnp.array(0.0)})
    for row in range(6):
        mean, covariance = schur(np.asarray(x["y"][row]), [0, 1], [2, 3])
        conditional = flow_posterior(
            gaussian_mixture(mean[None], covariances=covariance[None]), x["x"][row : row + 1], r
        )
        np.testing.assert_allclose(knowing.eps["x"][row], conditional.eps[0], atol=1e-5)
    np.testing.assert_allclose(knowing.x0["y"], x["y"], atol=1e-5)


def test_the_joint_oracle_is_the_oracle_of_the_flattened_data():
    x = {"x": normal((6, 2)), "y": normal((6, 2), 9)}
    t = {"x": np.float32(0.3), "y": np.linspace(0.0, 1.0, 6, dtype=np.float32)}
    both = processes.JointProcess({"x": FLOW, "y": FLOW})
    found = jax.jit(lambda x, t: posterior(WORLD, both, x, t))(x, t)
    flat = gaussian_mixture(MEAN[None], covariances=COVARIANCE[None])
    times = np.repeat(np.stack([np.full(6, 0.3, np.float32), t["y"]], axis=1), 2, axis=1)
    whole = flow_posterior(flat, np.concatenate([x["x"], x["y"]], axis=1), times)
    for name, part in (("x", slice(0, 2)), ("y", slice(2, 4))):
        np.testing.assert_allclose(found.x0[name], whole.x0[:, part], atol=1e-5)
        np.testing.assert_allclose(found.eps[name], whole.eps[:, part], atol=1e-5)
    np.testing.assert_allclose(found.log_density, whole.log_density, rtol=1e-5)
    drawn, _ = jax.jit(sample_mixture, static_argnums=2)(KEY, WORLD, 40_000)
    seen = np.cov(np.concatenate([drawn["x"], drawn["y"]], axis=1).T)
    np.testing.assert_allclose(seen, COVARIANCE, atol=0.03)


def affine(plan, index, steps_x):
    """Mean and covariance of the run's result from its action on a basis of the noise: no sampling error."""
    size = 5
    noise = np.concatenate([np.zeros((1, 4)), np.eye(4)]).astype(np.float32)
    x = {"x": noise[:, :2], "y": noise[:, 2:]}
    for name, value in steps_x.items():
        x[name] = np.broadcast_to(value, (size, 2))
    out = run(ORACLE, plan, x).x
    out = np.concatenate([out["x"], out["y"]], axis=1)[:, index]
    return out[0], (out[1:] - out[0]).T @ (out[1:] - out[0])


@pytest.mark.parametrize(
    ("asked", "index", "expected"),
    [
        (JOINT, [0, 1, 2, 3], lambda: (MEAN, COVARIANCE)),
        (GIVEN, [0, 1], lambda: schur(np.asarray(Y[0]), [0, 1], [2, 3])),
        (MARGINAL, [0, 1], lambda: (MEAN[:2], COVARIANCE[:2, :2])),
        ({"x": "given", "y": "generate"}, [2, 3], lambda: schur(np.asarray(Y[0]), [2, 3], [0, 1])),
        ({"x": "ignored", "y": "generate"}, [2, 3], lambda: (MEAN[2:], COVARIANCE[2:, 2:])),
    ],
    ids=["joint", "x given y", "x", "y given x", "y"],
)
def test_one_denoiser_samples_all_five_distributions(asked, index, expected):
    mean, covariance = expected()
    errors = []
    fixed = {name: Y for name, role in asked.items() if role == "given"}
    for steps in (50, 100):
        found_mean, found = affine(roles(linspace(steps), asked), index, fixed)
        errors.append(max(np.abs(found_mean - mean).max(), np.abs(found - covariance).max()))
    assert errors[0] < 0.05 and errors[1] < 0.6 * errors[0]


def test_joint_and_chained_sampling_agree():
    grid, size = linspace(100), 8000
    together = run(ORACLE, roles(grid, JOINT), PAIR.prior(KEY, {"x": (size, 2), "y": (size, 2)})).x
    first = run(ORACLE, roles(grid, {"x": "ignored", "y": "generate"}), starts(size)).x
    second = run(ORACLE, roles(grid, GIVEN), starts(size, first["y"])).x
    np.testing.assert_array_equal(second["y"], first["y"])
    flat = [np.concatenate([part["x"], part["y"]], axis=1) for part in (together, second)]
    np.testing.assert_allclose(flat[0].mean(0), flat[1].mean(0), atol=0.06)
    np.testing.assert_allclose(np.cov(flat[0].T), np.cov(flat[1].T), atol=0.08)


def test_one_program_for_every_role_and_roles_for_each_example():
    traces = []

    def counted(params, carry, x, step, cond):
        traces.append(1)
        return ORACLE.apply(params, carry, x, step, cond)

    sampler = make_sampler(ORACLE._replace(apply=counted), solvers.ddim(), shape={"x": (2,), "y": (2,)})
    known, index = {"x": jnp.ones((3, 2)), "y": -jnp.ones((3, 2))}, jnp.arange(3)
    alone = []
    for asked in (JOINT, GIVEN, MARGINAL):
        plan = {name: jnp.broadcast_to(grid[:, None], (9, 3)) for name, grid in roles(GRID, asked).items()}
        alone.append(sampler(KEY, WORLD, plan, None, index, noised_start(KEY, PAIR, plan, known)).x)
        once = len(traces) if len(alone) == 1 else once
    plan = roles(GRID, {"x": ["generate"] * 3, "y": ["generate", "given", "ignored"]})
    mixed = sampler(KEY, WORLD, plan, None, index, noised_start(KEY, PAIR, plan, known)).x
    assert len(traces) == once
    for row in range(3):
        np.testing.assert_allclose(mixed["x"][row], alone[row]["x"][row], atol=1e-6)


@pytest.mark.parametrize("made", [marginal_guided, jointly_guided])
def test_a_scale_of_one_is_the_plain_model_and_zero_the_marginal(made):
    options = {"ignored": "y"} if made is marginal_guided else {}
    assert made(ORACLE, 1.0, **options) is ORACLE
    x = starts(y=Y)
    plan = roles(GRID, GIVEN)
    plain = run(ORACLE, plan, x)
    traced = jax.jit(lambda scale: run(made(ORACLE, jnp.full(8, scale), **options), plan, x))
    one = traced(1.0)
    np.testing.assert_array_equal(one.x["x"], jax.jit(lambda: run(ORACLE, plan, x).x["x"])())
    assert float(one.cost.evaluations) == float(plain.cost.evaluations) == 8
    zero = traced(0.0)
    alone = run(ORACLE, roles(GRID, MARGINAL), starts()).x
    np.testing.assert_allclose(zero.x["x"], alone["x"], atol=1e-5)
    np.testing.assert_array_equal(zero.x["y"], x["y"])
    assert float(zero.cost.evaluations) == 16  # y is given, so its marginal is never asked for


def test_guidance_is_the_formula():
    """(1 + g) eps(x, y; t, 0) - g eps(x, e; t, 1), by hand; y keeps its answer."""
    x, g = starts(y=Y), 1.5
    keys = jax.random.split(jax.random.key(5), 5)
    step = step_at({"x": 0.6, "y": 0.0})._replace(key=keys)
    made = marginal_guided(ORACLE, 1 + g, "y")
    answer = ask(made, WORLD, x, step)
    main = joint_posterior(WORLD, x, step.t)
    ignoring = joint_posterior(WORLD, {**x, "y": jnp.zeros((5, 2))}, {"x": step.t["x"], "y": jnp.array(1.0)})
    np.testing.assert_allclose(answer.eps["x"], (1 + g) * main.eps["x"] - g * ignoring.eps["x"], atol=1e-5)
    np.testing.assert_array_equal(answer.eps["y"], main.eps["y"])
    alpha, sigma = FLOW.alpha(0.6), FLOW.sigma(0.6)
    np.testing.assert_allclose(alpha * answer.x0["x"] + sigma * answer.eps["x"], x["x"], atol=1e-5)
    assert float(answer.cost.evaluations) == 2


def test_joint_guidance_is_cross_marginal_and_counts_three_calls():
    x, g = starts(), 2.0
    keys = jax.random.split(jax.random.key(5), 5)
    step = step_at({"x": 0.6, "y": 0.6})._replace(key=keys)
    made = jointly_guided(ORACLE, 1 + g)
    answer = ask(made, WORLD, x, step)
    main = joint_posterior(WORLD, x, step.t)
    for name, other in (("x", "y"), ("y", "x")):
        alone = joint_posterior(WORLD, x, {name: jnp.array(0.6), other: jnp.array(1.0)})
        np.testing.assert_allclose(answer.eps[name], (1 + g) * main.eps[name] - g * alone.eps[name], atol=1e-5)
    assert float(run(made, roles(GRID, JOINT), x).cost.evaluations) == 24
    apart = gaussian_mixture({"x": MEAN[None, :2], "y": MEAN[None, 2:]}, {"x": 0.7, "y": 1.3})
    plain, pushed = (run(d, roles(GRID, JOINT), x, world=apart).x for d in (ORACLE, made))
    for name in ("x", "y"):
        np.testing.assert_allclose(plain[name], pushed[name], atol=1e-4)


def test_given_modalities_stay_bit_for_bit_under_guidance_and_multistep_solvers():
    """Histories hold generated modalities only: the run is that of the conditional by itself."""
    x = starts(y=np.array([[1.0, -0.0]], np.float32))
    made = jointly_guided(ORACLE, 2.0)
    for solver in (solvers.dpm_solver_pp(2), solvers.unipc(3)):
        out = run(made, roles(GRID, GIVEN), x, solver).x
        assert np.asarray(out["y"]).tobytes() == np.asarray(x["y"]).tobytes()
    mean, covariance = schur(np.array([1.0, 0.0]), [0, 1], [2, 3])
    alone = sample(
        KEY,
        analytic(FLOW),
        gaussian_mixture(mean[None], covariances=covariance[None]),
        solvers.dpm_solver_pp(2),
        GRID,
        x_init=x["x"],
    ).x
    out = run(ORACLE, roles(GRID, GIVEN), x, solvers.dpm_solver_pp(2)).x
    np.testing.assert_allclose(out["x"], alone, atol=1e-5)


def test_noise_that_stands_for_the_ignored_belongs_to_the_sample():
    net = denoiser(network(), PAIR)
    params = pair_params()
    plan = roles(GRID, GIVEN)

    def leaky(params, carry, x, step, cond):
        prediction, carry = net.apply(params, carry, x, step, cond)
        pair = {name: leaf + 0.1 * x["y"] for name, leaf in prediction.x0.items()}
        return prediction._replace(x0=pair), carry

    leaking = net._replace(apply=leaky)
    index, rows = np.arange(5), [3, 2, 2, 0, 0]
    for noise in ("fixed", "fresh"):
        made = marginal_guided(leaking, 2.0, "y", noise=noise)
        sampler = make_sampler(made, solvers.ddim(), shape={"x": (2,), "y": (2,)})
        x = starts(y=Y)
        whole = sampler(KEY, params, plan, None, index, x).x["x"]
        others = sampler(KEY, params, plan, None, index[rows], jax.tree.map(lambda leaf: leaf[rows], x)).x["x"]
        np.testing.assert_allclose(others, np.asarray(whole)[rows], atol=1e-6)
    fixed = marginal_guided(leaking, 2.0, "y")
    step, keys = step_at({"x": 0.5, "y": 0.0}), jax.random.split(KEY, 5)
    asked = jax.jit(lambda index: ask(fixed, params, x, step._replace(key=keys, index=index)).x0["x"])
    np.testing.assert_array_equal(asked(0), asked(3))


def test_what_a_denoiser_remembers_is_kept_for_each_query_and_dropped_after_a_gap():
    single = remembering(denoiser(network(), FLOW))
    x = normal((3, 2))
    params = jax.jit(network().init)(KEY, x, jnp.zeros(3), None)
    scales = jnp.array([1.0, 0.0, 0.0, 1.0])
    made = combined(single, [(scales, 1.0)])
    keys = jax.random.split(KEY, 3)
    carry = made.init(params, x, None)
    calls, apply = [], jax.jit(made.apply)
    for i in range(4):
        step = step_at(0.5, index=i)._replace(key=keys)
        _, carry = apply(params, carry, x, step, None)
        calls.append([int(own["calls"]) for own in carry])
    assert calls == [[1, 1], [2, 0], [3, 0], [4, 1]]


def test_a_noisier_past_guides_a_clip():
    """A query that raises some frames tells about the others only."""
    clip, x = gaussian_clip(4), normal((3, 4, 1))
    plain = analytic(FLOW)
    levels = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    made = combined(plain, [(-1.0, levels)])
    step = step_at(jnp.array([[0.0, 0.5, 0.5, 0.5]]))._replace(key=jax.random.split(KEY, 3))
    answer = ask(made, clip, x, step)
    main = flow_posterior(clip, x, step.t)
    blind = flow_posterior(clip, x, np.maximum(step.t, levels))
    np.testing.assert_array_equal(answer.x0[:, 0], main.x0[:, 0])
    np.testing.assert_allclose(answer.eps[:, 1:], (2 * main.eps - blind.eps)[:, 1:], atol=1e-5)
    # A level below pure noise is a step of the forward chain: its variance is that of the process.
    many = combined(analytic(FLOW), [(1.0, jnp.array([[0.6, 0.0]]))])
    world = gaussian_mixture(np.zeros((1, 2, 1)), covariances=np.array([[[1.0, 0.8], [0.8, 1.0]]]))
    start = np.ones((6_000, 2, 1), np.float32)
    step = step_at(jnp.array([[0.2, 0.5]]))._replace(key=jax.random.split(KEY, 6_000))
    answer = ask(many, world, start, step)
    gain = flow_posterior(
        world, np.array([[[0.0], [0.0]], [[1.0], [0.0]]], np.float32), np.array([[0.6, 0.5]], np.float32)
    ).x0[:, 1, 0]
    gain = float(gain[1] - gain[0])
    kept = 0.4 / 0.8
    assert float(answer.x0[:, 1].std()) == pytest.approx(abs(gain) * np.sqrt(0.6**2 - (kept * 0.2) ** 2), rel=0.05)


def test_discrete_modalities_are_guided_in_log_probabilities():
    process = processes.JointProcess({"image": FLOW, "text": processes.absorbing(5)})
    net = network(vocabulary=5)
    made = denoiser(net, process)
    x = {"image": normal((3, 2)), "text": jnp.full((3, 4), 5, jnp.int32)}
    params = jax.jit(net.init)(KEY, x, jnp.zeros(3), None)
    step = step_at({"image": 0.5, "text": 0.5})._replace(key=jax.random.split(KEY, 3))
    pushed = jointly_guided(made, 3.0)
    answer = ask(pushed, params, x, step)
    np.testing.assert_allclose(jnp.exp(answer.x0["text"]).sum(-1), 1.0, atol=1e-4)
    assert answer.eps["text"] is None and np.isfinite(answer.x0["image"]).all()
    solver = solvers.joint({"image": solvers.ddim(), "text": solvers.ancestral()})
    grid = roles(GRID, {"image": "given", "text": "generate"})
    out = sample(KEY, pushed, params, solver, grid, x_init=x)
    np.testing.assert_array_equal(out.x["image"], x["image"])
    assert (out.x["text"] < 5).all() and float(out.cost.evaluations) == 16


def test_within_classifier_free_guidance_each_pair_of_rows_shares_its_noise():
    net = denoiser(network(), PAIR)
    x = starts(y=Y)
    params = pair_params()
    made = guided(marginal_guided(net, 2.0, "y"), 2.0, {"label": 0})
    plan = roles(GRID, GIVEN)
    out = sample(KEY, made, params, solvers.ddim(), plan, x_init=x, cond={"label": jnp.arange(5)})
    assert np.isfinite(out.x["x"]).all() and float(out.cost.evaluations) == 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: marginal_guided(ORACLE, 2.0, "z"), "a modality of a query is 'z'"),
        (lambda: combined(ORACLE, [(1.0, {"y": "given"})]), "a role in a query is 'given'"),
        (lambda: combined(ORACLE, [(1.0, {"y": 1.5})]), "lies in"),
        (lambda: combined(ORACLE, [(1.0, 0.5)]), "a dict of roles"),
        (lambda: combined(ORACLE, noise="frozen"), "did you mean"),
        (lambda: jointly_guided(analytic(FLOW)), "two modalities"),
        (lambda: marginal_guided(ORACLE, "strong", "y"), "scale is 'strong'"),
        (
            lambda: combined(
                denoiser(network(), processes.JointProcess({"a": FLOW, "b": processes.absorbing(4)})),
                [(1.0, {"b": 0.5})],
            ),
            "can be ignored only",
        ),
        (
            lambda: jax.eval_shape(
                lambda x, step: marginal_guided(ORACLE, 2.0, "y").apply(WORLD, ((), ()), x, step, None),
                starts(),
                step_at({"x": 0.5, "y": 0.0}),
            ),
            "run through sample",
        ),
        (lambda: posterior(WORLD, PAIR, starts(), 0.5, causal=True), "causal is about"),
        (lambda: gaussian_clip(4, correlation=1.0), "correlation is"),
        (
            lambda: gaussian_mixture({"x": np.zeros((1, 2)), "y": np.zeros((1, 2))}, covariances=np.eye(3)[None]),
            "covariances.shape",
        ),
        (lambda: timesteps.roles(GRID, {"x": "ignore"}), "did you mean 'ignored'"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
