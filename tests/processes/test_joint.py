"""A joint process is its entries side by side, Gaussian and discrete, with times of their own or one for all."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, randomness
from diffusion_jax.errors import InvalidInput

PARTS = {"text": processes.absorbing(5), "image": processes.rectified_flow(), "action": processes.edm()}
JOINT = processes.JointProcess(PARTS)
SHAPES = {"image": (2, 3, 3, 1), "text": (2, 4), "action": (2, 6)}
X0 = {
    "image": jnp.ones(SHAPES["image"]),
    "text": jnp.ones(SHAPES["text"], jnp.int32),
    "action": jnp.full(SHAPES["action"], 0.5),
}
OUTPUT = {**X0, "text": jnp.zeros((2, 4, 5))}


@pytest.mark.parametrize(
    "t",
    [
        0.4,
        jnp.array([0.2, 0.9]),
        {"image": jnp.array([0.1, 0.5]), "text": jnp.full((2, 4), 0.7), "action": jnp.float32(0.0)},
    ],
)
def test_joint_equals_separate(t):
    key = jax.random.key(0)
    keys = dict(zip(sorted(PARTS), randomness.split(key, 3), strict=True))
    x_t, noise = JOINT.corrupt(key, X0, t)
    prediction = JOINT.predict(OUTPUT, x_t, t)
    results = {
        "x_t": x_t,
        "noise": noise,
        "x0": prediction.x0,
        "eps": prediction.eps,
        "target": JOINT.target(X0, noise, t),
        "input": JOINT.network_input(x_t, t),
        "time": JOINT.network_time(t),
        "prior": JOINT.prior(key, SHAPES),
        "alpha": JOINT.alpha(t),
    }
    for name, process in PARTS.items():
        own = t[name] if isinstance(t, dict) else t
        own_x_t, own_noise = process.corrupt(keys[name], X0[name], own)
        alone = process.predict(OUTPUT[name], own_x_t, own)
        expected = {
            "x_t": own_x_t,
            "noise": own_noise,
            "x0": alone.x0,
            "eps": alone.eps,
            "target": process.target(X0[name], own_noise, own),
            "input": process.network_input(own_x_t, own),
            "time": process.network_time(own),
            "prior": process.prior(keys[name], SHAPES[name]),
            "alpha": process.alpha(own),
        }
        for field, value in expected.items():
            chex.assert_trees_all_equal(results[field][name], value)


def test_velocity_and_score_of_the_gaussian_entries():
    joint = processes.JointProcess({"a": PARTS["image"], "b": PARTS["action"]})
    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4))}
    prediction = joint.from_x0(x, {"a": 2 * x["a"], "b": 3 * x["b"]}, 0.5)
    for name, process in joint.processes.items():
        alone = process.from_x0(x[name], (2 if name == "a" else 3) * x[name], 0.5)
        np.testing.assert_array_equal(joint.velocity(prediction, 0.5)[name], process.velocity(alone, 0.5))
        np.testing.assert_array_equal(joint.score(prediction, 0.5)[name], process.score(alone, 0.5))


def test_hashable_and_equal_whatever_the_order():
    again = processes.JointProcess(dict(reversed(PARTS.items())))
    assert again == JOINT and hash(again) == hash(JOINT)
    assert JOINT.processes == PARTS


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: processes.JointProcess({}), "at least one entry"),
        (lambda: JOINT.corrupt(jax.random.key(0), X0["image"], 0.5), "x0 is one array"),
        (lambda: JOINT.corrupt(jax.random.key(0), X0, {"image": 0.1}), r"t has keys \['image'\]"),
        (lambda: JOINT.predict({"image": X0["image"]}, X0, 0.5), "network_output has keys"),
        (lambda: JOINT.prior(jax.random.key(0), {"img": (2, 3)}), "shape has keys"),
    ],
)
def test_wrong_keys_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
