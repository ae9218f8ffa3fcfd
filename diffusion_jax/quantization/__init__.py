"""Networks whose weights, and what their layers read, are integers of few bits: quantisers, networks by interception
(`quantized`), ranges by time along a sampler's own trajectory (`input_ranges`), rounding that is learned
block by block (`reconstructed`), channels balanced by timestep (`balanced_network`), bits under a budget
(`allocated_bits`), products of integers, bytes counted.
"""

from diffusion_jax.quantization.allocation import (
    allocated_bits,
    average_bits,
    decoupled_bits,
    group_budgets,
    sensitivities,
)
from diffusion_jax.quantization.balanced_network import BalancedNetwork, balanced_network, input_taps
from diffusion_jax.quantization.balancing import balance
from diffusion_jax.quantization.calibration import input_ranges
from diffusion_jax.quantization.quantized import Quantized, quantizable, quantized, quantized_bytes
from diffusion_jax.quantization.quantizers import (
    Quantizer,
    Scales,
    affine,
    dequantize,
    fake_quantize,
    quantize,
    scales_of,
    scales_of_range,
    symmetric,
)
from diffusion_jax.quantization.reconstruction import (
    Reconstruction,
    reconstructed,
    rounding_penalty,
    rounding_share,
    rounding_start,
    softly_rounded,
)
from diffusion_jax.quantization.rotation import hadamard, rotated_kernel
from diffusion_jax.quantization.statistics import ChannelMaxima, no_maxima, pooled_maxima, with_batch

__all__ = [
    "BalancedNetwork",
    "ChannelMaxima",
    "Quantized",
    "Quantizer",
    "Reconstruction",
    "Scales",
    "affine",
    "allocated_bits",
    "average_bits",
    "balance",
    "balanced_network",
    "decoupled_bits",
    "dequantize",
    "fake_quantize",
    "group_budgets",
    "hadamard",
    "input_ranges",
    "input_taps",
    "no_maxima",
    "pooled_maxima",
    "quantizable",
    "quantize",
    "quantized",
    "quantized_bytes",
    "reconstructed",
    "rotated_kernel",
    "rounding_penalty",
    "rounding_share",
    "rounding_start",
    "scales_of",
    "scales_of_range",
    "sensitivities",
    "softly_rounded",
    "symmetric",
    "with_batch",
]
