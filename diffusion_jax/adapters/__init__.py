"""What is attached to a network without changing its code: low-rank adaptation (`lora`, also with a second factor that
is mixed by the timestep), routers that read the timestep (`routed`), and further input channels.
"""

from diffusion_jax.adapters.channels import masked_channels, with_channels
from diffusion_jax.adapters.lora import Lora, attached, lora
from diffusion_jax.adapters.routed import Timed, at_time, embedded_time, routed, routed_logits, routers
from diffusion_jax.adapters.time_lora import TimeLora, time_lora
from diffusion_jax.adapters.trees import (
    adapted_modules,
    at_scale,
    combined_adapters,
    largest_rank,
    merged,
    relative_change,
    transplanted,
)

__all__ = [
    "Lora",
    "TimeLora",
    "Timed",
    "adapted_modules",
    "at_scale",
    "at_time",
    "attached",
    "combined_adapters",
    "embedded_time",
    "largest_rank",
    "lora",
    "masked_channels",
    "merged",
    "relative_change",
    "routed",
    "routed_logits",
    "routers",
    "time_lora",
    "transplanted",
    "with_channels",
]
