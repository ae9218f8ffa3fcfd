"""Training of low-rank factors beside a frozen network, with any objective.

With a time drawn for each frame it is vectorised timestep adaptation (Liu et al. 2025): a network that was trained with
one time per clip learns to continue given frames. At a scale of 0 it is unchanged.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax.adapters import Lora
from diffusion_jax.objectives.frozen import with_frozen
from diffusion_jax.typing import Network, Objective, Params


class Adaptation(NamedTuple):
    """A frozen network with trainable low-rank factors beside it.

    network: of the parameters `adapters.at_scale(base, factors)`. objective: of the factors alone.
    init: `key -> factors`, with which the network is the base: `init_params` of `training.train`.
    """

    network: Network
    objective: Objective
    init: Callable[[Any], Params]


def adaptation(
    lora: Lora, base: Params, objective: Callable[[Network], Objective], batch: Mapping[str, Any]
) -> Adaptation:
    """Training of the factors of `lora` beside the parameters `base` of its network.

    objective: the loss of a network, which draws the times. batch: an example, `x0` and `cond`, for the shapes.

        each = timesteps.independent(timesteps.uniform())  # a time for each frame
        adapted = objectives.adaptation(
            adapters.lora(network, rank=16),
            params,
            lambda network: objectives.denoising(network, process, each, t_shape=2),
            batch,
        )
        factors = training.train(adapted.objective, optimizer, batches, init_params=adapted.init, steps=100).params
    """
    learned = with_frozen(objective(lora.network), {"params": base}, trained="lora")
    x, cond = batch["x0"], batch.get("cond")
    return Adaptation(lora.network, learned, lambda key: lora.init(key, base, x, jnp.zeros(len(x)), cond))
