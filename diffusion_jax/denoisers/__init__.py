"""Denoisers: a network together with its process (`denoiser`), the exact denoiser of a Gaussian mixture (`analytic`),
and transformations that take a denoiser and return one: guidance, gradients, bounds, conditions by step, switches
between networks. Transformations nest.
"""

from diffusion_jax.denoisers.analytic import (
    GaussianMixture,
    Posterior,
    analytic,
    analytic_stages,
    gaussian_clip,
    gaussian_mixture,
    log_density,
    posterior,
    sample_mixture,
    score,
)
from diffusion_jax.denoisers.base import denoiser, map_prediction, with_target_time
from diffusion_jax.denoisers.branches import Branches, Rule, from_two_networks, in_one_batch, steered
from diffusion_jax.denoisers.clipping import clipped, thresholded
from diffusion_jax.denoisers.coarse import merged_components
from diffusion_jax.denoisers.conditions import (
    blended_condition,
    condition_by_step,
    dropped_condition,
    null_condition,
    scheduled_condition,
    switched_condition,
)
from diffusion_jax.denoisers.contrast import composed, contrasted
from diffusion_jax.denoisers.flow_map import flow_map
from diffusion_jax.denoisers.gradient import classifier_guided, energy_guided
from diffusion_jax.denoisers.guidance import autoguided, cfg_plus_plus, guided, linear_rule, projected_guided
from diffusion_jax.denoisers.joint import combined, jointly_guided, marginal_guided
from diffusion_jax.denoisers.matching import on_process
from diffusion_jax.denoisers.recording import Recorded, predicted_x0, recorded
from diffusion_jax.denoisers.scales import cosine_scale, interval_scale, linear_scale, sample_scale
from diffusion_jax.denoisers.switching import averaged, by_interval, by_log_snr, by_share, by_time, switched, time_table

__all__ = [
    "Branches",
    "GaussianMixture",
    "Posterior",
    "Recorded",
    "Rule",
    "analytic",
    "analytic_stages",
    "autoguided",
    "averaged",
    "blended_condition",
    "by_interval",
    "by_log_snr",
    "by_share",
    "by_time",
    "cfg_plus_plus",
    "classifier_guided",
    "clipped",
    "combined",
    "composed",
    "condition_by_step",
    "contrasted",
    "cosine_scale",
    "denoiser",
    "dropped_condition",
    "energy_guided",
    "flow_map",
    "from_two_networks",
    "gaussian_clip",
    "gaussian_mixture",
    "guided",
    "in_one_batch",
    "interval_scale",
    "jointly_guided",
    "linear_rule",
    "linear_scale",
    "log_density",
    "map_prediction",
    "marginal_guided",
    "merged_components",
    "null_condition",
    "on_process",
    "posterior",
    "predicted_x0",
    "projected_guided",
    "recorded",
    "sample_mixture",
    "sample_scale",
    "scheduled_condition",
    "score",
    "steered",
    "switched",
    "switched_condition",
    "thresholded",
    "time_table",
    "with_target_time",
]
