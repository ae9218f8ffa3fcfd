"""What a program costs before it runs: floating-point operations of matrix products and convolutions, and bytes.

Counted from the traced program, by shapes alone: the same on every machine. Element-wise work is left out: it is paid
in memory traffic, which no count of operations tells.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval
from jax.typing import ArrayLike

from diffusion_jax.typing import Condition, Denoiser, Network, Objective, Params

PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}
"""Operations a second of bfloat16 matrices without sparsity, by what a device calls itself; the first that fits."""


def peak_flops(device_kind: str) -> float | None:
    """The most that one device computes, from `PEAKS`; None where that is not known, as for CPUs and parts of a GPU."""
    # A part of a GPU (MIG) bears the name of the whole.
    if " MIG " in f"{device_kind} ":
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"{name}\b", device_kind)), None)


def training_flops(objective: Objective, params: Params, state: Any, batch: Any) -> float:
    """Operations of one training step on `batch`, without the optimiser's: loss and gradient. All may be shapes.

    What a backward pass computes again to save memory does not count, as in a model FLOPs utilisation (MFU): a step is
    then three forward passes, and less where parts are frozen.
    """

    def total(params, state, batch):
        return jnp.sum(objective.loss(params, state, batch, jax.random.key(0))[0])

    return min(3 * count_flops(total, params, state, batch), count_flops(jax.grad(total), params, state, batch))


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of `function(*arguments)`, two a multiplication and addition.

    arguments: pytrees of arrays or of their shapes; nothing is computed. What no output depends on is not counted. A
    scan counts its body as often as it runs; of a conditional the dearest branch counts, of a `while_loop` one round.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), arguments)
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(used)


def count_bytes(tree: Any) -> int:
    """Bytes that a pytree of arrays (or of their shapes) holds: parameters, caches, carries."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def evaluation_flops(network: Network, params: Params, x: ArrayLike | Any, cond: Condition = None) -> float:
    """Operations of one evaluation of `network` for `x [B, ...]`: what models are compared by, e.g. as `compute=`.

    All arguments may be shapes. t is one time a sample.
    """
    t = jax.ShapeDtypeStruct(jax.tree.leaves(x)[0].shape[:1], jnp.float32)
    return count_flops(lambda *inputs: network.apply(*inputs)[0], params, x, t, cond)


def carry_bytes(denoiser: Denoiser, params: Params, x: ArrayLike | Any, cond: Condition = None) -> int:
    """Bytes that `denoiser` carries from step to step in a run of `x [B, ...]`: its caches, tables and histories.

    All arguments may be shapes; nothing is computed. What surrounds a cache doubles it where it doubles the batch.
    """
    return count_bytes(jax.eval_shape(denoiser.init, params, x, cond))


def _flops(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(jaxprs_in_params(equation.params))
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * _size(equation.outvars[0]) * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
            total += 2.0 * _size(equation.outvars[0]) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        elif name == "cond":
            total += max(map(_flops, inner))
        else:
            times = equation.params["length"] if name == "scan" else 1
            total += times * sum(map(_flops, inner))
    return total


def _size(variable) -> int:
    return math.prod(variable.aval.shape)
