"""Dense layers: flax's, with the matrix product spelt the way the backend is fastest at."""

from typing import Any

import flax.linen as nn
import jax


def dot_general(x, kernel, dimension_numbers, precision=None, **options):
    """`jax.lax.dot_general`; on CPUs a product of the last axis of `x` with a matrix is taken on `x` as `[rows, C]`.

    The gradient of the kernel then contracts one axis. Over two or more, XLA transposes the incoming gradient in
    memory first and multiplies transposed operands, at a quarter of the speed (measured: 18 ms against 5 ms for
    `[4, 256, 384]` by `[384, 1536]` on one core). Elsewhere axes stay apart, because each may be sharded.
    """
    (contracted, _), (batched, _) = dimension_numbers
    flat = x.ndim > 2 and tuple(contracted) == (x.ndim - 1,) and not batched and jax.default_backend() == "cpu"
    if not flat:
        return jax.lax.dot_general(x, kernel, dimension_numbers, precision, **options)
    rows = x.reshape(-1, x.shape[-1])
    rest = (((1,), dimension_numbers[0][1]), ((), ()))
    y = jax.lax.dot_general(rows, kernel, rest, precision, **options)
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def projection(features: int, **fields: Any) -> nn.Dense:
    """`flax.linen.Dense` on `[..., C]`, with this module's product."""
    return nn.Dense(features, dot_general=dot_general, **fields)
