"""Channel balancing by timestep: what is hard to quantise moves from the inputs of a linear layer into its weights.

For y = x W, x `[..., C]` and W `[C, O]`, positive factors m leave y as it is,

    y  =  (x / m) (diag(m) W),      m_c = a_c^alpha / w_c^(1 - alpha),      w_c = max_o |W[c, o]|,                (1)

where a_c is the usual largest |x_c| (`statistics.ChannelMaxima`). A larger alpha moves more into the weights: an alpha
that serves 8 bits is too large for weights of 4. A scale a channel of the input could not be taken out of an integer
sum over channels; m is folded into the float weights before they are quantised, so it can.

Inputs of a diffusion transformer's layers are modulated by functions of t, so a, and with it m, differs by t. Two ways:

    t-aware          a, alpha and m for each of K buckets of t, and K quantised copies of the weights             (2)
    static-dynamic   m of the noisiest bucket at all times, then a Hadamard rotation: one copy of the weights,
                     y = (x diag(1/m) H) (H^T diag(m) W)                                                          (3)

With one bucket, (2) is SmoothQuant (Xiao et al. 2023). Source: ViDiT-Q (Zhao et al. 2025).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.quantization.rotation import hadamard, rotated_kernel
from diffusion_jax.timesteps import bucket_of


def balance(activations: Any, kernel: Any, alpha: Any, floor: float = 1e-5) -> Any:
    """The factors m of (1), `[K, ..., C]`, of maxima `[K, ..., C]` and a kernel `[..., C, O]`.

    alpha: in [0, 1], one number or one a bucket, `[K]`.
    floor: maxima count as at least this share of the layer's largest, so that a channel that is never used, or whose
        weights are zero, has a finite factor other than zero.

    Raises InvalidInput for an alpha outside of [0, 1].
    """
    if not np.all((np.asarray(alpha) >= 0) & (np.asarray(alpha) <= 1)):
        raise invalid("alpha", alpha, "it must be between 0 (weights alone) and 1 (activations alone)")
    power = jnp.asarray(alpha, jnp.float32).reshape(-1, *(1,) * (activations.ndim - 1))
    a, w = _floored(activations, floor), _floored(jnp.max(jnp.abs(kernel), axis=-1), floor)
    return a**power / w ** (1 - power)


def _floored(maxima, floor):
    largest = jnp.max(maxima, axis=-1, keepdims=True)
    return jnp.maximum(maxima, floor * jnp.where(largest > 0, largest, 1.0)).astype(jnp.float32)


class Balanced(NamedTuple):
    """Kernels of balanced linear layers: arrays alone, so that they can be stacked, scanned, sharded and saved.

    factors: m, `[K, ..., C]`. kernel: diag(m) W, for `rotated` layers H^T diag(m) W, `[K, ..., C, O]`.
    K is 1 where all times share one copy.
    """

    factors: Any
    kernel: Any


def balanced(kernel: Any, factors: Any, rotated: bool = False, block: int | None = None) -> Balanced:
    """Folds factors `[K, ..., C]`, and a rotation in blocks of `block`, into a kernel `[..., C, O]`: (2) or (3).

    The K kernels take K times the memory of one.
    """
    folded = factors[..., None] * kernel
    return Balanced(factors, rotated_kernel(folded, block) if rotated else folded)


def static_dynamic(activations: Any, kernel: Any, alpha: Any, block: int | None = None) -> Balanced:
    """(3): factors of the last, the noisiest, bucket of `activations [K, ..., C]`, and one rotated kernel."""
    return balanced(kernel, balance(activations[-1:], kernel, alpha), rotated=True, block=block)


def balanced_input(x: Any, factors: Any, rotated: bool = False, block: int | None = None) -> Any:
    """x / m, for `rotated` layers (x / m) H: what `Balanced.kernel` multiplies. Factors that broadcast against x."""
    within = x / factors
    return hadamard(within, block) if rotated else within


def in_bucket(layer: Balanced, t: Any, edges: Any) -> Balanced:
    """The factors `[..., C]` and the kernel `[..., C, O]` at the one time t of all samples; t may be traced.

    A layer with one copy has it at all times. Samples with times in several buckets need several kernels, so t is a
    scalar. Raises InvalidInput otherwise, and where edges and copies do not fit.
    """
    copies = layer.factors.shape[0]
    if copies == 1:
        return Balanced(layer.factors[0], layer.kernel[0])
    if jnp.ndim(t):
        raise invalid("t", jnp.shape(t), "weights by time bucket need one time for all samples, a scalar")
    if copies != np.shape(edges)[0] + 1:
        raise invalid("edges", np.shape(edges)[0], f"{copies} copies of the weights need {copies - 1} edges")
    index = bucket_of(t, edges)
    return Balanced(*(jnp.take(jnp.asarray(stack), index, axis=0, mode="clip") for stack in layer))
