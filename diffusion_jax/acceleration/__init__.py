"""Denoisers that compute less at some steps: what is forecast instead of computed, at which steps, and what it saves.

Three choices are independent. A forecaster says what replaces a computed value (`reuse`, `taylor`, `newton`, `hermite`,
`foca`, `dmd`) and works on any pytree. A refresh policy says at which steps to compute (`every`, `on_schedule`,
`first_and_last`, `either`). A constructor says what they are applied to: features (`cached_features`), whole outputs
(`cached_outputs`), everything behind the first block (`gated`), the unconditional branch (`guided_with_reuse`).
`accelerated` has published settings by name.
"""

from diffusion_jax.acceleration.calibration import (
    Calibration,
    Trajectories,
    adjusted_grid,
    calibrate,
    calibrated_grid,
    endpoint_influence,
    ertacache,
    load_calibration,
    offline_schedule,
    record_outputs,
    replayed,
    reuse_overlap,
    save_calibration,
    threshold_at_count,
)
from diffusion_jax.acceleration.dynamic import (
    StaticWidths,
    by_nearest_time,
    executed_share,
    static_widths,
    tables_by_time,
    tabulated,
)
from diffusion_jax.acceleration.early_exit import (
    at_depth,
    depth_table,
    exit_by_uncertainty,
    exit_depths,
    threshold_for_depth,
    whole_depth,
)
from diffusion_jax.acceleration.features import cached_features
from diffusion_jax.acceleration.forecasting import Forecaster, Table, foca, hermite, newton, reuse, taylor
from diffusion_jax.acceleration.gate_errors import GateTrace, forecast_errors, gate_agreement, record_gate
from diffusion_jax.acceleration.gated import cg_taylor, first_block_cached, gated
from diffusion_jax.acceleration.guide_reuse import guided_with_reuse, reused_guide
from diffusion_jax.acceleration.modes import dmd
from diffusion_jax.acceleration.outputs import Correction, cached_outputs
from diffusion_jax.acceleration.presets import PRESETS, accelerated
from diffusion_jax.acceleration.refresh import (
    Refresh,
    RefreshHistory,
    either,
    every,
    first_and_last,
    on_schedule,
    refresh_table,
    spread_schedule,
)
from diffusion_jax.acceleration.spectral import sea_cached
from diffusion_jax.acceleration.thresholds import threshold_for
from diffusion_jax.acceleration.tokens import cached_tokens

__all__ = [
    "PRESETS",
    "Calibration",
    "Correction",
    "Forecaster",
    "GateTrace",
    "Refresh",
    "RefreshHistory",
    "StaticWidths",
    "Table",
    "Trajectories",
    "accelerated",
    "adjusted_grid",
    "at_depth",
    "by_nearest_time",
    "cached_features",
    "cached_outputs",
    "cached_tokens",
    "calibrate",
    "calibrated_grid",
    "cg_taylor",
    "depth_table",
    "dmd",
    "either",
    "endpoint_influence",
    "ertacache",
    "every",
    "executed_share",
    "exit_by_uncertainty",
    "exit_depths",
    "first_and_last",
    "first_block_cached",
    "foca",
    "forecast_errors",
    "gate_agreement",
    "gated",
    "guided_with_reuse",
    "hermite",
    "load_calibration",
    "newton",
    "offline_schedule",
    "on_schedule",
    "record_gate",
    "record_outputs",
    "refresh_table",
    "replayed",
    "reuse",
    "reuse_overlap",
    "reused_guide",
    "save_calibration",
    "sea_cached",
    "spread_schedule",
    "static_widths",
    "tables_by_time",
    "tabulated",
    "taylor",
    "threshold_at_count",
    "threshold_for",
    "threshold_for_depth",
    "whole_depth",
]
