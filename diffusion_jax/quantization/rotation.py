"""Orthogonal rotation of channels by a Hadamard matrix, which spreads extreme channels over all of a block.

For a linear layer y = x W, x `[..., C]` and W `[C, O]`, and an orthogonal H `[C, C]`,

    y  =  (x H) (H^T W),      H = H_b (+) ... (+) H_b,      H_2b = [[H_b, H_b], [H_b, -H_b]] / sqrt 2,      (1)

is exact; H depends neither on t nor on data. H is symmetric, so H^T = H = H^-1. Blocks have b channels, a power of two
that divides C. x H costs log2 b additions a value; H^T W is computed once. Sources: QuaRot (Ashkboos et al. 2024),
ViDiT-Q (Zhao et al. 2025).
"""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.errors import invalid


def hadamard_block(channels: int) -> int:
    """The largest block that `channels` allows: the largest power of two that divides it."""
    return channels & -channels


def hadamard(x: Any, block: int | None = None) -> Any:
    """x H of (1) along the last axis, by the fast Walsh-Hadamard transform; its own inverse.

    block: channels a block, a power of two that divides C; None: `hadamard_block(C)`. A block of 1 is the identity.
    Raises InvalidInput for another block.
    """
    channels = x.shape[-1]
    size = hadamard_block(channels) if block is None else block
    if size < 1 or size & (size - 1) or channels % size:
        raise invalid("block", size, f"it must be a power of two that divides the {channels} channels")
    shape, half = x.shape, 1
    while half < size:
        pairs = x.reshape(*shape[:-1], channels // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([first + second, first - second], axis=-2).reshape(shape)
        half *= 2
    return x / jnp.sqrt(jnp.asarray(size, x.dtype))


def rotated_kernel(kernel: Any, block: int | None = None) -> Any:
    """H^T W of (1), for kernels `[..., C, O]`."""
    return jnp.swapaxes(hadamard(jnp.swapaxes(kernel, -1, -2), block), -1, -2)
