"""Schedules pass through their corner points; every optimiser goes downhill and decays only what it is told to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.training import optimizers


def test_schedules_pass_through_their_corners():
    cosine = optimizers.cosine(1.0, total_steps=110, warmup_steps=10, end=0.1)
    np.testing.assert_allclose([cosine(c) for c in (0, 9, 10, 60, 110, 500)], [0.1, 1, 1, 0.55, 0.1, 0.1], rtol=1e-5)
    linear = optimizers.linear(1.0, total_steps=110, warmup_steps=10)
    np.testing.assert_allclose([linear(c) for c in (4, 10, 60, 110)], [0.5, 1, 0.5, 0], atol=1e-6)
    root = optimizers.inverse_sqrt(1.0, flat_steps=100, warmup_steps=4)
    np.testing.assert_allclose([root(c) for c in (0, 50, 100, 400)], [0.25, 1, 1, 0.5], rtol=1e-5)
    np.testing.assert_allclose([optimizers.constant(2.0, 4)(c) for c in (0, 3, 9)], [0.5, 2, 2])


PARAMS = {
    "blocks": {"q": {"kernel": jnp.ones((2, 8, 16)), "bias": jnp.ones((2, 16))}},
    "final": {"kernel": jnp.ones((16, 4))},
}


@pytest.mark.parametrize(
    "optimizer",
    [
        optimizers.adamw(0.05),
        optimizers.adafactor(0.05, min_dim_size_to_factor=4),
        optimizers.muon(0.05, adam_learning_rate=0.05),
        optimizers.sgd(0.05, momentum=0.9, nesterov=True),
    ],
    ids=["adamw", "adafactor", "muon", "sgd"],
)
def test_every_optimiser_goes_downhill(optimizer):
    noise = jax.random.normal(jax.random.key(0), (2, 8, 16))

    def loss(params):
        target = {"blocks": {"q": {"kernel": noise, "bias": 0.5}}, "final": {"kernel": 0.0}}
        return sum(jnp.mean((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target)))

    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    values = jax.jit(lambda: jax.lax.scan(body, (PARAMS, optimizer.init(PARAMS)), length=60)[1])()
    assert float(values[-1]) < 0.6 * float(values[0])


def test_only_the_named_parameters_decay():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for optimizer in (optimizers.adamw(0.1, weight_decay=0.5), optimizers.adafactor(0.1, weight_decay=0.5)):
        updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["blocks"]["q"]["kernel"], -0.05, rtol=1e-5)
        np.testing.assert_array_equal(updates["blocks"]["q"]["bias"], 0.0)


def test_muon_orthogonalises_each_layer_of_a_stack_on_its_own():
    optimizer = optimizers.muon(1.0, consistent_rms=None)
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), PARAMS)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    stack = updates["blocks"]["q"]["kernel"]
    singular = jnp.linalg.svd(stack, compute_uv=False)
    # Newton-Schulz of five steps brings singular values near one scale, whatever the gradient's were.
    assert float(singular.max() / singular.min()) < 2.0
    assert float(jnp.linalg.cond(grads["blocks"]["q"]["kernel"]).max()) > 3.0
    alone = {"blocks": {"q": {"kernel": grads["blocks"]["q"]["kernel"].at[1].set(0.1)}}}
    alone = {**grads, "blocks": {"q": {**grads["blocks"]["q"], **alone["blocks"]["q"]}}}
    np.testing.assert_allclose(
        jax.jit(optimizer.update)(alone, optimizer.init(PARAMS), PARAMS)[0]["blocks"]["q"]["kernel"][0],
        stack[0],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: optimizers.adamw(-1.0), "learning_rate is -1.0"),
        (lambda: optimizers.adamw(b1=1.0), "b1 is 1.0"),
        (lambda: optimizers.adamw(decayed="("), "regular expression"),
        (lambda: optimizers.cosine(1.0, total_steps=10, warmup_steps=10), "total_steps is 10"),
        (lambda: optimizers.inverse_sqrt(1.0, flat_steps=0), "flat_steps is 0"),
        (lambda: optimizers.linear(1.0, end=-1.0), "end is -1.0"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


def test_networks_trained_in_turns_move_at_their_own_pace():
    parts = {"slow": optimizers.adamw(0.1), "fast": optimizers.sgd(0.1)}
    optimizer = optimizers.alternating(parts, {"slow": 3})
    params = grads = {"slow": jnp.ones(2), "fast": jnp.ones(2)}
    state = optimizer.init(params)
    alone = parts["slow"].init(params["slow"])
    for step in range(5):
        updates, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["fast"], -0.1, rtol=1e-6)
        if step % 3:
            np.testing.assert_array_equal(updates["slow"], 0.0)
        else:
            # Its moments are those of its own steps.
            expected, alone = parts["slow"].update(grads["slow"], alone, params["slow"])
            np.testing.assert_allclose(updates["slow"], expected, rtol=1e-6)
    with pytest.raises(InvalidInput, match="at least 1"):
        optimizers.alternating(parts, {"slow": 0})
    with pytest.raises(InvalidInput, match="slow"):
        optimizers.alternating(parts, {"slo": 2})
    with pytest.raises(InvalidInput, match="one optimiser for each"):
        optimizer.init({"slow": 1.0})
