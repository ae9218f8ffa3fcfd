"""What is attached to a network, by interception (`models.interception`): low-rank adaptation, also mixed by the
timestep, and routers that read the timestep; and further channels at its entrance."""

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
