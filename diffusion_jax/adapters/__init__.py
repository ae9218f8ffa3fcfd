"""What is attached to a frozen network, by interception (`models.interception`): low-rank adaptation."""

from diffusion_jax.adapters.lora import Lora, lora

__all__ = ["Lora", "lora"]
