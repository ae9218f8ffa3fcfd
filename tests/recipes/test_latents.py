"""A latent space is trained once, standardised, and gives back what it encodes."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.config import call
from diffusion_jax.errors import InvalidInput
from diffusion_jax.experiment import defaults
from diffusion_jax.recipes.parts.latents import encoded, latent_space, principal_space


@pytest.mark.usefixtures("one_device")
def test_latents_are_standardised_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path))
    config = defaults(steps=60, batch_size=32)
    config.data = config.held_out = call("data.digits")
    config.model = call("models.kl_vae", preset="small", channels=8, groups=4, data_channels=1, latent_channels=2)
    config.process = None
    config.objective = call("objectives.vae_loss")
    config.optimizer = call("training.optimizers.adamw", learning_rate=1e-2)
    space = latent_space(config, "digits")
    source = data.digits()
    latents = encoded(space, source)
    assert latents.shape == space.shape == (4, 4, 2)
    assert len(latents) == len(source)
    assert abs(latents.x0.mean()) < 0.2
    assert 0.7 < latents.x0.std() < 1.3
    np.testing.assert_array_equal(latents.cond["label"], source.cond["label"])
    again = latent_space(config, "digits")
    np.testing.assert_array_equal(again.encode(source.x0[:4]), space.encode(source.x0[:4]))
    error = np.abs(space.decode(space.encode(source.x0[:100])) - source.x0[:100]).mean()
    assert error < 0.6 * np.abs(source.x0[:100] - source.x0.mean(0)).mean()


def test_principal_components_are_the_best_linear_latents():
    pictures = data.digits().x0[:500]
    errors = []
    for components in (4, 16, 64):
        space = principal_space(pictures, components)
        latents = space.encode(pictures.reshape(100, 5, 8, 8, 1))
        assert latents.shape == (100, 5, *space.shape) == (100, 5, 1, 1, components)
        assert abs(float(latents.mean())) < 1e-3
        np.testing.assert_allclose(latents.std(), 1.0, atol=0.01)
        errors.append(float(np.square(space.decode(latents).reshape(pictures.shape) - pictures).mean()))
    flat = pictures.reshape(500, -1)
    singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    # Clipping to [-1, 1] only helps.
    assert errors[1] <= (singular[16:] ** 2).sum() / flat.size + 1e-6
    assert errors[0] > 2 * errors[1] > 1e3 * errors[2]
    tokens = principal_space(pictures, 64, tokens=4)
    cut = tokens.encode(pictures)
    assert cut.shape == (500, *tokens.shape) == (500, 4, 16)
    np.testing.assert_allclose(cut.reshape(500, 64), latents.reshape(500, 64), atol=1e-5)
    np.testing.assert_allclose(tokens.decode(cut), space.decode(latents).reshape(pictures.shape), atol=1e-5)
    few = pictures[:40]
    flat, space = few.reshape(40, -1), principal_space(few, 16)
    latents = space.encode(few)
    np.testing.assert_allclose(latents.std(), 1.0, atol=0.02)
    error = float(np.square(space.decode(latents) - few).mean())
    singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    assert 0 < error <= (singular[16:] ** 2).sum() / flat.size + 1e-6
    with pytest.raises(InvalidInput, match="components"):
        principal_space(pictures, 65)
    with pytest.raises(InvalidInput, match="tokens is 3"):
        principal_space(pictures, 64, tokens=3)
