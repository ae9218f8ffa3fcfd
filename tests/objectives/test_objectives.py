"""Losses equal values written by hand, and their randomness belongs to examples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, processes, timesteps
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes.discrete import absorbing
from diffusion_jax.processes.discrete import uniform as uniform_tokens
from diffusion_jax.processes.joint import JointProcess
from diffusion_jax.typing import Network

KEY = jax.random.key(3)


def network(function):
    """A network without parameters: `function(x, t, cond)`."""
    return Network(lambda *_: {}, lambda params, x, t, cond, train=False, key=None: (function(x, t, cond), {}))


def gaussian(prediction="x0", time="t"):
    return processes.rectified_flow(prediction=prediction, time=time)


def zero(x, t, cond):
    return jnp.zeros_like(x)


def losses(objective, batch, key=KEY):
    state = objective.init(KEY, {}, batch)
    return jax.jit(lambda batch: objective.loss({}, state, batch, key))(batch)


def test_the_loss_is_the_one_written_by_hand():
    x0 = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    objective = objectives.denoising(network(zero), gaussian("x0"))
    loss, aux = losses(objective, {"x0": x0})
    np.testing.assert_allclose(loss, [2.5, 12.5], rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["mse"], 7.5, rtol=1e-6)

    # weight(t) = t at t = 1/2, and a draw that asks for three times the loss.
    weighted = objectives.denoising(network(zero), gaussian("x0"), weight=lambda process, t: t)
    loss, aux = losses(weighted, {"x0": x0, "t": jnp.full((2,), 0.5), "t_weight": jnp.full((2,), 3.0)})
    np.testing.assert_allclose(loss, [3.75, 18.75], rtol=1e-6)
    np.testing.assert_allclose(aux.per_example["loss"], [1.25, 6.25], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "velocity", "score"])
def test_a_network_that_knows_the_data_has_no_loss(prediction):
    process = gaussian(prediction)
    x0 = jax.random.normal(KEY, (4, 3))

    def oracle(x, t, cond):
        t = t[:, None]
        eps = (x - (1 - t) * x0) / t
        return process.target(x0, eps, t[:, 0])

    t = jnp.asarray([0.2, 0.5, 0.7, 1.0])
    loss, _ = losses(objectives.denoising(network(oracle), process), {"x0": x0, "t": t})
    assert float(jnp.max(loss)) < 1e-9
    perturbed = objectives.denoising(network(lambda *args: oracle(*args) + 0.1), process)
    np.testing.assert_allclose(losses(perturbed, {"x0": x0, "t": t})[0], 0.01, rtol=1e-3)


def test_noise_and_dropped_conditions_belong_to_the_example():
    objective = objectives.denoising(
        network(lambda x, t, cond: x * cond["label"][:, None]),
        gaussian("epsilon"),
        cond_dropout=0.5,
        null={"label": 0},
    )
    batch = {
        "x0": jax.random.normal(KEY, (8, 3)),
        "cond": {"label": jnp.arange(1, 9)},
        "index": jnp.arange(100, 108),
        "t": jnp.linspace(0.1, 0.9, 8),
    }
    whole = losses(objective, batch)[0]
    order = jnp.asarray([5, 2, 7])
    some = losses(objective, jax.tree.map(lambda leaf: leaf[order], batch))[0]
    np.testing.assert_allclose(some, whole[order], rtol=1e-6)
    assert not np.allclose(losses(objective, {**batch, "index": jnp.arange(8)})[0], whole)
    assert not np.allclose(losses(objective, batch, jax.random.key(4))[0], whole)


def test_conditions_are_dropped_by_example_and_only_those_named():
    seen = {}

    def look(x, t, cond):
        seen.update(cond)
        return x

    size = 4096
    cond = {"label": jnp.ones((size,), jnp.int32), "context": jnp.ones((size, 2, 3)), "pooled": jnp.ones((size, 1))}
    objective = objectives.denoising(network(look), gaussian(), cond_dropout=0.25, null={"label": 10, "context": 0.0})
    objective.loss({}, (), {"x0": jnp.zeros((size, 1)), "cond": cond}, KEY)
    dropped = np.asarray(seen["label"]) == 10
    assert abs(dropped.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / size)
    np.testing.assert_array_equal(seen["context"], np.where(dropped[:, None, None], 0.0, np.ones((size, 2, 3))))
    np.testing.assert_array_equal(seen["pooled"], 1)


def test_times_may_vary_over_leading_axes():
    objective = objectives.denoising(network(lambda x, t, cond: x * t[..., None]), gaussian(), t_shape=2)
    batch = objective.prepare(objective.init(KEY, {}, {}), {"x0": jnp.ones((4, 6, 3))}, KEY)
    assert batch["t"].shape == (4, 6)
    assert len(np.unique(batch["t"])) == 24
    assert losses(objective, batch)[0].shape == (4,)


def test_joint_data_sums_its_modalities_each_with_its_own_time():
    process = JointProcess({"a": gaussian(), "b": gaussian(), "words": absorbing(5)})
    draws = {name: timesteps.importance(num_buckets=4, history=1) for name in ("a", "b", "words")}

    def silent(x, t, cond):
        return {"a": jnp.zeros_like(x["a"]), "b": jnp.zeros_like(x["b"]), "words": jnp.zeros((*x["words"].shape, 5))}

    batch = {"x0": {"a": jnp.full((8, 2), 2.0), "b": jnp.full((8, 2, 2), 3.0), "words": jnp.zeros((8, 4), jnp.int32)}}
    objective = objectives.denoising(network(silent), process, draws)
    loss, aux = losses(objective, batch)
    words = aux.per_example["loss"] - 4.0 - 9.0
    assert bool(jnp.all(words >= -1e-5)) and bool(jnp.any(words > 0))
    assert aux.metrics["mse/a"] == 4.0 and aux.metrics["mse/b"] == 9.0
    np.testing.assert_allclose(aux.metrics["cross_entropy/words"], math.log(5), rtol=1e-4)
    times = aux.per_example["t"]
    assert not np.allclose(times["a"], times["b"])
    # Each draw has learned from its own modality alone.
    np.testing.assert_array_equal(np.unique(aux.state["a"].losses[aux.state["a"].count > 0]), [4.0])
    assert int(aux.state["b"].count.sum()) == 8

    shared = objectives.denoising(network(silent), process)
    assert losses(shared, batch)[1].per_example["t"].shape == (8,)
    assert loss.shape == (8,)


def test_a_name_in_place_of_a_draw_is_the_time_of_that_modality():
    process = JointProcess({"a": gaussian(), "b": gaussian(), "c": gaussian()})
    learned = timesteps.importance(num_buckets=4, history=1)
    silent = network(lambda x, t, cond: jax.tree.map(jnp.zeros_like, x))
    batch = {"x0": {name: jnp.full((8, 2), value) for name, value in (("a", 2.0), ("b", 3.0), ("c", 4.0))}}
    _, aux = losses(objectives.denoising(silent, process, {"a": learned, "b": "a", "c": timesteps.uniform()}), batch)
    times = aux.per_example["t"]
    np.testing.assert_array_equal(times["a"], times["b"])
    assert not np.allclose(times["a"], times["c"])
    # The draw learns from the modality whose it is.
    assert set(aux.state) == {"a", "c"}
    np.testing.assert_array_equal(np.unique(aux.state["a"].losses[aux.state["a"].count > 0]), [4.0])
    with pytest.raises(InvalidInput, match="draw\\['b'\\] is 'd'"):
        losses(objectives.denoising(silent, process, {"a": learned, "b": "d", "c": learned}), batch)


def test_the_bound_of_masked_diffusion_is_the_entropy_when_the_network_knows_the_distribution():
    # Independent tokens: the best prediction is their distribution, and the bound is tight for every schedule.
    probabilities = np.asarray([0.5, 0.25, 0.125, 0.125])
    entropy = -(probabilities * np.log(probabilities)).sum()
    tokens = jax.random.choice(KEY, 4, (4096, 8), p=jnp.asarray(probabilities))
    logits = jnp.log(jnp.asarray(probabilities))
    known = network(lambda x, t, cond: jnp.broadcast_to(logits, (*x.shape, 4)))
    for schedule in ("linear", "cosine"):
        objective = objectives.masked(known, absorbing(4, schedule), timesteps.stratified())
        loss = np.asarray(losses(objective, {"x0": tokens})[0])
        error = loss.std() / math.sqrt(loss.size)
        assert abs(loss.mean() - entropy) < 4 * error, (schedule, loss.mean(), entropy, error)
        assert error < 0.1 * entropy


def test_token_weightings_written_by_hand():
    tokens = jnp.zeros((16, 8), jnp.int32)
    flat = network(lambda x, t, cond: jnp.zeros((*x.shape, 4)))
    batch = {"x0": tokens, "t": jnp.full((16,), 0.5)}
    process = absorbing(4)
    share = jnp.mean(
        process.is_masked(process.corrupt(_noise_keys(jnp.arange(16)), tokens, jnp.full((16,), 0.5))[0]), axis=1
    )
    bound = losses(objectives.masked(flat, process), batch)[0]
    np.testing.assert_allclose(bound, 2.0 * share * math.log(4), rtol=1e-5)
    plain = losses(objectives.masked(flat, process, weighting="cross_entropy"), batch)[0]
    np.testing.assert_allclose(plain, np.where(share > 0, math.log(4), 0.0), rtol=1e-5)
    anywhere = objectives.masked(flat, uniform_tokens(4), weighting="cross_entropy")
    np.testing.assert_allclose(losses(anywhere, batch)[0], math.log(4), rtol=1e-5)
    gradient = jax.grad(
        lambda logit: losses(
            objectives.masked(network(lambda x, t, cond: jnp.zeros((*x.shape, 4)) + logit), process), batch
        )[0].sum()
    )(jnp.zeros((4,)))
    assert bool(jnp.all(jnp.isfinite(gradient))) and float(gradient[0]) < 0


def _noise_keys(index):
    from diffusion_jax.objectives.batches import example_keys
    from diffusion_jax.randomness import split

    return split(example_keys(KEY, index), 3)[0]


def test_validation_looks_at_the_middle_of_equal_bins():
    tells_time = network(lambda x, t, cond: jnp.broadcast_to(t[:, None], x.shape))
    evaluate = objectives.validation_loss(objectives.denoising(tells_time, gaussian("x0"), train=False))
    found = jax.jit(evaluate)({}, (), {"x0": jnp.zeros((3, 2))}, KEY)
    middles = np.asarray([1, 3, 5, 7, 9, 11, 13, 15]) / 16
    assert list(found) == ["loss"] + [f"loss/t={t:.4g}" for t in middles]
    np.testing.assert_allclose(list(found.values())[1:], middles**2, rtol=1e-6)
    np.testing.assert_allclose(found["loss"], np.mean(middles**2), rtol=1e-6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: objectives.denoising(network(zero), gaussian(), cond_dropout=1.5), "cond_dropout is 1.5"),
        (lambda: objectives.denoising(network(zero), gaussian(), cond_dropout=0.1), "needs null="),
        (lambda: objectives.denoising(network(zero), gaussian(), t_shape=0), "t_shape is 0"),
        (lambda: objectives.masked(network(zero), absorbing(4), weighting="nelb"), "did you mean 'nelbo'"),
        (lambda: objectives.validation_loss(objectives.denoising(network(zero), gaussian()), 0), "num_bins is 0"),
        (lambda: losses(objectives.denoising(network(zero), gaussian()), {"x": jnp.zeros((2, 2))}), "no 'x0'"),
        (
            lambda: losses(
                objectives.denoising(network(zero), gaussian(), cond_dropout=0.1, null={"labl": 0}),
                {"x0": jnp.zeros((2, 2)), "cond": {"label": jnp.zeros(2)}},
            ),
            "an entry of null is 'labl'",
        ),
        (
            lambda: losses(
                objectives.denoising(network(lambda x, t, c: x[:, :1]), gaussian()), {"x0": jnp.zeros((2, 2))}
            ),
            r"output shape is \(2, 1\)",
        ),
        (
            lambda: losses(objectives.denoising(network(zero), gaussian(), t_shape=3), {"x0": jnp.zeros((2, 2))}),
            "t_shape is 3",
        ),
        (
            lambda: losses(
                objectives.denoising(network(zero), gaussian(), {"a": timesteps.uniform()}), {"x0": jnp.zeros((2, 2))}
            ),
            "draw is",
        ),
        (
            lambda: losses(
                objectives.masked(network(lambda x, t, c: jnp.zeros((*x.shape, 4))), uniform_tokens(4)),
                {"x0": jnp.zeros((2, 2), jnp.int32)},
            ),
            "needs an absorbing process",
        ),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
