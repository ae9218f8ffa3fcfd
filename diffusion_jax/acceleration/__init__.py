"""Denoisers that do less at some steps: what is forecast instead of computed, when, and what it costs.

A forecaster is a rule for any pytree (`reuse`, `taylor`, `newton`, `hermite`, `foca`, `dmd`), a refresh policy says
when to compute anew (`every`, `on_schedule`, `first_and_last`, `either`); what they are applied to is a matter of its
own.
"""

from diffusion_jax.acceleration.calibration import (
    Calibration,
    Trajectories,
    adjusted_grid,
    calibrate,
    ertacache,
    load_calibration,
    offline_schedule,
    record_outputs,
    replayed,
    save_calibration,
)
from diffusion_jax.acceleration.dynamic import StaticWidths, static_widths, tabulated
from diffusion_jax.acceleration.early_exit import at_depth, depth_table, exit_by_uncertainty
from diffusion_jax.acceleration.features import cached_features
from diffusion_jax.acceleration.forecasting import Forecaster, Table, foca, hermite, newton, reuse, taylor
from diffusion_jax.acceleration.gated import cg_taylor, first_block_cached, gated
from diffusion_jax.acceleration.guide_reuse import guided_with_reuse, reused_guide
from diffusion_jax.acceleration.modes import dmd
from diffusion_jax.acceleration.outputs import Correction, cached_outputs
from diffusion_jax.acceleration.presets import PRESETS, accelerated
from diffusion_jax.acceleration.refresh import Refresh, RefreshHistory, either, every, first_and_last, on_schedule
from diffusion_jax.acceleration.spectral import sea_cached
from diffusion_jax.acceleration.tokens import cached_tokens

__all__ = [
    "PRESETS",
    "Calibration",
    "Correction",
    "Forecaster",
    "Refresh",
    "RefreshHistory",
    "StaticWidths",
    "Table",
    "Trajectories",
    "accelerated",
    "adjusted_grid",
    "at_depth",
    "cached_features",
    "cached_outputs",
    "cached_tokens",
    "calibrate",
    "cg_taylor",
    "depth_table",
    "dmd",
    "either",
    "ertacache",
    "every",
    "exit_by_uncertainty",
    "first_and_last",
    "first_block_cached",
    "foca",
    "gated",
    "guided_with_reuse",
    "hermite",
    "load_calibration",
    "newton",
    "offline_schedule",
    "on_schedule",
    "record_outputs",
    "replayed",
    "reuse",
    "reused_guide",
    "save_calibration",
    "sea_cached",
    "static_widths",
    "tabulated",
    "taylor",
]
