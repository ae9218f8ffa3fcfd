"""Examples that lack a modality: what is missing is noise at t = 1, is never looked at, and has no loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, processes, timesteps
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives.batches import example_keys
from diffusion_jax.randomness import split
from tests.denoisers.tiny import network

KEY = jax.random.key(3)
PROCESS = processes.JointProcess({"action": processes.rectified_flow(), "image": processes.cosine()})
NET = network()
DRAWS = {"action": timesteps.uniform(), "image": timesteps.uniform()}
X0 = {"action": jax.random.normal(KEY, (6, 3)), "image": jax.random.normal(jax.random.key(4), (6, 5))}
PARAMS = NET.init(KEY, X0, jnp.zeros(6), None)


def gradient(made, batch):
    state = made.init(KEY, PARAMS, batch)

    def loss(params):
        value, aux = made.loss(params, state, batch, KEY)
        return value.mean(), (value, aux)

    return jax.jit(jax.grad(loss, has_aux=True))(PARAMS)


@pytest.mark.parametrize("draw", [DRAWS, timesteps.uniform()], ids=["own", "shared"])
def test_nothing_depends_on_what_is_missing(draw):
    made = objectives.denoising(NET, PROCESS, draw)
    flags = {"action": jnp.arange(6) < 4}
    grads, (loss, aux) = gradient(made, {"x0": X0, "missing": flags})
    other = {**X0, "action": X0["action"].at[:4].set(jnp.nan)}
    again, _ = gradient(made, {"x0": other, "missing": flags})
    chex.assert_trees_all_equal(grads, again)
    t = aux.per_example["t"]
    assert (t["action"][:4] == 1).all() and (t["action"][4:] < 1).all() and (t["image"] < 1).all()
    # Examples that lack nothing are trained as before; the others have the loss of what they have.
    _, (whole, _) = gradient(made, {"x0": X0})
    np.testing.assert_array_equal(loss[4:], whole[4:])
    keys = split(example_keys(KEY, jnp.arange(6)), 3)[0]
    x_t, noise = PROCESS.corrupt(keys, {**X0, "action": jnp.zeros((6, 3))}, t)
    output, _ = NET.apply(PARAMS, PROCESS.network_input(x_t, t), PROCESS.network_time(t), None)
    square = (output["image"] - PROCESS.target(X0, noise, t)["image"]) ** 2
    np.testing.assert_allclose(loss[:4], square.mean(1)[:4], rtol=1e-5)


def test_times_that_the_batch_brings_are_pinned_too_and_preparing_twice_is_preparing_once():
    made = objectives.denoising(NET, PROCESS, DRAWS)
    batch = {"x0": X0, "missing": {"image": jnp.arange(6) % 2 == 0}, "t": jnp.full((6,), 0.5)}
    state = made.init(KEY, PARAMS, batch)
    once = made.prepare(state, batch, KEY)
    np.testing.assert_array_equal(once["t"]["image"], jnp.where(jnp.arange(6) % 2 == 0, 1.0, 0.5))
    np.testing.assert_array_equal(once["t_weight"]["image"], (jnp.arange(6) % 2 == 1).astype(jnp.float32))
    twice = made.prepare(state, once, KEY)
    chex.assert_trees_all_equal(once, twice)


def test_modalities_may_have_times_over_different_axes():
    x0 = {**X0, "action": jax.random.normal(KEY, (6, 3, 2))}
    params, axes = NET.init(KEY, x0, jnp.zeros(6), None), {"action": 2, "image": "batch"}
    made = objectives.denoising(NET, PROCESS, DRAWS, t_shape=axes)
    out = made.prepare(made.init(KEY, None, {"x0": x0}), {"x0": x0}, KEY)
    assert out["t"]["action"].shape == (6, 3) and out["t"]["image"].shape == (6,)
    # Each entry has its own weight.
    half = {**out, "t_weight": {**out["t_weight"], "action": out["t_weight"]["action"].at[:, 1:].set(0.0)}}
    (loss, aux), (part, _) = (told(PROCESS, batch, params, t_shape=axes) for batch in (out, half))
    assert (part < loss).all() and (part > aux.per_example["loss/image"]).all()
    for draw, shape in ((timesteps.uniform(), axes), (DRAWS, {"action": 2})):
        with pytest.raises(InvalidInput, match="a dict needs a dict of draws"):
            objectives.denoising(NET, PROCESS, draw, t_shape=shape)


def test_frames_that_are_missing_are_all_noise():
    clips = {"action": jnp.ones((4, 3, 2)), "image": jnp.ones((4, 3, 2))}
    made = objectives.denoising(NET, PROCESS, DRAWS, t_shape=2)
    flags = {"action": jnp.array([True, False, True, False])}
    out = made.prepare(made.init(KEY, None, {"x0": clips}), {"x0": clips, "missing": flags}, KEY)
    assert out["t"]["action"].shape == (4, 3)
    assert (out["t"]["action"][::2] == 1).all() and (out["t"]["action"][1::2] < 1).all()


NOISE = processes.JointProcess({"action": processes.rectified_flow("epsilon"), "image": processes.cosine()})
FLAGS = {"action": jnp.array([True, True, False, False, False, False])}


def told(process, batch, params=PARAMS, draw=DRAWS, **options):
    made = objectives.denoising(NET, process, draw, **options)
    return jax.jit(lambda batch: made.loss(params, made.init(KEY, params, batch), batch, KEY))(batch)


def test_the_noise_of_what_is_missing_may_count():
    """A network of zeros: an example without actions then has the loss of what it has, and the square of its noise."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    batch = {"x0": X0, "missing": FLAGS}
    masked, aux = told(NOISE, batch, zeros)
    counted, other = told(NOISE, batch, zeros, missing_weight=2.0)
    noise = NOISE.corrupt(split(example_keys(KEY, jnp.arange(6)), 3)[0], X0, aux.per_example["t"])[1]["action"]
    np.testing.assert_allclose(
        counted - masked, jnp.where(FLAGS["action"], 2.0 * (noise**2).mean(1), 0.0), rtol=1e-5, atol=1e-6
    )
    # What is told is about what there is, in both cases.
    assert (aux.per_example["loss/action"][:2] == 0).all() and (aux.per_example["loss/action"][2:] > 0).all()
    np.testing.assert_allclose(aux.metrics["mse/action"], (noise[2:] ** 2).mean(), rtol=1e-5)
    chex.assert_trees_all_equal((aux.metrics, aux.per_example), (other.metrics, other.per_example))
    with pytest.raises(
        InvalidInput, match=r"missing_weight is 2\.0, but the network predicts other things of 'action'"
    ):
        told(PROCESS, batch, missing_weight=2.0)


