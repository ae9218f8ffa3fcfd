"""What all solvers share: one update per modality, the step's coefficients, and evaluations that may be skipped.

Every Gaussian solver is written around the pair (x0, eps): with `x = alpha x0 + sigma eps`, the exact flow between two
times at a frozen x0 (or a frozen eps, or at a frozen pair in sigma/alpha) is

    x' = alpha' x0 + sigma' eps,                                                                               (1)

which stays finite where `sigma / alpha` or the log-SNR do not. Higher orders add a correction to (1) and leave it out
where it has no meaning, at alpha = 0 and at sigma' = 0. `lam` is half the log-SNR, `log(alpha / sigma)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import by_modality, is_gaussian, members
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Carry, Data, Denoise, Prediction, Step


def per_modality(function: Callable[..., Any], process: Any, x: Any, *trees: Any) -> Any:
    """`function(process, x, *values)` for plain data, or entry by entry of a dict of data.

    Arguments are taken apart by `modality_of`. When the function returns a tuple, so does this: one dict per place of
    the tuple.
    """
    processes = by_modality(process)
    if not isinstance(x, dict):
        return function(processes, x, *trees)

    results = {
        name: function(modality_of(processes, name), x[name], *(modality_of(tree, name) for tree in trees))
        for name in x
    }
    # A NamedTuple is one value (a state), a plain tuple is several.
    if any(type(result) is not tuple for result in results.values()):
        return results
    size = len(next(iter(results.values())))
    return tuple({name: result[i] for name, result in results.items()} for i in range(size))


def modality_of(tree: Any, name: str) -> Any:
    """The entry of one modality, also within a `Step` or a `Prediction`; what is no dict is shared by all."""
    if isinstance(tree, Step):
        return Step(*(modality_of(value, name) for value in tree))
    if isinstance(tree, Prediction):
        return tree._replace(x0=modality_of(tree.x0, name), eps=modality_of(tree.eps, name))
    return tree[name] if isinstance(tree, dict) else tree


def check_gaussian(process: Any, solver: str) -> None:
    """Raises `InvalidInput` when `solver`, which needs alpha and sigma, is given another kind of process."""
    for part in members(process).values():
        if not is_gaussian(part):
            raise InvalidInput(
                f"solver {solver!r} needs a Gaussian process, but {type(part).__name__} is not; "
                "use ancestral() or unmask(), or joint() for a mixture of modalities."
            )


def stateless(name: str) -> Callable[..., tuple]:
    """The `init` of a Gaussian solver without history."""

    def init(process, x, grid):
        check_gaussian(process, name)
        return ()

    return init


def hub_step(process: Any, x0: Any, eps: Any, t_next: Any) -> Any:
    """Equation (1)."""
    return expand(process.alpha(t_next), x0) * x0 + expand(process.sigma(t_next), x0) * eps


def half_log_snr(process: Any, t: Any) -> Any:
    """lam = log(alpha / sigma), infinite at alpha = 0 and sigma = 0."""
    return 0.5 * process.log_snr(t)


def sigma_hat(process: Any, t: Any) -> Any:
    """sigma / alpha, infinite at alpha = 0."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return jnp.where(alpha == 0, jnp.inf, sigma / jnp.where(alpha == 0, 1.0, alpha))


def shrinkage(process: Any, t: Any, t_next: Any) -> Any:
    """`exp(-h) = (alpha sigma') / (alpha' sigma)`, sigma/alpha after the step over before it; 1 at sigma = 0."""
    numerator = process.alpha(t) * process.sigma(t_next)
    denominator = process.alpha(t_next) * process.sigma(t)
    return jnp.where(denominator == 0, 1.0, numerator / jnp.where(denominator == 0, 1.0, denominator))


def difference(end: Any, start: Any) -> tuple[Any, Any]:
    """`(end - start, whether it is finite and not zero)`; 1 where it is not, so that nothing downstream is NaN."""
    usable = jnp.isfinite(end) & jnp.isfinite(start)
    gap = jnp.where(usable, end, 0.0) - jnp.where(usable, start, 0.0)
    usable = usable & (gap != 0)
    return jnp.where(usable, gap, 1.0), usable


def any_entry(condition: Any) -> Any:
    """Whether a condition (a dict of them for joint data) holds anywhere."""
    return jnp.stack([jnp.any(leaf) for leaf in jax.tree.leaves(condition)]).any()


def evaluate_if(
    needed: Any, denoise: Denoise, carry: Carry, x: Data, step: Step, otherwise: Prediction
) -> tuple[Prediction, Carry]:
    """`denoise(carry, x, step)` where `needed` holds anywhere, else `otherwise` at no cost; only the pair (x0, eps) is
    kept.

    The decision is one for the batch (a real conditional): an evaluation that some entry needs is made for all.
    """

    def evaluate(carry):
        prediction, carry = denoise(carry, x, step)
        return (prediction.x0, prediction.eps), carry

    pair, carry = jax.lax.cond(any_entry(needed), evaluate, lambda carry: ((otherwise.x0, otherwise.eps), carry), carry)
    return Prediction(*pair), carry
