"""Products of integers in the place of those of floats: what a quantised layer computes with. qwix does the arithmetic.

    y_o = s_x s_o (sum_c (q_xc - z_x) q_co)                                                                      (1)

q_x are the integers of what a layer reads and q those of its kernel, symmetric; the sum is one of int8 products in
int32, so a step of x may depend on the sample and the token, and one of the kernel on the output o, none on what is
summed over.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput
from diffusion_jax.quantization.quantizers import Quantizer, Scales, quantize


def integer_product(
    multiply: str, kernel: tuple[Any, Scales], scales: Callable[[Any], Scales], activations: Quantizer
) -> Callable[..., Any]:
    """What a layer takes as its `dot_general` or `conv_general_dilated` (the name in `multiply`): equation (1).

    kernel: its integers and scales. scales: x -> those of x. The layer's own kernel is not looked at.
    Raises InvalidInput where qwix is not installed.
    """
    return partial(_product, multiply, kernel, scales, activations)


def _product(multiply, kernel, scales, activations, x, ignored, *numbers, precision=None, **more):
    try:
        import qwix
    except ImportError:
        raise InvalidInput("arithmetic='integer' needs qwix: pip install qwix.") from None

    def array(integers, found, keep_zero):
        step = jnp.broadcast_to(found.step, (1,) * (integers.ndim - found.step.ndim) + found.step.shape)
        zero = jnp.broadcast_to(found.zero, step.shape) if keep_zero else None
        return qwix.QArray(integers, step, zero)

    found = scales(x)
    left = array(quantize(x, found, activations), found, not activations.symmetric)
    made = getattr(qwix, multiply)(left, array(*kernel, False), *numbers, **more)
    return made.astype(x.dtype)
