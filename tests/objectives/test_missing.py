"""Examples that lack a modality: what is missing is noise at t = 1, is never looked at, and has no loss."""

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
    jax.tree.map(np.testing.assert_array_equal, grads, again)
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
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_frames_that_are_missing_are_all_noise():
    clips = {"action": jnp.ones((4, 3, 2)), "image": jnp.ones((4, 3, 2))}
    made = objectives.denoising(NET, PROCESS, DRAWS, t_shape=2)
    flags = {"action": jnp.array([True, False, True, False])}
    out = made.prepare(made.init(KEY, None, {"x0": clips}), {"x0": clips, "missing": flags}, KEY)
    assert out["t"]["action"].shape == (4, 3)
    assert (out["t"]["action"][::2] == 1).all() and (out["t"]["action"][1::2] < 1).all()


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
