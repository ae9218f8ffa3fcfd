"""The loss of one modality at drawn times, unreduced: regression for Gaussian processes, likelihood for discrete ones.

An entry loss is `(process, output, x0, noise, x_t, t) -> (weighted, name, plain, share)`: `weighted` has the data's
shape and is averaged over it; `mean(plain [B]) / mean(share [B])` of the batch is reported under `name`. Draws, keys
and conditions are in `denoising`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes import kind_of
from diffusion_jax.time_axes import expand

EntryLoss = Callable[..., tuple[Any, str, Any, Any]]

TOKEN_WEIGHTINGS = ("nelbo", "cross_entropy")
"""`nelbo`: the negative ELBO in nats per token. `cross_entropy`: the mean over lost tokens (Chang et al. 2022)."""


def per_example(values: Any) -> Any:
    """The mean over everything but the batch, in float32 at least: half precision would keep three digits of it."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def mean_at_times(values: Any, t: Any) -> Any:
    """The mean of `values [B, ...]` at each time: of the shape of t, a prefix of theirs in which axes may be 1."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    shared = [axis for axis in range(values.ndim) if axis >= t.ndim or t.shape[axis] == 1]
    return jnp.mean(values, axis=shared, keepdims=True).reshape(t.shape)


def squared_error(output: Any, target: Any) -> Any:
    """`(output - target)^2` in float32, whatever a network computes in."""
    return jnp.square(output.astype(jnp.float32) - target.astype(jnp.float32))


def regression(weight: Callable[[Any, Any], Any] | None = None) -> EntryLoss:
    """`weight(process, t) (output - target)^2`, and `mse` without the weight."""

    def entry(process, output, x0, noise, x_t, t):
        target = process.target(x0, noise, t)
        if output.shape != target.shape:
            raise invalid("the network's output shape", output.shape, f"the target has shape {target.shape}")
        square = squared_error(output, target)
        weighted = square if weight is None else expand(weight(process, t), square) * square
        plain = per_example(square)
        return weighted, "mse", plain, jnp.ones_like(plain)

    return entry


def tokens(weighting: str = "nelbo") -> EntryLoss:
    """Cross-entropy of the clean tokens, weighed as `TOKEN_WEIGHTINGS` says, and `cross_entropy` per lost token.

    With `nelbo`, `-alpha'(t) / (1 - alpha(t)) * -log p(x0 | x_t)` on masked tokens, whose expectation over uniform t
    bounds `-log p(x0)` (Sahoo et al. 2024, equation 10; Shi et al. 2024, equation 5); absorbing processes only.
    """
    if weighting not in TOKEN_WEIGHTINGS:
        raise unknown("weighting", weighting, TOKEN_WEIGHTINGS)

    def entry(process, output, x0, noise, x_t, t):
        # Predictions of an absorbing process copy what is not masked: those tokens have no loss.
        cost = -process.log_prob(process.predict(output, x_t, t), x0)
        absorbing = kind_of(process) == "absorbing"
        lost = process.is_masked(x_t) if absorbing else jnp.ones(cost.shape, bool)
        share = per_example(lost.astype(jnp.float32))
        cost = jnp.where(lost, cost, 0.0)
        report = ("cross_entropy", per_example(cost), share)
        if weighting == "cross_entropy":
            # An example that lost nothing has no loss.
            return cost / expand(jnp.where(share > 0, share, 1.0), cost), *report
        if not absorbing:
            raise InvalidInput(
                "weighting 'nelbo' needs an absorbing process; use weighting='cross_entropy' for others."
            )
        return expand(process.nelbo_weight(t), cost) * cost, *report

    return entry
