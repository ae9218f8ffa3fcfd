"""`base` in the place of x0: the network sees imperfect data and is asked for the true ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, processes, timesteps
from diffusion_jax.config import build, call
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives.batches import corrupted, example_keys
from diffusion_jax.randomness import normal, split
from diffusion_jax.typing import Network, Objective

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X0, BASE = RNG.standard_normal((2, 4, 3)).astype(np.float32)
TIMES = np.asarray([0.2, 0.5, 0.7, 0.95], np.float32)
PREDICTIONS = ("x0", "epsilon", "v", "velocity")
SEEN = Network(lambda *_: {}, lambda params, x, t, cond, train=False, key=None: (params * x, {}))


def process_of(prediction):
    return processes.vp_linear(prediction=prediction, time="t")


def loss(process, batch, network=SEEN, params=0.0, **fields):
    batch = jax.tree.map(jnp.asarray, batch)
    objective = objectives.denoising(network, process, **fields)
    losses, aux = objective.loss(params, objective.init(KEY, params, batch), batch, KEY)
    return losses, aux.per_example["loss"]


@pytest.fixture(scope="module")
def compared():
    """By prediction: losses of a network that says 0 for each base, and what it saw as its x_t."""

    @jax.jit
    def run(base):
        found = {}
        for prediction in PREDICTIONS:
            seen = []

            def look(params, x, t, cond, train=False, key=None, seen=seen):
                seen.append(x)
                return 0.0 * x, {}

            process, network = process_of(prediction), Network(lambda *_: {}, look)
            plain = loss(process, {"x0": X0, "t": TIMES}, network)[0]
            mixed = loss(process, {"x0": X0, "t": TIMES, "base": base}, network)[0]
            found[prediction] = plain, mixed, *seen
        return found

    return run(jnp.asarray(X0)), run(jnp.asarray(BASE))


def test_data_as_their_own_base_change_nothing(compared):
    # All that a loss reads of its input, bit for bit; compiled in one program they are fused differently.
    process, keys, given = process_of("v"), jax.random.split(KEY, 4), {"x0": jnp.asarray(X0)}
    plain, mixed = (corrupted(process, keys, one, jnp.asarray(TIMES)) for one in (given, {**given, "base": X0}))
    jax.tree.map(np.testing.assert_array_equal, mixed, plain)
    for plain, mixed, *_ in compared[0].values():
        np.testing.assert_allclose(mixed, plain, rtol=1e-5)


def test_every_prediction_has_the_target_that_leads_from_the_input_to_the_true_data(compared):
    process = process_of("x0")
    alpha, sigma = (np.asarray(f(TIMES), np.float64)[:, None] for f in (process.alpha, process.sigma))
    alpha_rate, sigma_rate = (np.asarray(rate, np.float64)[:, None] for rate in process.rates(TIMES))
    for prediction, (_, found, seen, x_t) in compared[1].items():
        np.testing.assert_allclose(x_t - seen, alpha * (BASE - X0), atol=1e-5)
        eps = (x_t - alpha * X0) / sigma
        target = {"x0": X0, "epsilon": eps, "v": (alpha * x_t - X0) / sigma, "velocity": None}[prediction]
        target = alpha_rate * X0 + sigma_rate * eps if target is None else target
        np.testing.assert_allclose(found, np.square(target).mean(axis=1), rtol=1e-4)


def test_who_knows_the_data_has_no_loss_whatever_was_noised():
    truth = Network(lambda *_: {}, lambda params, x, t, cond, train=False, key=None: (jnp.asarray(X0), {}))
    assert not loss(process_of("x0"), {"x0": X0, "t": TIMES, "base": BASE}, truth)[0].any()


def test_degrading_is_a_base_made_at_the_drawn_time_of_each_example_and_trains_the_same_parameters():
    process = process_of("x0")
    draw = timesteps.importance(num_buckets=4, history=1)

    def degrade(key, x0, t):
        return x0 + (1.0 - t) * jax.random.normal(key, x0.shape)

    made = objectives.denoising(SEEN, process, draw, degrade=degrade)
    none = objectives.denoising(SEEN, process, draw, degrade=lambda key, x0, t: x0)
    plain = objectives.denoising(SEEN, process, draw)
    state, batch = draw.init(), {"x0": X0, "index": np.arange(4)}

    @jax.jit
    def run(batch):
        prepared = made.prepare(state, batch, KEY)
        given = objectives.denoising(SEEN, process, draw)
        found = [made.loss(0.5, state, batch, KEY), made.loss(0.5, state, prepared, KEY)]
        found += [given.loss(0.5, state, prepared, KEY), none.loss(0.5, state, batch, KEY)]
        found += [plain.loss(0.5, state, batch, KEY)]
        slopes = [jax.grad(lambda p, o=o: o.loss(p, state, batch, KEY)[0].mean())(0.5) for o in (made, plain)]
        return prepared, found, slopes

    prepared, (own, again, given, unchanged, usual), slopes = run(batch)
    for losses, aux in (again, given):
        np.testing.assert_array_equal(losses, own[0])
        np.testing.assert_array_equal(aux.state.losses, own[1].state.losses)
    np.testing.assert_array_equal(unchanged[0], usual[0])
    assert np.all(own[0] != usual[0]) and slopes[0] != slopes[1] and np.isfinite(slopes).all()
    assert made.prepare(state, {**batch, "base": BASE, "t": TIMES}, KEY)["base"] is BASE, "what is given is kept"
    # What is added grows as the noise falls, and belongs to the example.
    size = np.abs(prepared["base"] - X0).mean(axis=1) / (1 - prepared["t"])
    assert np.all((size > 0.1) & (size < 3))
    part = jax.jit(made.prepare)(state, {"x0": X0[2:], "index": np.arange(2, 4), "t": prepared["t"][2:]}, KEY)
    np.testing.assert_allclose(part["base"], prepared["base"][2:], rtol=1e-6)


def test_what_wraps_an_objective_keeps_its_own_gradient():
    edges = np.asarray([0.0, 0.5, 1.0])
    inner = objectives.denoising(SEEN, process_of("x0"))
    tasks = objectives.multitask(inner, edges, objectives.projected())
    made = objectives.degraded(tasks, lambda key, x0, t: 0.0 * x0)
    batch = {"x0": jnp.asarray(X0), "t": jnp.asarray(TIMES)}
    state = made.init(KEY, 0.5, batch)
    found = jax.jit(lambda: (made.gradient(0.5, state, batch, KEY), tasks.gradient(0.5, state, batch, KEY)))()
    assert found[0][1] != found[1][1]


def test_noise_that_a_batch_brings_is_added_to_its_base():
    process, noise = process_of("epsilon"), RNG.standard_normal(X0.shape).astype(np.float32)
    given = {"x0": X0, "t": TIMES, "base": BASE, "noise": noise}
    found = loss(process, given)[0]
    ratio = np.asarray(process.alpha(TIMES) / process.sigma(TIMES))[:, None]
    np.testing.assert_allclose(found, np.square(noise + ratio * (BASE - X0)).mean(axis=1), rtol=1e-4)


def test_what_is_degraded_and_the_noise_do_not_share_their_random_numbers():
    """A degradation may split its key as the loss does."""
    made = objectives.denoising(
        SEEN, process_of("x0"), degrade=lambda key, x0, t: jax.random.normal(split(key, 2)[0], x0.shape)
    )
    index = jnp.arange(4)
    base = made.prepare((), {"x0": X0, "index": index}, KEY)["base"]
    noise = normal(split(example_keys(KEY, index), 2)[0], (4, 3))
    assert (np.abs(base[:, None] - noise[None]).max(axis=2) > 1e-3).all()


def test_without_noise_all_is_finite():
    found = loss(process_of("v"), {"x0": X0, "t": np.zeros(4, np.float32), "base": BASE})[0]
    assert np.isfinite(found).all()


def test_what_cannot_have_a_base_says_so():
    with pytest.raises(InvalidInput, match="the shape of 'base' in the batch is"):
        loss(process_of("x0"), {"x0": X0, "t": TIMES, "base": BASE[:, :2]})
    joint = processes.JointProcess({"a": process_of("x0"), "b": process_of("x0")})
    pair = {"a": X0, "b": X0}
    both = Network(lambda *_: {}, lambda params, x, t, cond, train=False, key=None: (x, {}))
    with pytest.raises(InvalidInput, match="the shape of 'base' in the batch is"):
        loss(joint, {"x0": pair, "t": TIMES, "base": pair}, both)
    with pytest.raises(InvalidInput, match="degrade is for data of one array; these have a, b"):
        loss(joint, {"x0": pair, "t": TIMES}, both, degrade=lambda key, x0, t: x0)
    with pytest.raises(InvalidInput, match="draws times before its loss"):
        objectives.degraded(Objective(lambda *_: (), lambda *_: None), lambda key, x0, t: x0)


PICTURES = {
    "perturbed": objectives.perturbed(0.3),
    "tinted": objectives.tinted(0.3),
    "distorted": objectives.tinted(0.3, cells=3),
    "moved": objectives.warped(2.0),
    "deformed": objectives.warped(1.0, cells=3),
    "blurred": objectives.blurred(1.0),
    "thickened": objectives.thickened(1.0),
    "all": objectives.one_after_another([objectives.warped(1.0, 3), objectives.blurred(0.5)]),
    "twice": objectives.one_after_another([objectives.perturbed(0.3)] * 2),
}


def test_degradations_grow_as_the_noise_falls_and_leave_pure_noise_alone():
    picture = jnp.where(jnp.square(jnp.arange(8) - 3.5)[:, None] + jnp.square(jnp.arange(8) - 3.0) < 6, 1.0, -1.0)
    picture = jnp.stack([picture, 0.5 * picture], axis=-1)
    flat = jnp.full((8, 8, 2), 0.25)
    keys, times = jax.random.split(KEY, 16), jnp.asarray([1.0, 0.5, 0.0])

    @jax.jit
    def run():
        def by_time(degrade, x0):
            return jax.vmap(lambda t: jax.vmap(lambda key: degrade(key, x0, t))(keys))(times)

        places = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0), indexing="ij"), axis=-1)
        other = jax.vmap(lambda key: PICTURES["moved"](key, places, 0.5))(keys)
        turned = jax.vmap(lambda key: PICTURES["blurred"](key, picture.swapaxes(0, 1), 0.0))(keys)
        return {name: (by_time(f, picture), by_time(f, flat)) for name, f in PICTURES.items()}, (other, turned)

    answers, (away, turned) = run()
    # Rows and columns go their own ways, and a blur knows no direction.
    assert np.abs(away[:, 3, 3, 0] - away[:, 3, 3, 1]).min() > 1e-3
    np.testing.assert_allclose(turned, answers["blurred"][0][2].swapaxes(1, 2), atol=1e-5)
    for name, (found, even) in answers.items():
        np.testing.assert_array_equal(found[0], np.broadcast_to(picture, found[0].shape), err_msg=name)
        change = np.abs(found - picture).mean(axis=(1, 2, 3, 4))
        assert 0 == change[0] < change[1] < change[2], name
        if name not in ("perturbed", "tinted", "distorted", "twice"):
            # What has no shape keeps it, and no new brightness appears.
            np.testing.assert_allclose(even, 0.25, atol=1e-5)
            assert found.min() >= -1 - 1e-5 and found.max() <= 1 + 1e-5
    shift = answers["tinted"][0][2] - picture
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)
    # Every channel has a colour of its own, and every part of a chain a key of its own: variances add up.
    assert np.abs(shift[..., 0] - shift[..., 1]).min() > 1e-4
    np.testing.assert_allclose((answers["twice"][0][2] - picture).std(), 0.3 * np.sqrt(2), rtol=0.05)
    with pytest.raises(InvalidInput, match=r"one picture \[H, W, C\] at one time"):
        objectives.blurred()(KEY, jnp.zeros((3, 4)), 0.5)
    with pytest.raises(InvalidInput, match=r"such as \[perturbed\(\)\]"):
        objectives.one_after_another([])
    with pytest.raises(InvalidInput, match="none negative"):
        objectives.warped(-1.0)


def test_a_config_trains_from_degraded_answers_with_a_bounded_weight():
    config = call(
        "objectives.denoising",
        degrade=call("objectives.one_after_another", parts=(call("objectives.perturbed", amount=0.5),)),
        weight=call("timesteps.low_noise_weight", floor=0.05),
    )
    process = process_of("v")
    times = jnp.asarray([0.01, 0.1, 0.5, 1.0])
    batch = {"x0": jnp.asarray(X0), "t": times}
    objective = build(config, network=SEEN, process=process)
    base = objective.prepare((), batch, KEY)
    shares = np.asarray(timesteps.low_noise_weight()(process, times))
    np.testing.assert_allclose(shares, np.minimum(1, np.square(process.sigma(times)) / 0.05), rtol=1e-6)
    assert shares[0] < 0.1 and shares[2] == shares[3] == 1
    found, plain = objective.loss(0.0, (), batch, KEY)[0], loss(process, base)[0]
    np.testing.assert_allclose(found, shares * plain, rtol=1e-5)
    # The target of v is larger than 1 / sigma times what was added, but what is trained is bounded.
    added = np.square(base["base"] - X0).mean(axis=1)
    assert plain[0] > 5 * found[0] and found[0] < 4 * (1 + added[0] / 0.05)
