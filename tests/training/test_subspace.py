import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.objectives import zeroth_order_gradient
from diffusion_jax.training import still_directions, subspace_gradient

D, WINDOW = 24, 8


def a_trail(seed=0):
    """A walk that goes far in two directions and little in the others."""
    rng = np.random.default_rng(seed)
    far = np.cumsum(rng.normal(size=(WINDOW, 2)), axis=0) @ rng.normal(size=(2, D))
    return (far + 0.01 * rng.normal(size=(WINDOW, D))).astype(np.float32)


FOUND = jax.jit(still_directions)


def test_what_is_removed_is_an_orthonormal_part_of_the_trail():
    trail = a_trail()
    rows = np.asarray(FOUND(trail, 1e-2), np.float64)
    there = rows[np.any(rows != 0, axis=1)]
    assert 4 <= len(there) <= WINDOW - 2
    np.testing.assert_allclose(there @ there.T, np.eye(len(there)), atol=1e-5)
    keep = np.eye(D) - rows.T @ rows
    np.testing.assert_allclose(keep @ keep, keep, atol=1e-5)
    # All of it lies in the span of the standardised trail, so the complement of that span is kept.
    standardised = (trail - trail.mean(axis=0)) / trail.std(axis=0)
    span = np.linalg.svd(standardised.astype(np.float64))[2][: WINDOW - 1]
    np.testing.assert_allclose(there @ span.T @ span, there, atol=1e-4)


def test_a_small_share_keeps_all_a_large_one_leaves_the_first_and_what_stands_still_loses_nothing():
    count = lambda rows: int(np.any(np.asarray(rows) != 0, axis=1).sum())  # noqa: E731
    assert count(FOUND(a_trail(), 1e-7)) == 0
    # One direction of the w has no variance, since the trail is centred.
    assert count(FOUND(a_trail(), 0.999)) == WINDOW - 2
    still = np.asarray(FOUND(np.ones((WINDOW, D), np.float32), 1e-3))
    assert np.isfinite(still).all() and count(still) == 0


def a_run(optimizer, steps, seed=0, rank=2, directions=2):
    """Losses and values of a word whose loss reads `rank` of its D numbers, learned by values of the loss."""
    read = np.linalg.qr(np.random.default_rng(5).normal(size=(D, rank)))[0].astype(np.float32)

    def loss(word):
        return jnp.square(word @ read - 1.0).sum(), None

    def step(carry, key):
        word, state = carry
        value, grads, _ = zeroth_order_gradient(loss, word, key, directions, 1e-3)
        moves, state = optimizer.update(grads, state, word)
        return (optax.apply_updates(word, moves), state), (value, word)

    def whole(key):
        word = jnp.zeros(D)
        carry, told = jax.lax.scan(step, (word, optimizer.init(word)), jax.random.split(key, steps))
        return (*told, carry[1])

    return jax.jit(whole)(jax.random.key(seed))


def test_the_first_window_is_the_plain_optimiser_bit_for_bit_and_then_the_gradient_is_projected():
    plain = a_run(optax.sgd(0.01), 2 * WINDOW)
    less = a_run(subspace_gradient(optax.sgd(0.01), WINDOW, 1e-2), 2 * WINDOW)
    np.testing.assert_array_equal(plain[1][: WINDOW + 1], less[1][: WINDOW + 1])
    assert np.any(plain[1][WINDOW + 2 :] != less[1][WINDOW + 2 :])
    # P of the second window is that of the values behind the first WINDOW updates, and nothing moves along it.
    removed = np.asarray(FOUND(less[1][1 : WINDOW + 1], 1e-2))
    assert np.any(removed)
    moves = np.diff(np.asarray(less[1]), axis=0)[WINDOW:]
    np.testing.assert_allclose(moves @ removed.T, 0.0, atol=1e-5 * np.abs(moves).max() * D)


def test_the_scale_counts_the_directions_that_are_left():
    update = subspace_gradient(optax.sgd(1.0), WINDOW, 1e-3, directions=2)
    state = update.init(jnp.zeros(D))
    moves, _ = update.update(jnp.ones(D), state, jnp.zeros(D))
    np.testing.assert_allclose(moves, -1.0 / np.sqrt((D + 1) / 2), rtol=1e-5)
    state = state._replace(removed=jnp.eye(WINDOW, D))
    moves, _ = update.update(jnp.ones(D), state, jnp.zeros(D))
    expected = np.where(np.arange(D) < WINDOW, 0.0, -1.0 / np.sqrt((D - WINDOW + 1) / 2))
    np.testing.assert_allclose(moves, expected, rtol=1e-5)


def test_wrong_arguments_are_told():
    for wrong in ({"window": 1}, {"share": 0.0}, {"share": 1.0}, {"directions": 0}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            subspace_gradient(optax.sgd(1.0), **wrong)
    with pytest.raises(InvalidInput, match="params"):
        subspace_gradient(optax.sgd(1.0)).update(jnp.ones(3), None)