def test_modalities_count_as_much_as_they_are_told():
    plain, weighed = (told(PROCESS, {"x0": X0}, modality_weights=weights) for weights in (None, {"image": 3.0}))
    parts = [plain[1].per_example[f"loss/{name}"] for name in ("action", "image")]
    np.testing.assert_allclose(plain[0], parts[0] + parts[1], rtol=1e-6)
    np.testing.assert_allclose(weighed[0], parts[0] + 3 * parts[1], rtol=1e-6)
    np.testing.assert_allclose(weighed[1].per_example["loss"], weighed[0], rtol=1e-6)
    chex.assert_trees_all_equal(plain[1].metrics, weighed[1].metrics)
    found = objectives.validation_loss(objectives.denoising(NET, PROCESS, modality_weights={"action": 0}), 2)(
        PARAMS, (), {"x0": X0, "missing": {"image": jnp.ones(6, bool)}}, KEY
    )
    assert float(found["loss"]) == 0
    for weights, words in (({"imgae": 1.0}, "did you mean 'image'"), ({"image": -1.0}, "must not be negative")):
        with pytest.raises(InvalidInput, match=words):
            objectives.denoising(NET, PROCESS, modality_weights=weights)
    with pytest.raises(InvalidInput, match="missing_weight is -1"):
        objectives.denoising(NET, PROCESS, missing_weight=-1)


def test_draws_learn_nothing_from_what_is_missing():
    draws = {name: timesteps.importance(num_buckets=2, history=8) for name in DRAWS}
    counts = told(PROCESS, {"x0": X0, "missing": FLAGS}, draw=draws)[1].state
    assert int(counts["action"].count.sum()) == 4 and int(counts["image"].count.sum()) == 6


@pytest.mark.parametrize(
    ("draw", "batch", "words"),
    [
        (DRAWS, {"x0": X0, "missing": {"sound": jnp.ones(6, bool)}}, "missing is"),
        (timesteps.uniform(), {"x0": X0["action"], "missing": {"action": jnp.ones(6, bool)}}, "one array"),
        (timesteps.importance(), {"x0": X0, "missing": {"action": jnp.ones(6, bool)}}, "one learned draw"),
    ],
)
def test_wrong_flags_are_told(draw, batch, words):
    made = objectives.denoising(NET, PROCESS, draw)
    with pytest.raises(InvalidInput, match=words):
        made.prepare(made.init(KEY, PARAMS, batch), batch, KEY)


# How much entries count (`weight` of the batch)


def test_what_weighs_nothing_has_no_loss_and_no_gradient():
    process, net = processes.rectified_flow(), network()
    x0 = jax.random.normal(KEY, (4, 5))
    params = net.init(KEY, x0, jnp.zeros(4), None)
    made = objectives.denoising(net, process)
    weight = jnp.asarray([[1, 1, 0, 0, 0.5]] * 4)
    state = made.init(KEY, params, {"x0": x0})

    def values(batch):
        loss, aux = made.loss(params, state, batch, KEY)
        return loss, aux.per_example["t"]

    loss, t = values({"x0": x0, "weight": weight})
    keys = split(example_keys(KEY, jnp.arange(4)), 3)[0]
    x_t, noise = process.corrupt(keys, x0, t)
    square = (net.apply(params, *process_inputs(process, x_t, t), None)[0] - process.target(x0, noise, t)) ** 2
    np.testing.assert_allclose(loss, (weight * square).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(values({"x0": x0, "weight": jnp.ones((4, 1))})[0], values({"x0": x0})[0])
    for wrong in (jnp.ones((4, 3)), jnp.ones((4, 5, 1)), {"image": weight}, jnp.ones(())):
        with pytest.raises(InvalidInput, match="weight"):
            values({"x0": x0, "weight": wrong})


def process_inputs(process, x_t, t):
    return process.network_input(x_t, t), process.network_time(t)


def test_modalities_weigh_their_own_entries():
    made = objectives.denoising(NET, PROCESS, DRAWS)
    _, (loss, aux) = gradient(made, {"x0": X0})
    _, (half, again) = gradient(made, {"x0": X0, "weight": {"image": jnp.full((6, 1), 0.5)}})
    np.testing.assert_array_equal(aux.per_example["loss/action"], again.per_example["loss/action"])
    np.testing.assert_allclose(0.5 * aux.per_example["loss/image"], again.per_example["loss/image"], rtol=1e-6)
    np.testing.assert_allclose(loss - half, 0.5 * aux.per_example["loss/image"], rtol=1e-4)
    with pytest.raises(InvalidInput, match="weight"):
        gradient(made, {"x0": X0, "weight": {"text": jnp.ones((6, 1))}})
