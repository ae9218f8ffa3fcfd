"""Laws of the autoencoder's loss: what it is made of, to whom its randomness belongs, and that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import framewise, kl_vae
from diffusion_jax.objectives import vae_loss
from tests.models.drawn import drawn

VAE = kl_vae("small", channels=8, groups=4, data_channels=1, latent_channels=2, scaling_factor=0.5, shift_factor=1.0)
X0 = jnp.sin(jnp.arange(8) * jnp.arange(1, 5)[:, None] / 2)[:, :, None, None] * jnp.cos(jnp.arange(8.0))[:, None]
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def params():
    return drawn(jax.eval_shape(VAE.init, jax.random.key(0), X0))


def loss_of(objective):
    return jax.jit(lambda params, batch: objective.loss(params, (), batch, KEY))


def test_the_bound_grows_by_the_divergence_per_data_dimension(params):
    batch = {"x0": X0}
    without, _ = loss_of(vae_loss(VAE, kl_weight=0.0))(params, batch)
    twice, aux = loss_of(vae_loss(VAE, kl_weight=2.0))(params, batch)
    kl = jax.jit(lambda params: VAE.posterior(params, X0).kl())(params)
    np.testing.assert_allclose(twice - without, 2 * kl / 64, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(aux.metrics["kl"], kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["reconstruction"], without.mean(), rtol=1e-5)
    assert without.shape == (4,)


def test_an_examples_loss_depends_on_its_index_and_not_on_its_neighbours(params):
    loss = loss_of(vae_loss(VAE))
    whole, _ = loss(params, {"x0": X0, "index": jnp.arange(4) + 10})
    part, _ = loss(params, {"x0": X0[1:3], "index": jnp.array([11, 12])})
    np.testing.assert_allclose(part, whole[1:3], rtol=1e-5)
    assert float(jnp.abs(loss(params, {"x0": X0})[0] - whole).min()) > 1e-6


def test_training_lowers_the_loss(params):
    objective = vae_loss(VAE, reconstruction="l2")
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry

            def mean(params):
                return objective.loss(params, (), {"x0": X0}, key)[0].mean()

            value, gradients = jax.value_and_grad(mean)(params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 60))

    (trained, _), losses = train(params)
    assert float(losses[-5:].mean()) < 0.25 * float(losses[:5].mean())
    error = jax.jit(lambda params: jnp.abs(VAE.decode(params, VAE.encode(params, X0)) - X0).mean())(trained)
    assert float(error) < 0.5 * float(jnp.abs(X0).mean())


def test_wrong_fields_are_told():
    with pytest.raises(InvalidInput, match="kl_weight is -1"):
        vae_loss(VAE, kl_weight=-1.0)
    with pytest.raises(InvalidInput, match="reconstruction is 'l3'"):
        vae_loss(VAE, reconstruction="l3")
    with pytest.raises(InvalidInput, match="has no 'x0'"):
        vae_loss(VAE).loss({}, (), {"x": X0}, KEY)


def test_clips_are_their_frames(params):
    clips = jnp.stack([X0[:2], X0[2:4]])
    clipwise = framewise(VAE)
    np.testing.assert_array_equal(clipwise.encode(params, clips).reshape(4, 4, 4, 2), VAE.encode(params, X0))
    np.testing.assert_array_equal(
        clipwise.decode(params, clipwise.encode(params, clips)).reshape(X0.shape),
        VAE.decode(params, VAE.encode(params, X0)),
    )
    posterior, images = clipwise.posterior(params, clips), VAE.posterior(params, X0)
    np.testing.assert_allclose(posterior.kl(), images.kl().reshape(2, 2).sum(1), rtol=1e-5)
    total, _ = loss_of(vae_loss(clipwise))(params, {"x0": clips})
    assert total.shape == (2,)
    with pytest.raises(InvalidInput, match="B, F, H, W, C"):
        clipwise.encode(params, X0)
