"""Networks whose weights, and what their layers read, are integers of few bits: quantisers, networks by interception
(`quantized`), ranges by time along a sampler's own trajectory (`input_ranges`), products of integers, bytes counted.
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

__all__ = [
    "Quantized",
    "Quantizer",
    "Scales",
    "affine",
    "dequantize",
    "fake_quantize",
    "input_ranges",
    "quantizable",
    "quantize",
    "quantized",
    "quantized_bytes",
    "scales_of",
    "scales_of_range",
    "symmetric",
]
