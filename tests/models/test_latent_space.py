"""Principal components are the best linear autoencoder; the space of any autoencoder is standardised on request."""

import jax
import numpy as np
import pytest

from diffusion_jax import data, models
from diffusion_jax.errors import InvalidInput


@pytest.fixture(scope="module")
def pictures():
    return data.digits().x0[:500]


def space_of(pictures, components, tokens=None):
    return models.latent_space(*models.principal_components(pictures, components, tokens))


def left_out(pictures, components):
    """The mean squared error of the best linear autoencoder."""
    flat = pictures.reshape(len(pictures), -1)
    return (np.linalg.svd(flat - flat.mean(0), compute_uv=False)[components:] ** 2).sum() / flat.size


def test_principal_components_are_the_best_linear_latents(pictures):
    errors = []
    for components in (4, 16, 64):
        space = space_of(pictures, components)
        latents = space.encode(pictures.reshape(100, 5, 8, 8, 1))
        assert latents.shape == (100, 5, 1, 1, components)
        assert abs(float(latents.mean())) < 1e-3
        np.testing.assert_allclose(latents.std(), 1.0, atol=0.01)
        errors.append(float(np.square(space.decode(latents).reshape(pictures.shape) - pictures).mean()))
    # Clipping to [-1, 1] only helps.
    assert errors[1] <= left_out(pictures, 16) + 1e-6
    assert errors[0] > 2 * errors[1] > 1e3 * errors[2]
    tokens = space_of(pictures, 64, tokens=4)
    cut = tokens.encode(pictures)
    assert cut.shape == (500, 4, 16)
    np.testing.assert_allclose(cut.reshape(500, 64), latents.reshape(500, 64), atol=1e-5)
    np.testing.assert_allclose(tokens.decode(cut), space.decode(latents).reshape(pictures.shape), atol=1e-5)


def test_fewer_pictures_than_pixels_have_the_same_law(pictures):
    few = pictures[:40]
    space = space_of(few, 16)
    latents = space.encode(few)
    np.testing.assert_allclose(latents.std(), 1.0, atol=0.02)
    error = float(np.square(space.decode(latents) - few).mean())
    assert 0 < error <= left_out(few, 16) + 1e-6


def test_it_is_an_autoencoder_without_variance(pictures):
    linear, params = models.principal_components(pictures, 16)
    z = linear.encode(params, pictures[:2])
    posterior = linear.posterior(params, pictures[:2])
    for same in (posterior.mean, posterior.sample(jax.random.key(0)), linear.encode(params, pictures[:2], None)):
        np.testing.assert_array_equal(same, z)
    np.testing.assert_allclose(linear.encode(params, linear.decode(params, z)), z, atol=1e-5)
    for name, leaf in linear.init(jax.random.key(0), pictures).items():
        np.testing.assert_array_equal(leaf, params[name])
    clips = pictures[:4].reshape(2, 2, 8, 8, 1)
    np.testing.assert_allclose(models.framewise(linear).encode(params, clips), linear.encode(params, clips), atol=1e-6)


def test_any_autoencoder_is_standardised_and_decodes_what_it_encodes(pictures):
    linear, params = models.principal_components(pictures, 64)
    shifted = linear._replace(
        encode=lambda params, x: 3 * linear.encode(params, x) + 2,
        decode=lambda params, z: linear.decode(params, (z - 2) / 3),
    )
    space = models.latent_space(shifted, params, pictures)
    latents = space.encode(pictures)
    np.testing.assert_allclose((latents.mean(), latents.std()), (0.0, 1.0), atol=1e-5)
    np.testing.assert_allclose(space.decode(latents), pictures, atol=1e-4)
    assert float(space.decode(10 * latents).max()) <= 1.0
    np.testing.assert_allclose(models.latent_space(shifted, params).encode(pictures).mean(), 2.0, atol=1e-4)


@pytest.mark.parametrize(
    ("components", "tokens", "told"), [(65, None, "components"), (0, None, "components"), (64, 3, "tokens is 3")]
)
def test_impossible_spaces_are_refused(pictures, components, tokens, told):
    with pytest.raises(InvalidInput, match=told):
        models.principal_components(pictures, components, tokens)
    with pytest.raises(InvalidInput, match="pictures"):
        models.principal_components(pictures[0], 4)


def test_patches_have_the_best_linear_latents_too(pictures):
    patches = pictures.reshape(500, 2, 4, 2, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2000, 16)
    linear = models.patch_autoencoder(4, 4)
    params = linear.init(None, pictures)
    latents = linear.encode(params, pictures)
    assert latents.shape == (500, 2, 2, 4)
    np.testing.assert_allclose((latents.mean(), latents.std()), (0.0, 1.0), atol=0.01)
    error = float(np.square(linear.decode(params, latents) - pictures).mean())
    np.testing.assert_allclose(error, left_out(patches, 4), rtol=1e-3)
    np.testing.assert_array_equal(linear.posterior(params, pictures).sample(jax.random.key(0)), latents)
    whole = models.patch_autoencoder(16, 4)
    params = whole.init(None, pictures)
    np.testing.assert_allclose(whole.decode(params, whole.encode(params, pictures)), pictures, atol=1e-4)
    for wrong, told in ((lambda: linear.init(None, pictures[:, :6]), "sides of k x 4"),
                        (lambda: models.patch_autoencoder(17, 4).init(None, pictures), "has 16 numbers"),
                        (lambda: models.patch_autoencoder(0), "components")):  # fmt: skip
        with pytest.raises(InvalidInput, match=told):
            wrong()
