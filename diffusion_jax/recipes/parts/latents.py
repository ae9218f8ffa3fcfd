"""The latent space of an autoencoder that is trained once and kept."""

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.data import stacked_examples
from diffusion_jax.experiment import prepare
from diffusion_jax.models import LatentSpace, latent_space, principal_components
from diffusion_jax.recipes.frame import trained


def trained_latents(config: ConfigDict, name: str) -> LatentSpace:
    """Trains the autoencoder that `config`, an experiment's, describes, or reads it from the cache."""
    experiment = prepare(config)
    examples = stacked_examples(experiment.source, range(min(len(experiment.source), 256)))["x0"]
    return latent_space(experiment.network, trained(experiment, name), examples)


def principal_space(pictures: np.ndarray, components: int, tokens: int | None = None) -> LatentSpace:
    """The space of the principal components."""
    return latent_space(*principal_components(pictures, components, tokens))
