"""Training losses as pure functions: denoising for every process, masked diffusion of tokens, autoencoders,
distillation, validation.

A loss has one value per example. The training step (`training`) takes the mean, differentiates and updates.
"""

from diffusion_jax.objectives.adaptation import Adaptation, adaptation
from diffusion_jax.objectives.adversarial import (
    Discriminator,
    GanLoss,
    adversarial,
    feature_discriminator,
    hinge,
    non_saturating,
)
from diffusion_jax.objectives.autoencoder import detail_loss, vae_loss
from diffusion_jax.objectives.budget import Budgeted, budget_at, budgeted
from diffusion_jax.objectives.consistency import (
    consistency,
    gap_weight,
    neighbour,
    pseudo_huber,
    shrinking,
    squared_distance,
)
from diffusion_jax.objectives.continuous_consistency import (
    Circle,
    TangentRamp,
    continuous_consistency,
    log_variance_at,
    tangent_ramp,
)
from diffusion_jax.objectives.contrastive import caption_loss, contrastive
from diffusion_jax.objectives.degradation import (
    blurred,
    degraded,
    one_after_another,
    perturbed,
    thickened,
    tinted,
    warped,
)
from diffusion_jax.objectives.denoising import denoising, objective
from diffusion_jax.objectives.discrete import masked
from diffusion_jax.objectives.distribution_matching import distribution_matching, few_step_answers
from diffusion_jax.objectives.entries import TOKEN_WEIGHTINGS, regression, tokens
from diffusion_jax.objectives.feature_spaces import (
    FeatureSpace,
    banked,
    convolution_space,
    fourier_space,
    paired,
    raw_features,
    raw_space,
    standardised,
)
from diffusion_jax.objectives.flow_maps import mean_flow, shortcut
from diffusion_jax.objectives.frozen import TrainedPart, trained_part, with_frozen
from diffusion_jax.objectives.imitation import Imitated, imitation, slider
from diffusion_jax.objectives.kernel_matching import (
    gaussian_kernel,
    kernel_matching,
    linear_kernel,
    polynomial_kernel,
    squared_mmd,
    whole_runs,
)
from diffusion_jax.objectives.latents import on_latents
from diffusion_jax.objectives.layerwise import (
    ExitErrors,
    exit_errors,
    exit_losses,
    layerwise,
    uncertainty_target,
    with_exits,
)
from diffusion_jax.objectives.leap import (
    conditioned_on_ends,
    end_frames,
    expected_leap_error,
    leap_distillation,
    leap_grid,
    leap_reward,
)
from diffusion_jax.objectives.multitask import (
    Combiner,
    affinity_by_lag,
    bargained,
    bargaining_weights,
    conflicting_share,
    multitask,
    projected,
    task_affinity,
    uncertainty_weighted,
)
from diffusion_jax.objectives.progressive import progressive
from diffusion_jax.objectives.rendering import coarse_clips, splat_rendering
from diffusion_jax.objectives.self_enhanced import SelfEnhanced, self_enhanced
from diffusion_jax.objectives.time_policy import (
    chosen_times,
    expected_loss,
    policy_loss,
    time_policy,
    with_time_policy,
)
from diffusion_jax.objectives.trajectories import on_trajectories, secant
from diffusion_jax.objectives.trajectory_backward import (
    EndpointFilter,
    Trajectory,
    away_from,
    teacher_trajectory,
    trajectory_backward,
)
from diffusion_jax.objectives.validation import validation_loss
from diffusion_jax.objectives.zeroth_order import zeroth_order, zeroth_order_gradient

__all__ = [
    "TOKEN_WEIGHTINGS",
    "Adaptation",
    "Budgeted",
    "Circle",
    "Combiner",
    "Discriminator",
    "EndpointFilter",
    "ExitErrors",
    "FeatureSpace",
    "GanLoss",
    "Imitated",
    "SelfEnhanced",
    "TangentRamp",
    "TrainedPart",
    "Trajectory",
    "adaptation",
    "adversarial",
    "affinity_by_lag",
    "away_from",
    "banked",
    "bargained",
    "bargaining_weights",
    "blurred",
    "budget_at",
    "budgeted",
    "caption_loss",
    "chosen_times",
    "coarse_clips",
    "conditioned_on_ends",
    "conflicting_share",
    "consistency",
    "continuous_consistency",
    "contrastive",
    "convolution_space",
    "degraded",
    "denoising",
    "detail_loss",
    "distribution_matching",
    "end_frames",
    "exit_errors",
    "exit_losses",
    "expected_leap_error",
    "expected_loss",
    "feature_discriminator",
    "few_step_answers",
    "fourier_space",
    "gap_weight",
    "gaussian_kernel",
    "hinge",
    "imitation",
    "kernel_matching",
    "layerwise",
    "leap_distillation",
    "leap_grid",
    "leap_reward",
    "linear_kernel",
    "log_variance_at",
    "masked",
    "mean_flow",
    "multitask",
    "neighbour",
    "non_saturating",
    "objective",
    "on_latents",
    "on_trajectories",
    "one_after_another",
    "paired",
    "perturbed",
    "policy_loss",
    "polynomial_kernel",
    "progressive",
    "projected",
    "pseudo_huber",
    "raw_features",
    "raw_space",
    "regression",
    "secant",
    "self_enhanced",
    "shortcut",
    "shrinking",
    "slider",
    "splat_rendering",
    "squared_distance",
    "squared_mmd",
    "standardised",
    "tangent_ramp",
    "task_affinity",
    "teacher_trajectory",
    "thickened",
    "time_policy",
    "tinted",
    "tokens",
    "trained_part",
    "trajectory_backward",
    "uncertainty_target",
    "uncertainty_weighted",
    "vae_loss",
    "validation_loss",
    "warped",
    "whole_runs",
    "with_exits",
    "with_frozen",
    "with_time_policy",
    "zeroth_order",
    "zeroth_order_gradient",
]
