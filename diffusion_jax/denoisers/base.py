"""From a network to a denoiser, and the functions from which transformations of denoisers are built.

They change a prediction so that `x_t = alpha x0 + sigma eps` still holds, and take a batch apart. Each transformation
is in a file of its own.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from diffusion_jax.clock import network_inputs, to_prediction
from diffusion_jax.processes import by_modality, is_gaussian, kind_of, with_condition
from diffusion_jax.time_axes import each, expand, fill
from diffusion_jax.typing import Cost, Denoiser, Network, Prediction


def denoiser(network: Network, process: Any, target_time: bool = False) -> Denoiser:
    """The denoiser of a network that was trained on `process`: one evaluation per call, no state.

    target_time: gives a network of two times (`models.target_time`) the end of each step in cond["target_time"]. The
        network predicts the whole step, which DDIM and Euler make exactly: x + (s - t) u for a velocity u(x, t, s).
        Solvers of a higher order also use outputs of earlier steps, which have other ends.

    The prediction is float32 whatever the network computes in; `extras` are the network's own. Raises InvalidInput for
    a process that does not say of which kind it is.
    """
    kind_of(process)

    def init(params, x, cond):
        return ()

    def apply(params, carry, x, step, cond):
        seen, cond = with_condition(process, cond)
        if target_time:
            cond = with_target_time(process, x, step.t_next, cond)
        output, extras = network.apply(params, *network_inputs(seen, x, step.t), cond)
        return to_prediction(seen, output, x, step.t, extras), carry

    return Denoiser(init, apply, process)


def with_target_time(process: Any, x: Any, target: Any, cond: Any) -> dict[str, Any]:
    """`cond` with the time `target`, a prefix of the shape of x, as the network is fed times."""
    return {**(cond or {}), "target_time": process.network_time(fill(target, x))}


def map_prediction(inner: Denoiser, function: Callable[..., Prediction]) -> Denoiser:
    """Applies `function(prediction, x, step) -> Prediction` to every prediction of `inner`; keeps its carry."""

    def apply(params, carry, x, step, cond):
        prediction, carry = inner.apply(params, carry, x, step, cond)
        return function(prediction, x, step), carry

    return inner._replace(apply=apply)


def cost_like(cost: Cost) -> Cost:
    """The cost as float32 arrays, so that two branches of a decision agree."""
    return Cost(*(jnp.asarray(value, jnp.float32) for value in cost))


def replace_x0(process: Any, prediction: Prediction, x0: Any, x: Any, t: Any) -> Prediction:
    """The prediction with another clean half; the noise half follows from `x`, where the clean half changed at all.

    Unchanged entries stay what they were bit for bit. Discrete modalities keep their prediction.
    """

    def pair(x, process, old_x0, old_eps, x0, t):
        if not is_gaussian(process):
            return old_x0, old_eps
        eps = process.from_x0(x0, x, t).eps
        return x0, jnp.where(x0 == old_x0, old_eps, eps)

    return with_pair(prediction, each(pair, x, by_modality(process), prediction.x0, prediction.eps, x0, t))


def tilt(process: Any, prediction: Prediction, gradient: Any, t: Any) -> Prediction:
    """Adds `gradient` to the score: `eps - sigma g`, `x0 + sigma^2 / alpha g`; `x_t = alpha x0 + sigma eps` stays true.

    At alpha = 0 (nothing of the data is left in x_t) the pair is returned as it is.
    """

    def pair(x0, process, eps, gradient, t):
        alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
        shift = sigma * gradient * (alpha != 0)
        return x0 + sigma / jnp.where(alpha == 0, 1.0, alpha) * shift, eps - shift

    return with_pair(prediction, each(pair, prediction.x0, by_modality(process), prediction.eps, gradient, t))


def with_pair(prediction: Prediction, pair: Any) -> Prediction:
    """The prediction with a pair `(x0, eps)`, or a dict of pairs, as `each` returns them."""
    if isinstance(pair, dict):
        x0, eps = ({name: value[half] for name, value in pair.items()} for half in (0, 1))
        return prediction._replace(x0=x0, eps=eps)
    return prediction._replace(x0=pair[0], eps=pair[1])
