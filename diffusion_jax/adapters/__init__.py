"""What is attached to a network, by interception (`models.interception`): low-rank adaptation, also mixed by the
timestep, and routers that read the timestep."""

from diffusion_jax.adapters.lora import Lora, adapted_modules, attached, combined_adapters, lora, merged, transplanted
from diffusion_jax.adapters.routed import Timed, at_time, embedded_time, routed, routed_logits, routers
from diffusion_jax.adapters.time_lora import TimeLora, time_lora

__all__ = [
    "Lora",
    "TimeLora",
    "Timed",
    "adapted_modules",
    "at_time",
    "attached",
    "combined_adapters",
    "embedded_time",
    "lora",
    "merged",
    "routed",
    "routed_logits",
    "routers",
    "time_lora",
    "transplanted",
]
