"""Training by the maximum mean discrepancy of whole batches: what a few-step sampler draws matches data (Aiello et al.
2024, MMD-DDM).

For features u of m samples and w of m data, and a kernel k,

    MMD^2 = 1 / (m (m - 1)) sum_{i != j} (k(u_i, u_j) + k(w_i, w_j)) - 2 / m^2 sum_ij k(u_i, w_j),                (1)

without bias, so it may be negative. Its gradient pushes samples apart and towards data; it flows through all steps of
the sampler, whose times become part of what is learned. There is no teacher and no pairing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.clock import as_grid
from diffusion_jax.errors import InvalidInput, invalid, need
from diffusion_jax.objectives.batches import batch_size, refuse_weight
from diffusion_jax.objectives.feature_spaces import FeatureSpace, Kernel
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Aux, Denoiser, Frozen, Number, Numbers, Objective, Solver, Times

_BANK = 2**32 - 1
"""Folded into the key of a step for the rows of a bank."""


def _inner(u, v):
    # In full precision, for distances and discrepancies are differences of nearly equal values.
    return jnp.matmul(u, v.T, precision="highest")


def linear_kernel() -> Kernel:
    """`u . v`: the distance is that of the mean features."""
    return _inner


def polynomial_kernel(degree: int = 3) -> Kernel:
    """`(u . v / d + 1)^degree`, the one of the kernel distance for degree 3: moments up to the degree are compared."""
    if degree < 1:
        raise invalid("degree", degree, "it must be at least 1")
    return lambda u, v: (_inner(u, v) / u.shape[-1] + 1.0) ** degree


def gaussian_kernel(bandwidths: Sequence[Number] = (1.0,)) -> Kernel:
    """The mean over b of `exp(-|u - v|^2 / (2 b^2))`. Raises InvalidInput for none and for what is not positive."""
    found = np.asarray(bandwidths, np.float64)
    if found.ndim != 1 or not found.size or not (found > 0).all():
        raise invalid("bandwidths", bandwidths, "positive numbers are needed, such as (1.0,)")

    def kernel(u, v):
        square = jnp.square(u).sum(axis=1)[:, None] + jnp.square(v).sum(axis=1) - 2.0 * _inner(u, v)
        square = jnp.maximum(square, 0.0)
        return sum((jnp.exp(-0.5 * square / b**2) for b in bandwidths), jnp.zeros(())) / len(bandwidths)

    return kernel


def squared_mmd(u: Numbers, w: Numbers, kernel: Kernel, unbiased: bool = True) -> Float[Array, ""]:
    """Equation (1), for sets of any two sizes; with `unbiased=False` the diagonals count and it is never negative."""
    u, w = jnp.asarray(u), jnp.asarray(w)
    if u.ndim != 2 or w.ndim != 2 or u.shape[1] != w.shape[1]:
        raise invalid("shapes of the two sets", (u.shape, w.shape), "expected [n, d] and [m, d]")
    own, data, across = kernel(u, u), kernel(w, w), kernel(u, w)

    def mean(gram):
        count = len(gram)
        if not unbiased:
            return gram.mean()
        # Not the sum less the trace, whose digits would cancel.
        return jnp.where(jnp.eye(count, dtype=bool), 0.0, gram).sum() / (count * (count - 1))

    return mean(own) + mean(data) - 2.0 * across.mean()


def kernel_matching(generate: Callable[..., Any], spaces: Sequence[FeatureSpace]) -> Objective:
    """The sum of weight MMD^2, equation (1), over feature spaces, as an `Objective` on batches `{"x0"}`.

    generate: `(params, batch, key) -> X [B, ...]`, differentiable, such as `whole_runs`; conditions of the batch are
        those of the samples. spaces: one or several; those of metrics that judge the result should not be among them.
        Where the samples have conditions, a space that is `paired` compares them as well.

    The loss is one number of the whole batch, each example's `loss`; on a mesh the batch is that of all devices. With
    gradient accumulation it is the mean over the parts, which estimates the same with more noise.
    Metrics: `mmd2/i`. Raises InvalidInput without a space, and at `init` for a batch of one example.
    """
    if not spaces:
        raise InvalidInput("kernel_matching needs a feature space: raw_space(gaussian_kernel()), say.")
    # One space is a tuple as well, of what a space is made of.
    for i, space in enumerate(spaces):
        need(f"spaces[{i}]", space, FeatureSpace, "spaces in a list are needed, [raw_space(gaussian_kernel())]")
        if not callable(space.kernel):
            raise invalid(f"spaces[{i}].kernel", space.kernel, "a kernel is needed, such as gaussian_kernel()")

    def init(key, params, batch):
        refuse_weight(batch, "kernel_matching")
        if batch_size(batch) < 2:
            raise invalid("batch_size", batch_size(batch), "pairs are compared: two examples at least are needed")
        return Frozen([(space.params, space.bank) for space in spaces])

    def loss(params, state, batch, key):
        size = batch_size(batch)
        batch = {"index": jnp.arange(size), **batch}
        x = generate(params, batch, key)
        if x.shape != batch["x0"].shape:
            raise invalid("what generate made", x.shape, f"samples of the shape of x0, {batch['x0'].shape}, are needed")
        found, cond = [], batch.get("cond")
        for i, (space, (fixed, bank)) in enumerate(zip(spaces, state.value, strict=True)):
            u = space.describe(fixed, x, cond)
            if bank is None:
                w = jax.lax.stop_gradient(space.describe(fixed, batch["x0"], cond))
            else:
                # No example's own key: those are folded with its index.
                rows = jax.random.permutation(jax.random.fold_in(key, _BANK - i), len(bank))[:size]
                w = jnp.asarray(bank)[rows]
            found.append(squared_mmd(u, w, space.kernel))
        total = sum((space.weight * value for space, value in zip(spaces, found, strict=True)), jnp.float32(0))
        losses = jnp.broadcast_to(total, (size,))
        return losses, Aux(state, {f"mmd2/{i}": value for i, value in enumerate(found)}, {"loss": losses})

    return Objective(init, loss)


def whole_runs(denoiser: Denoiser, solver: Solver, grid: Times, remat: bool = True) -> Callable[..., Any]:
    """`generate` of `kernel_matching`: samples of whole runs from noise, at the conditions of the batch.

    Gradients flow through every step; with `remat` a step is computed again in the backward pass, so that memory is
    that of one step and of x between them. The sampler to use afterwards is this one, its grid included. Do not clip
    x0 within it (`denoisers.clipped`): what is clipped passes no gradient.
    """
    times: Any = as_grid(grid)

    def generate(params, batch, key):
        cond, index, shape = batch.get("cond"), batch["index"], batch["x0"].shape
        return sample(key, denoiser, params, solver, times, shape=shape, cond=cond, index=index, remat=remat).x

    return generate
