"""A trained model learns more by factors beside its frozen weights, or by further channels of its input.

`adaptation` does not know which network it is: what is adapted takes the calling convention of networks, and what is
learned is decided by the objective.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax import adapters, objectives
from diffusion_jax.models import by_path
from diffusion_jax.models.anatomy import anatomy_of, required
from diffusion_jax.models.paths import at_path, replaced_at
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


def at_scale(base: Params, factors: Any, scale: float = 1.0) -> dict:
    """The parameters of an adapted network at a runtime scale of the adapter; 0 is the base."""
    rank = jax.tree.leaves(factors)[0].shape[-1]
    return {"params": base, "lora": adapters.combined_adapters([(factors, scale)], rank)}


def with_channels(network: Network, params: Params, extra: int) -> Any:
    """The parameters with which the entrance reads `extra` more channels, which count for nothing at first."""
    entrance = f"{required(network, 'entrance', 'with_channels')}/kernel"
    kernel = at_path(params, entrance)
    wider = jnp.pad(kernel.reshape(anatomy_of(network).patch ** 2, -1, kernel.shape[-1]), [(0, 0), (0, extra), (0, 0)])
    return replaced_at(params, entrance, wider.reshape(-1, kernel.shape[-1]))


def shown(clips: Array | np.ndarray, given: Any) -> np.ndarray:
    """The channels of mask-and-concat: the `given [B, F]` frames, zeros in place of the others, and the mask."""
    mask = np.broadcast_to(np.asarray(given, np.float32)[..., None, None, None], (*clips.shape[:4], 1))
    return np.concatenate([clips * mask, mask], axis=-1)


def change(base: Params, factors: Any) -> dict[str, float]:
    """The mean relative change `|W' - W| / |W|` of the weights of each kind of module."""
    before, after = by_path(base), by_path(adapters.merged(base, factors))
    kinds: dict[str, list[float]] = {}
    for path in adapters.adapted_modules(factors):
        w, new = (np.asarray(weights[f"{path}/kernel"]) for weights in (before, after))
        kinds.setdefault(path.split("/")[-2], []).append(float(np.linalg.norm(new - w) / np.linalg.norm(w)))
    return {kind: float(np.mean(values)) for kind, values in kinds.items()}
