"""A trained model learns more by factors beside its frozen weights."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax import adapters, objectives
from diffusion_jax.typing import Network, Objective, Params


class Adaptation(NamedTuple):
    """A frozen network that learns by factors beside it.

    network: of the parameters `{"params": base, "lora": factors}`. objective: of the factors alone.
    init: `key -> factors`, with which the network is the base.
    """

    network: Network
    objective: Objective
    init: Callable[[Any], Any]


def adaptation(
    network: Network,
    base: Params,
    lora: Callable[[Network], adapters.Lora],
    objective: Callable[[Network], Objective],
    batch: Mapping[str, Any],
) -> Adaptation:
    """Adapts any network that takes times `[B, F]`, from its parameters `base`.

    lora: which layers are adapted, at which rank. objective: the loss of a network, which draws the times. batch: an
    example, for the shapes.
    """
    adapted = lora(network)
    learned = objectives.with_frozen(objective(adapted.network), {"params": base}, trained="lora")
    x, t, cond = batch["x0"], jnp.zeros(len(batch["x0"])), batch.get("cond")
    return Adaptation(adapted.network, learned, lambda key: adapted.init(key, base, x, t, cond))
