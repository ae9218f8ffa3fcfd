"""The latent space of an autoencoder that is an experiment like any other."""

import jax
import numpy as np
import pytest

from diffusion_jax import data, models
from diffusion_jax.config import call
from diffusion_jax.experiment import defaults, fit, prepare


@pytest.mark.usefixtures("one_device")
def test_a_trained_autoencoder_is_an_experiment_like_others_and_its_latents_a_source():
    entry = defaults(steps=60, batch_size=32)
    entry.data = entry.held_out = call("data.digits")
    entry.model = call("models.kl_vae", preset="small", channels=8, groups=4, data_channels=1, latent_channels=2)
    entry.process = None
    entry.objective = call("objectives.vae_loss")
    entry.optimizer = call("training.optimizers.adamw", learning_rate=1e-2)
    experiment = prepare(entry)
    params = fit(experiment, progress=False).params
    space = models.latent_space(experiment.network, params, experiment.source.take(range(256))["x0"])
    latents = data.encoded(experiment.source, space.encode)
    assert latents.shape == (4, 4, 2)
    assert abs(latents.x0.mean()) < 0.2 and 0.7 < latents.x0.std() < 1.3
    x = experiment.source.x0[:100]
    error = np.abs(jax.device_get(space.decode(space.encode(x))) - x).mean()
    assert error < 0.6 * np.abs(x - experiment.source.x0.mean(0)).mean()
