"""Denoisers that do less at some steps: what is forecast instead of computed, when, and what it costs.

A forecaster is a rule for any pytree (`reuse`, `taylor`, `newton`, `hermite`), a refresh policy says when to compute
anew (`every`, `on_schedule`, `first_and_last`, `either`); what they are applied to is a matter of its own.
"""

from diffusion_jax.acceleration.forecasting import Forecaster, Table, hermite, newton, reuse, taylor
from diffusion_jax.acceleration.refresh import History, Refresh, either, every, first_and_last, on_schedule

__all__ = [
    "Forecaster",
    "History",
    "Refresh",
    "Table",
    "either",
    "every",
    "first_and_last",
    "hermite",
    "newton",
    "on_schedule",
    "reuse",
    "taylor",
]
