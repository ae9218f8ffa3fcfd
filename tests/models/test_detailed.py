"""A decoder that sees a picture: it begins as the decoder, and only what was added learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, objectives, training
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import by_path, kl_vae
from diffusion_jax.typing import Frozen
from tests.models.drawn import drawn
from tests.models.shared import image

X, Y = image((2, 8, 8, 3)), 0.5 * image((2, 8, 8, 3), 1)


@pytest.fixture(scope="module")
def made():
    """An autoencoder of two levels with weights of which none is zero, its decoder that sees a picture, and skips."""
    vae = kl_vae("small", channels=8, groups=4, scaling_factor=0.5)
    params = drawn(jax.eval_shape(vae.init, jax.random.key(0), X))
    decoder = models.detailed(vae, width=6)
    return vae, params, decoder, decoder.init(jax.random.key(1))


def test_it_begins_as_the_decoder_bit_for_bit_and_then_sees_every_level_and_the_difference(made):
    vae, params, decoder, learned = made
    latents = jax.jit(vae.encode)(params, X)
    decode = jax.jit(decoder.decode)
    np.testing.assert_array_equal(decode(learned, params, latents, Y), jax.jit(vae.decode)(params, latents))
    for level in range(2):
        alive = jax.tree.map(jnp.copy, learned)
        alive[f"writes_{level}"]["kernel"] = jnp.full_like(alive[f"writes_{level}"]["kernel"], 0.1)
        found = [decode(alive, params, latents, picture) for picture in (Y, -Y)]
        assert np.abs(found[0] - found[1]).max() > 1e-3, level


def test_only_what_was_added_learns_and_all_of_it(made):
    vae, params, decoder, learned = made
    objective, batch = objectives.detail_loss(decoder, vae, params), {"x0": X, "cond": {"picture": Y}}
    learned = jax.tree.map(lambda leaf: leaf + 0.05, learned)
    optimizer = training.optimizers.adamw(1e-2)
    state = training.init_state(objective, optimizer, lambda key: learned, batch)
    step = training.make_train_step(objective, optimizer)
    first = 0.0
    for _ in range(4):
        state, metrics = step(state, batch)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < first
    assert not jax.tree.leaves(state.objective_state), "the autoencoder is frozen"
    moved = {path: np.abs(leaf - by_path(learned)[path]).max() for path, leaf in by_path(state.params).items()}
    assert min(moved.values()) > 0, moved


def test_the_loss_is_that_of_given_latents_and_picture_and_leaves_the_autoencoder_alone(made):
    vae, params, decoder, learned = made
    objective = objectives.detail_loss(decoder, vae, params, latents="latents")
    alive = jax.tree.map(lambda leaf: leaf + 0.05, learned)
    z = np.random.default_rng(0).standard_normal(jax.eval_shape(vae.encode, params, X).shape).astype(np.float32)
    batch = {"x0": X, "cond": {"picture": Y, "latents": z}}

    @jax.jit
    def both(alive, frozen):
        state = objective.init(jax.random.key(0), alive, batch)
        (_, losses), slopes = jax.value_and_grad(
            lambda frozen: (lambda found: (found.sum(), found))(
                objective.loss(alive, state._replace(autoencoder=Frozen(frozen)), batch, jax.random.key(0))[0]
            ),
            has_aux=True,
        )(frozen)
        return losses, slopes, jnp.abs(decoder.decode(alive, frozen, z, Y) - X).mean((1, 2, 3))

    losses, slopes, expected = both(alive, params)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(slopes))


def test_what_is_wrong_is_told(made):
    vae, params, decoder, learned = made
    for batch in ({"x0": X}, {"x0": X, "cond": None}, {"x0": X, "cond": {}}):
        with pytest.raises(InvalidInput, match="picture"):
            objectives.detail_loss(decoder, vae, params).init(jax.random.key(0), learned, batch)
    with pytest.raises(InvalidInput, match="width"):
        models.detailed(vae, 0)
    with pytest.raises(InvalidInput, match="width, channels"):
        models.detailed(models.patch_autoencoder(), channels=0)


def test_behind_a_linear_autoencoder_it_begins_as_the_decoder_and_sees_what_that_loses():
    linear = models.patch_autoencoder(6, 4)
    params = linear.init(None, np.concatenate([X, Y]))
    decoder, latents = models.detailed(linear, width=6), linear.encode(params, X)
    learned = decoder.init(jax.random.key(1))
    decode = jax.jit(decoder.decode)
    np.testing.assert_array_equal(decode(learned, params, latents, Y), jax.jit(linear.decode)(params, latents))
    learned["writes_0"]["kernel"] = jnp.full_like(learned["writes_0"]["kernel"], 0.1)
    assert np.abs(decode(learned, params, latents, X) - decode(learned, params, latents, Y)).max() > 1e-3
