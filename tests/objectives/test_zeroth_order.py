import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives import zeroth_order, zeroth_order_gradient
from diffusion_jax.training import init_state, make_train_step
from diffusion_jax.typing import Aux, Objective

D = 8
CURVE = np.linspace(0.5, 2.0, D, dtype=np.float32)
THETA = np.linspace(-1.0, 1.5, D, dtype=np.float32)


def quadratic(theta):
    return 0.5 * (CURVE * theta**2).sum(), None


def test_its_mean_is_the_gradient_and_its_variance_that_of_the_number_of_directions():
    truth = CURVE * THETA
    keys = jax.random.split(jax.random.key(0), 4000)

    def spread(directions):
        one = lambda key: zeroth_order_gradient(quadratic, THETA, key, directions, 1e-2)[1]  # noqa: E731
        found = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
        return found.mean(axis=0), ((found - truth) ** 2).sum(axis=1).mean() / (truth**2).sum()

    (few, wide), (many, narrow) = spread(4), spread(8)
    for mean in (few, many):
        assert np.linalg.norm(mean - truth) < 0.06 * np.linalg.norm(truth)
    # E|g - grad|^2 = (d + 1) / n |grad|^2.
    np.testing.assert_allclose([wide, narrow], [(D + 1) / 4, (D + 1) / 8], rtol=0.1)


def noisy():
    """|theta - noise|^2 with much noise: the values of two draws of it differ by far more than a step changes them."""

    def loss(params, state, batch, key):
        noise = 3.0 * jax.random.normal(key, (len(batch["x0"]), D))
        return jnp.square(params["word"] - noise).sum(axis=-1), Aux(state, {}, {})

    return Objective(lambda key, params, batch: (), loss)


BATCH = {"x0": np.zeros((4, 1), np.float32)}


def test_all_evaluations_of_a_step_share_their_noise_so_the_radius_does_not_matter():
    own = zeroth_order(noisy(), directions=4).gradient
    params = {"word": THETA}
    ask = jax.jit(lambda mu: zeroth_order(noisy(), 4, mu).gradient(params, (), BATCH, jax.random.key(3)))
    first = ask(np.float32(1e-3))
    for radius in (1e-4, 1e-2):
        other = ask(np.float32(radius))
        size = np.linalg.norm(first[1]["word"])
        # The values are about 100: at the smallest radius float32 has 0.1 of rounding in a difference quotient.
        assert np.linalg.norm(other[1]["word"] - first[1]["word"]) < 0.05 * size
        assert float(other[0]) == float(first[0])
    plain = noisy().loss(params, (), BATCH, jax.random.key(3))[0].mean()
    np.testing.assert_allclose(first[0], plain, rtol=1e-6)
    np.testing.assert_allclose(own(params, (), BATCH, jax.random.key(3))[1]["word"], first[1]["word"], rtol=1e-2)


def test_directions_in_turn_at_once_and_on_eight_devices_are_one_gradient():
    key, mesh = jax.random.key(1), make_mesh()
    ways = [{"parallel": 1}, {"parallel": 3}, {"parallel": 8}, {"mesh": mesh}]
    one, *others = jax.jit(lambda: [zeroth_order_gradient(quadratic, THETA, key, 8, 1e-2, **way)[1] for way in ways])()
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_it_learns_where_there_is_no_derivative():
    def loss(params, state, batch, key):
        near = jax.lax.stop_gradient(jnp.round(params["word"] * 1000.0) / 1000.0)
        return jnp.square(near - 1.0).sum()[None].repeat(len(batch["x0"])), Aux(state, {}, {})

    objective = zeroth_order(Objective(lambda key, params, batch: (), loss), 4, 1e-2)
    optimizer = optax.adam(0.05)
    step = make_train_step(objective, optimizer)
    state = init_state(objective, optimizer, lambda key: {"word": jnp.zeros(D)}, BATCH)
    for _ in range(60):
        state, metrics = step(state, BATCH)
    assert float(metrics["loss"]) < 0.1 * D
    blind = jax.grad(lambda params: loss(params, (), BATCH, None)[0].mean())({"word": jnp.zeros(D)})
    assert not np.any(blind["word"])


def test_it_needs_the_memory_of_a_forward_pass():
    weights = np.random.default_rng(0).normal(size=(24, 32, 32)).astype(np.float32) / 6.0
    x = np.random.default_rng(1).normal(size=(1024, 32)).astype(np.float32)
    word = np.zeros(32, np.float32)

    def loss(word, weights, x):
        return jnp.square(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x + word, weights)[0]).mean()

    def estimated(word, weights, x):
        return zeroth_order_gradient(lambda word: (loss(word, weights, x), None), word, jax.random.key(0), 2)[1]

    def held(function):
        told = jax.jit(function).lower(word, weights, x).compile().memory_analysis()
        return told.temp_size_in_bytes + told.argument_size_in_bytes

    forward = held(loss)
    assert held(estimated) <= 1.2 * forward
    assert held(jax.grad(loss)) >= 3.0 * held(estimated)


def test_wrong_arguments_are_told():
    for wrong in ({"directions": 0}, {"radius": 0.0}, {"parallel": 0}, {"directions": 3, "mesh": make_mesh()}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            zeroth_order(noisy(), **wrong)
    with pytest.raises(InvalidInput, match="float32"):
        zeroth_order_gradient(quadratic, THETA.astype(np.float16), jax.random.key(0))
    with pytest.raises(InvalidInput):
        zeroth_order(zeroth_order(noisy()))
