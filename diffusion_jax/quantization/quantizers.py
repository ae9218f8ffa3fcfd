"""Quantisers: numbers as integers of few bits, with a step and a zero point for each group of entries.

    q = clip(round(w / s) + z, -2^(b-1), 2^(b-1) - 1),        Q(w) = s (q - z)                                    (1)

s > 0 is the step and z, an integer, stands for 0 exactly. A symmetric quantiser has z = 0 and the range of the largest
size; an affine one has the range from the least to the largest entry, 0 included. Integers are signed throughout, which
of the usual unsigned form is a shift by 2^(b-1). b may be an array, so that one program serves all choices of bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid, unknown

GROUPS = ("tensor", "channel", "token")
CANDIDATES, POWER = 80, 2.4
"""Of the range that is searched for: how many shares of the whole one are tried, and of which power of the error the
sum is least (as Q-Diffusion's code has it)."""


@dataclass(frozen=True)
class Quantizer:
    """bits, symmetric: see the module. per: which entries share a step and a zero point:

    "tensor"   all of them
    "channel"  those of one entry of the last axis: of a kernel, its output channel
    "token"    those of one entry of all axes but the last: a row of what a dense layer reads. What a convolution reads
               has one step a sample, for it adds up neighbouring places
    a number   so many entries of a kernel's second to last axis, its inputs, for each output channel
    """

    bits: int = 8
    symmetric: bool = True
    per: str | int = "channel"

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise invalid("bits", self.bits, "a whole number from 2 to 8 was expected")
        if isinstance(self.per, bool) or not isinstance(self.per, str | int):
            raise invalid("per", self.per, f"one of {', '.join(GROUPS)}, or a number of inputs, was expected")
        if isinstance(self.per, str) and self.per not in GROUPS:
            raise unknown("per", self.per, GROUPS)
        if isinstance(self.per, int) and self.per < 1:
            raise invalid("per", self.per, "a group has at least one input")


class Scales(NamedTuple):
    """step: float32; zero: int8. Both broadcast to the values, or, in groups of inputs, to those of `grouped`."""

    step: Any
    zero: Any


def symmetric(bits: int = 8, per: str | int = "channel") -> Quantizer:
    """The quantiser of equation (1) with z = 0, such as integer products need it for weights."""
    return Quantizer(bits, True, per)


def affine(bits: int = 8, per: str | int = "channel") -> Quantizer:
    """The quantiser of equation (1) with a zero point, for values that are mostly of one sign."""
    return Quantizer(bits, False, per)


def grouped(values: Any, per: str | int) -> Any:
    """`values [..., in, out]` in groups of `per` inputs, `[..., in / per, per, out]`; unchanged where `per` is a name.

    Raises InvalidInput where the inputs are not a multiple of `per`.
    """
    if isinstance(per, str):
        return values
    if values.ndim < 2 or values.shape[-2] % per:
        raise invalid("per", per, f"a divisor of the inputs of a kernel is needed, whose shape is {values.shape}")
    return values.reshape(*values.shape[:-2], values.shape[-2] // per, per, values.shape[-1])


def shared_axes(ndim: int, per: str | int, windowed: bool = False) -> tuple[int, ...]:
    """The axes along which entries share a step. windowed: of what a convolution reads."""
    if isinstance(per, int):
        return (ndim - 2,)
    if per == "token":
        return tuple(range(1, ndim)) if windowed else (ndim - 1,)
    return tuple(range(ndim if per == "tensor" else ndim - 1))


def scales_of_range(low: Any, high: Any, quantizer: Quantizer, bits: Any = None) -> Scales:
    """Step and zero point of values from `low` to `high` and 0. bits: in the place of the quantiser's."""
    first, last = _ends(quantizer, bits)
    low, high = jnp.minimum(low, 0.0).astype(jnp.float32), jnp.maximum(high, 0.0).astype(jnp.float32)
    step = jnp.maximum(-low, high) / last if quantizer.symmetric else (high - low) / (last - first)
    # Of entries that are all 0 any step will do.
    step = jnp.where(step > 0, step, 1.0)
    if quantizer.symmetric:
        return Scales(step, jnp.zeros(step.shape, jnp.int8))
    return Scales(step, jnp.clip(jnp.round(first - low / step), first, last).astype(jnp.int8))


def scales_of(
    values: Any, quantizer: Quantizer, finder: str = "max", windowed: bool = False, bits: Any = None
) -> Scales:
    """Step and zero point of `values` by their own range, a reduction at run time that needs no calibration.

    finder: "max", the whole range; or "mse", of 80 shares of it the one with the least sum of |w - Q(w)|^2.4, which
        gives up outliers. windowed: see `shared_axes`. bits: in the place of the quantiser's.
    """
    if finder not in FINDERS:
        raise unknown("finder", finder, FINDERS)
    values = grouped(jnp.asarray(values, jnp.float32), quantizer.per)
    axes = shared_axes(values.ndim, quantizer.per, windowed)
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    return FINDERS[finder](values, axes, low, high, quantizer, bits)


def _whole(values, axes, low, high, quantizer, bits):
    return scales_of_range(low, high, quantizer, bits)


def _searched(values, axes, low, high, quantizer, bits):
    def error(share):
        found = scales_of_range(share * low, share * high, quantizer, bits)
        rounded = _restored(_rounded(values, found, quantizer, bits), found)
        return jnp.sum(jnp.abs(values - rounded) ** POWER, axis=axes, keepdims=True)

    shares = 1.0 - jnp.arange(CANDIDATES) / 100.0
    best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
    return scales_of_range(best * low, best * high, quantizer, bits)


FINDERS: dict[str, Callable[..., Scales]] = {"max": _whole, "mse": _searched}


def quantize(values: Any, scales: Scales, quantizer: Quantizer, bits: Any = None) -> Any:
    """The integers q of equation (1), int8, in the shape of the values."""
    wide = grouped(jnp.asarray(values, jnp.float32), quantizer.per)
    return _rounded(wide, scales, quantizer, bits).astype(jnp.int8).reshape(jnp.shape(values))


def dequantize(integers: Any, scales: Scales) -> Any:
    """`s (q - z)` of equation (1), in float32: `integers [..., in, out]` of any of the groups."""
    wide = integers
    if scales.step.ndim > integers.ndim:
        wide = grouped(integers, integers.shape[-2] // scales.step.shape[-3])
    return _restored(wide.astype(jnp.float32), scales).reshape(integers.shape)


def fake_quantize(values: Any, scales: Scales, quantizer: Quantizer, bits: Any = None) -> Any:
    """Q(values) in float32, whose derivative is that of clipping alone: rounding counts as the identity, for the values
    and for the step (Bengio et al. 2013; Esser et al. 2020, LSQ)."""
    wide = grouped(jnp.asarray(values, jnp.float32), quantizer.per)
    return _restored(_rounded(wide, scales, quantizer, bits, through=True), scales).reshape(jnp.shape(values))


def _ends(quantizer, bits):
    most = 2.0 ** (jnp.asarray(quantizer.bits if bits is None else bits, jnp.float32) - 1.0)
    return -most, most - 1.0


def _rounded(values, scales, quantizer, bits, through=False):
    exact, (first, last) = values / scales.step, _ends(quantizer, bits)
    whole = jnp.round(exact)
    whole = exact + jax.lax.stop_gradient(whole - exact) if through else whole
    return jnp.clip(whole + scales.zero.astype(jnp.float32), first, last)


def _restored(integers, scales):
    return (integers - scales.zero.astype(jnp.float32)) * scales.step
