"""From a network to a denoiser, and what every denoiser transformation is built from."""

from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.time_axes import fill
from diffusion_jax.typing import Cost, Denoiser, Network, Prediction


def denoiser(network: Network, process) -> Denoiser:
    """Lifts a network to a denoiser of `process`: one evaluation a call, no state.

    The prediction is float32 whatever the network computes in; `extras` are the network's own.
    """

    def init(params, x, cond):
        return ()

    def apply(params, carry, x, step, cond):
        t = fill(step.t, x)
        output, extras = network.apply(params, process.network_input(x, t), process.network_time(t), cond)
        prediction = process.predict(output, x, t)
        return prediction._replace(extras=extras, cost=Cost(jnp.float32(1), jnp.float32(1))), carry

    return Denoiser(init, apply, process)


def map_prediction(inner: Denoiser, function: Callable[..., Prediction]) -> Denoiser:
    """Applies `function(prediction, x, step) -> Prediction` to every answer of `inner`; keeps its carry."""

    def apply(params, carry, x, step, cond):
        prediction, carry = inner.apply(params, carry, x, step, cond)
        return function(prediction, x, step), carry

    return Denoiser(inner.init, apply, inner.process)
