"""What is attached to a frozen network, by interception (`models.interception`): low-rank adaptation."""

from diffusion_jax.adapters.lora import Lora, adapted_modules, attached, combined, lora, merged

__all__ = ["Lora", "adapted_modules", "attached", "combined", "lora", "merged"]
