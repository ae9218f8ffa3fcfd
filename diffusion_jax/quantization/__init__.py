"""Networks whose weights, and what their layers read, are integers of few bits: quantisers, networks by interception
(`quantized`), ranges by time along a sampler's own trajectory (`input_ranges`), rounding that is learned
block by block (`reconstructed`), products of integers, bytes counted.
"""

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

__all__ = [
    "Quantized",
    "Quantizer",
    "Reconstruction",
    "Scales",
    "affine",
    "dequantize",
    "fake_quantize",
    "input_ranges",
    "quantizable",
    "quantize",
    "quantized",
    "quantized_bytes",
    "reconstructed",
    "rounding_penalty",
    "rounding_share",
    "rounding_start",
    "scales_of",
    "scales_of_range",
    "softly_rounded",
    "symmetric",
]
