"""Training losses as pure functions: denoising of any process, masked diffusion of tokens, autoencoders, distillation,
validation.

An objective's loss is unreduced over the batch; the step of `training` averages, differentiates and updates.
"""

from diffusion_jax.objectives.adaptation import Adaptation, adaptation
from diffusion_jax.objectives.autoencoder import vae_loss
from diffusion_jax.objectives.budget import Budgeted, budget_at, budgeted
from diffusion_jax.objectives.contrastive import caption_loss, contrastive
from diffusion_jax.objectives.denoising import denoising, objective
from diffusion_jax.objectives.discrete import masked
from diffusion_jax.objectives.distribution_matching import distribution_matching, few_step_answers
from diffusion_jax.objectives.entries import TOKEN_WEIGHTINGS, regression, tokens
from diffusion_jax.objectives.frozen import TrainedPart, trained_part, with_frozen
from diffusion_jax.objectives.imitation import Imitated, imitation, slider
from diffusion_jax.objectives.latents import on_latents
from diffusion_jax.objectives.layerwise import (
    ExitErrors,
    exit_errors,
    exit_losses,
    layerwise,
    uncertainty_target,
    with_exits,
)
from diffusion_jax.objectives.validation import validation_loss

__all__ = [
    "TOKEN_WEIGHTINGS",
    "Adaptation",
    "Budgeted",
    "ExitErrors",
    "Imitated",
    "TrainedPart",
    "adaptation",
    "budget_at",
    "budgeted",
    "caption_loss",
    "contrastive",
    "denoising",
    "distribution_matching",
    "exit_errors",
    "exit_losses",
    "few_step_answers",
    "imitation",
    "layerwise",
    "masked",
    "objective",
    "on_latents",
    "regression",
    "slider",
    "tokens",
    "trained_part",
    "uncertainty_target",
    "vae_loss",
    "validation_loss",
    "with_exits",
    "with_frozen",
]
